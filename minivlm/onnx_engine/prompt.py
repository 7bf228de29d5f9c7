"""Turn messages into the token ids that the processor of the same folder gives, by tokenizers and jinja2."""

import json
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from minivlm.data.control_tokens import (
    SEPARATOR,
    control_pattern,
    escape_control_tokens,
    widened,
    without_separators,
)
from minivlm.onnx_engine.files import read_json


class Generation(Extension):
    """Read `{% generation %}` blocks, which mark answers for training; what is inside is written as it is."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        """Return the block's content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Prompt:
    """Write conversations as token ids.

    Args:
        folder: with `tokenizer.json`, `tokenizer_config.json`, `processor_config.json` and a chat template.
        image_token_id: of the placeholder of a picture.
        image_seq_length: image tokens that a picture takes.
    """

    def __init__(self, folder: Path, image_token_id: int, image_seq_length: int):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        self.template = compile_template(read_template(folder, settings))
        self.named = {name: text(settings[name]) for name in settings if name.endswith("_token") and settings[name]}
        self.image_token_id, self.image_seq_length = image_token_id, image_seq_length
        self.control = control_pattern(token.content for token in self.tokenizer.get_added_tokens_decoder().values())
        self.separator_ids = self.ids(SEPARATOR)

    def ids(self, words: str) -> list[int]:
        """Return the tokens of a text, without those that a tokenizer adds around it."""
        return self.tokenizer.encode(words, add_special_tokens=False).ids

    def tokens(self, messages: list[dict], **options) -> list[int]:
        """Return the tokens of a conversation that the model is to go on with; `options` are the chat template's.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        escaped = escape_control_tokens(messages, self.control)
        options = {"tools": None, "documents": None, "add_generation_prompt": True, **self.named, **options}
        try:
            ids = self.ids(self.template.render(messages=[without_pictures(m) for m in escaped], **options))
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error
        if escaped != messages:
            ids = [ids[i] for i in without_separators(ids, self.separator_ids)]
        return [ids[i] for i in widened(ids, self.image_token_id, self.image_seq_length)]

    def decode(self, ids: list[int]) -> str:
        """Return the words of an answer, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def without_pictures(message: dict) -> dict:
    """Return a message whose parts only say where pictures stand: a template is code of others."""
    if isinstance(message["content"], str):
        return message
    parts = [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]]
    return {**message, "content": parts}


def text(token: str | dict) -> str:
    """Return a token of `tokenizer_config.json`, which may stand in an object with its properties."""
    return token["content"] if isinstance(token, dict) else token


def read_template(folder: Path, settings: dict) -> str:
    """Return the chat template of a folder.

    Raises:
        ValueError: it has none.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not isinstance(settings.get("chat_template"), str):
        raise ValueError(f"{folder} has no chat_template.jinja. Export the model again.")
    return settings["chat_template"]


def compile_template(source: str):
    """Return a chat template with the functions that transformers gives to it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson  # Jinja's own escapes what HTML would read
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
