"""Check the body of a chat request before transformers reads it: JSON in, JSON with nothing but known fields out."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable

from PIL import Image

from minivlm.data.bad_rows import BadRow
from minivlm.data.pictures import MAX_PIXELS, decode_image, from_data_url, open_picture, to_data_url
from minivlm.json_schema import check_package, compile_schema, parse_schema
from minivlm.server.limits import Limits, Refusal
from minivlm.server.remote import fetch

ROLES = ("system", "user", "assistant")
FIELDS = (
    "messages", "model", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "response_format",
)  # fmt: skip
UNUSED = ("user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key")
TEXT = {"type": "text"}
NEUTRAL = {  # field -> its only values: others would change the answer, and the server cannot do it
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "stop": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "parallel_tool_calls": (True, False),
}  # fmt: skip


class Bodies:
    """Check chat requests.

    Args:
        name: of the model.
        control: special tokens of the tokenizer, which no text may hold.
        hosts: from which pictures are fetched; none by default.
        fits: raises ValueError if the model cannot read messages and an answer of that many tokens.
        shrink: returns a picture in the size that the model reads, so that little is passed on.
    """

    def __init__(
        self, name: str, limits: Limits, control: Iterable[str], hosts: Iterable[str] = (),
        fits: Callable[[list[dict], int], None] = lambda messages, new_tokens: None,
        shrink: Callable[[Image.Image], Image.Image] = lambda image: image,
    ):  # fmt: skip
        self.name, self.limits, self.fits, self.shrink = name, limits, fits, shrink
        self.hosts = frozenset(host.lower().removesuffix(".") for host in hosts)
        tokens = sorted(filter(None, control), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def check(self, data: bytes) -> tuple[dict, dict]:
        """Return the request, with pictures as PNG in data: URLs, and how to decode: the arguments of `Decoding`
        and a seed. There is a grammar where the answer has to fit a JSON Schema.

        Raises:
            Refusal: it holds anything that the server does not take.
        """
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
            raise Refusal(f"The body is no JSON: {error}. Send an object with `messages`.") from error
        if not isinstance(body, dict):
            raise Refusal(f"The body is a JSON {type(body).__name__}. Send an object with `messages`.")
        body = self.fields(body)
        decoding = self.decoding(body)
        pictures = PictureParts(self.limits, self.hosts, self.shrink)
        messages = self.messages(body.get("messages"), pictures)
        try:
            self.fits(messages, decoding["max_new_tokens"])
        except Refusal:
            raise
        except ValueError as error:
            raise Refusal(str(error), param="messages") from error
        pictures.load()
        if grammar := grammar_of(body.get("response_format", TEXT)):
            decoding["grammar"] = grammar
        checked = {"messages": messages, "model": self.name, "stream": body.get("stream") or False}
        return checked, decoding

    def fields(self, body: dict) -> dict:
        """Return the fields that are given and used; refuse those that would be ignored."""
        body = {key: value for key, value in body.items() if value is not None and key not in UNUSED}
        for key, value in body.items():
            if key in NEUTRAL and not any(value == allowed for allowed in NEUTRAL[key]):
                allowed = " or ".join(json.dumps(value) for value in NEUTRAL[key])
                raise Refusal(f"`{key}` is not supported; it must be {allowed}. Leave it out.", param=key)
            if key not in FIELDS and key not in NEUTRAL:
                raise Refusal(f"{key[:80]!r}: no such field. Fields are {', '.join(FIELDS)}.", param=key[:80])
        model = body.get("model", self.name)
        if model != self.name:
            raise Refusal(f"model {str(model)[:80]!r}: this server has {self.name!r}. Ask for that.", 404, "model")
        if not isinstance(body.get("stream", False), bool):
            raise Refusal("`stream` must be true or false.", param="stream")
        return body

    def decoding(self, body: dict) -> dict:
        """Return the arguments of `Decoding` and a seed; greedy unless a temperature is asked for."""
        most = self.limits.new_tokens
        key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        tokens = number(body, key, (1, most), default=most, whole=True)
        seed = number(body, "seed", (0, 2**63 - 1), default=None, whole=True)
        temperature = number(body, "temperature", (0, 2), default=0)
        top_p = number(body, "top_p", (1e-6, 1), default=1)
        return {"max_new_tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed}

    def messages(self, messages, pictures: "PictureParts") -> list[dict]:
        """Return messages with text and pictures; `pictures` collects the parts whose picture is still to load."""
        if not isinstance(messages, list) or not 1 <= len(messages) <= self.limits.messages:
            raise Refusal(f"`messages` must be a list of 1 to {self.limits.messages} messages.", param="messages")
        checked, characters = [], 0
        for number, message in enumerate(messages, 1):
            where = f"Message {number}"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise Refusal(f"{where} must be an object with `role` and `content`; roles are {', '.join(ROLES)}.")
            # A client sends an answer back with empty fields for what it does not have.
            if extra := [key for key, value in message.items() if value and key not in ("role", "content")]:
                raise Refusal(
                    f"{where} has {extra[0][:80]!r}, which is not supported. Leave it out.", param="messages"
                )
            parts = self.parts(message.get("content"), where, pictures if message["role"] == "user" else None)
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            self.check_text(text, where)
            characters += len(text)
            checked.append({"role": message["role"], "content": parts})
        if characters > self.limits.text:
            raise Refusal(
                f"The messages have {characters:,} characters, more than {self.limits.text:,}. Use fewer words.",
                413, "messages",
            )  # fmt: skip
        return checked

    def parts(self, content, where: str, pictures: "PictureParts | None") -> list[dict]:
        """Return the content of a message as a list of parts."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise Refusal(f"{where} must have `content`: a text, or a list of parts.", param="messages")
        checked = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                checked.append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and pictures is not None:
                checked.append(pictures.add(part.get("image_url")))
            elif kind == "image_url":
                raise Refusal(f"{where} has a picture; only a user shows pictures.", param="messages")
            else:
                raise Refusal(f"{where}: part {str(kind)[:40]!r}. Parts are text and image_url.", param="messages")
        return checked

    def check_text(self, text: str, where: str) -> None:
        """Refuse control tokens, which would end the turn or stand for a picture, and what is no Unicode."""
        if found := self.control.search(text):
            raise Refusal(f"{where} has the control token {found[0]!r}. Write it otherwise.", param="messages")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal(f"{where} has half a character (a lone surrogate). Send UTF-8.", param="messages") from error


class PictureParts:
    """Collect the pictures of a request, then load them; all cheap checks come before the first is decoded."""

    def __init__(self, limits: Limits, hosts: Iterable[str], shrink: Callable[[Image.Image], Image.Image]):
        self.limits, self.hosts, self.shrink, self.found = limits, hosts, shrink, []

    def add(self, value) -> dict:
        """Return the part for a picture, whose URL `load` replaces."""
        url = value.get("url") if isinstance(value, dict) else value
        if not isinstance(url, str):
            raise Refusal("`image_url` must be an object with `url`, or a URL.", param="image_url")
        if len(self.found) == self.limits.pictures:
            raise Refusal(f"More than {self.limits.pictures} pictures. Send fewer.", 413, "image_url")
        if url.startswith("data:") and len(url) > 4 / 3 * self.limits.picture + 200:
            raise Refusal(
                f"A picture of about {len(url) * 3 // 4:,} bytes, more than {self.limits.picture:,}. Scale it down.",
                413, "image_url",
            )  # fmt: skip
        self.found.append({"type": "image_url", "image_url": {"url": url}})
        return self.found[-1]

    def load(self) -> None:
        """Replace each picture by itself as RGB in PNG: no metadata, one frame, the same for every decoder."""
        for part in self.found:
            url = part["image_url"]["url"]
            try:
                data = from_data_url(url) if url.startswith("data:") else fetch(url, self.hosts, self.limits.picture)
                part["image_url"]["url"] = self.encode(data)
            except BadRow as error:
                raise Refusal(f"{error}.", param="image_url") from error

    def encode(self, data: bytes) -> str:
        """Return a picture as a data URL of a PNG file."""
        if len(data) > self.limits.picture:
            message = f"A picture of {len(data):,} bytes, more than {self.limits.picture:,}. Scale it down."
            raise Refusal(message, 413, "image_url")
        try:
            with warnings.catch_warnings(), open_picture(data) as image:
                warnings.simplefilter("ignore")
                size = "{:,} x {:,}".format(*image.size) if math.prod(image.size) > self.limits.pixels else ""
        except BadRow:
            raise
        except Image.DecompressionBombError:  # Pillow refuses twice the pixels that it warns of
            size = f"more than {2 * MAX_PIXELS:,}"
        except Exception as error:  # Pillow raises a dozen classes for a damaged file
            raise BadRow(f"unreadable picture: {type(error).__name__}: {error}") from error
        if size:
            message = f"A picture of {size} pixels, more than {self.limits.pixels:,}. Scale it down."
            raise Refusal(message, 413, "image_url")
        return to_data_url(self.shrink(decode_image(data)))


def grammar_of(form) -> str | None:
    """Return the grammar of the JSON that `response_format` asks for; None if it asks for text.

    Raises:
        Refusal: it asks for something else, or the schema is refused as `minivlm ask --schema` refuses it.
    """
    if form == TEXT:
        return None
    asked = form.get("json_schema") if isinstance(form, dict) and form.get("type") == "json_schema" else None
    if not isinstance(asked, dict) or not isinstance(asked.get("schema"), dict):
        raise Refusal(
            '`response_format` must be {"type": "text"} or {"type": "json_schema", "json_schema": {"name": ..., '
            '"schema": {...}}}.', param="response_format",
        )  # fmt: skip
    try:
        check_package("`response_format`")
        schema = parse_schema(json.dumps(asked["schema"]).encode(), "response_format")
        return compile_schema(schema, "response_format")
    except ValueError as error:
        raise Refusal(str(error), param="response_format") from error


def number(body: dict, key: str, limits: tuple[float, float], default: float | None, whole: bool = False):
    """Return a number of the request; refuse one outside of its limits."""
    if key not in body:
        return default
    value, (least, most) = body[key], limits
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:  # NaN is not between
        kind = "a whole number" if whole else "a number"
        raise Refusal(f"`{key}` {str(value)[:40]} must be {kind} from {least} to {most}.", param=key)
    return value
