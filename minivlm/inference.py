"""Answer questions about pictures: conversations, in batches or streamed, and the rows of an evaluation.

`Assistant` answers conversations in the chat format of transformers; commands, app and server call it.

The functions below it answer and score items. An item is a dict with `text`, the prompt from the chat template,
`images`, its pictures, and where they are scored `answer` or `options`; `evaluation/scoring.py` makes items of rows.
"""

from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minivlm.data.encoder import Encoder
from minivlm.data.pictures import decode_image


@dataclass(frozen=True)
class Decoding:
    """Say how long an answer may be, in tokens, and how each token is chosen; with temperature 0 the likeliest is."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # sample among the likeliest tokens that have this share of the probability

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature {self.temperature} must be from 0 (the likeliest answer) to 100.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be more than 0 and at most 1.")

    def arguments(self) -> dict:
        """Return the arguments of `generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        # Whole numbers too, as a slider gives them; `generate` takes floats only.
        chances = {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        sampling = {"do_sample": True, **chances, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Answer(NamedTuple):
    """An answer and the number of its tokens, the end token included."""

    text: str
    tokens: int


class Assistant:
    """Answer conversations in the chat format of transformers.

    A conversation is a list of `{"role": "user", "content": [part, ...]}`. A part is `{"type": "text", "text": ...}`
    or `{"type": "image", "image": picture}`; a picture is encoded bytes, a `Path`, or a Pillow picture. Nothing that
    somebody types into a text acts as a control token.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.tokenizer = model.eval(), processor.tokenizer
        self.encoder = Encoder(processor)
        self.room = getattr(model.config.text_config, "max_position_embeddings", None) or 1 << 30

    def encode(self, messages: list[dict]) -> dict[str, torch.Tensor]:
        """Return `input_ids` (T,) of a conversation and `pixel_values` (N, 3, H, W), empty without pictures.

        Raises:
            ValueError: a picture cannot be read, or the chat template refuses the conversation.
        """
        content = [message["content"] for message in messages if not isinstance(message["content"], str)]
        images = [part.get("image") for parts in content for part in parts if part["type"] != "text"]
        # A name would let who writes the messages read files; a URL would be fetched.
        if strange := [image for image in images if not isinstance(image, bytes | Path | Image.Image)]:
            raise ValueError(f"not a picture: {type(strange[0]).__name__}. Give bytes, a Path or a Pillow picture.")
        ids = self.tokens(messages)
        decoded = [decode_image(image) for image in images]
        pixels = self.encoder.pixels(decoded) if decoded else torch.empty(0)
        return {"input_ids": torch.tensor(ids), "pixel_values": pixels}

    def tokens(self, messages: list[dict]) -> list[int]:
        """Return the tokens of a conversation; its pictures are not looked at.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        try:
            return self.encoder.tokenize_messages(messages, add_generation_prompt=True)[0]
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error

    def check_room(self, tokens: int, new_tokens: int, option: str = "max_new_tokens") -> None:
        """Raise ValueError if a conversation and an answer may be longer than what the model reads.

        Args:
            option: what the user calls `new_tokens`.
        """
        if tokens + new_tokens > self.room:
            raise ValueError(
                f"The conversation has {tokens} tokens and the answer may have {new_tokens}, but the model reads "
                f"{self.room}. Use fewer words, pictures or turns, or a smaller {option}."
            )

    def batch(self, encoded: list[dict], decoding: Decoding) -> dict:
        """Return the arguments of `generate` for encoded conversations, padded on the left.

        Raises:
            ValueError: conversation and answer may be longer than what the model reads.
        """
        self.check_room(max(len(chat["input_ids"]) for chat in encoded), decoding.max_new_tokens)
        ids = {"input_ids": [chat["input_ids"].tolist() for chat in encoded]}
        inputs = dict(self.tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self.model.device))
        if pixels := [chat["pixel_values"] for chat in encoded if len(chat["pixel_values"])]:
            inputs["pixel_values"] = torch.cat(pixels).to(self.model.device)
        return inputs | decoding.arguments()

    @torch.inference_mode()
    def answer(self, encoded: list[dict], decoding: Decoding = Decoding()) -> list[Answer]:
        """Return the answers to a batch of conversations that `encode` returned."""
        inputs = self.batch(encoded, decoding)
        output = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=output.device)
        running = (torch.isin(output, ends).cumsum(1) == 0).sum(1)  # (B,): tokens before the end token
        lengths = (running + 1).clamp(max=output.shape[1]).tolist()
        texts = [self.decode(ids[:length].tolist()) for ids, length in zip(output, lengths)]
        return [Answer(text, length) for text, length in zip(texts, lengths)]

    def stream(self, encoded: dict, decoding: Decoding = Decoding()) -> "AnswerStream":
        """Start the answer to one conversation that `encode` returned; iterate over the result for its pieces."""
        return AnswerStream(self, self.batch([encoded], decoding))

    def decode(self, ids: list[int]) -> str:
        """Return the words of an answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class AnswerStream(TextIteratorStreamer):
    """Compute an answer in a thread and yield its text piece by piece; joined, the pieces are that of `answer`.

    The class of transformers decodes each line for itself, and with some tokenizers a blank is lost. So this one
    decodes the whole answer after each token, and holds back a character until all its bytes are there.

    Attributes:
        tokens: how many there are so far, the end token included.
        first, seconds: seconds from the start to the first token and to the end; None until then.
    """

    def __init__(self, assistant: Assistant, inputs: dict):
        super().__init__(assistant.tokenizer, skip_prompt=True)
        self.assistant, self.tokens, self.first, self.seconds = assistant, 0, None, None
        self.stopped, self.error, self.start = Event(), None, perf_counter()
        self.thread = Thread(target=self._run, args=(inputs,), daemon=True)
        self.thread.start()

    def _run(self, inputs: dict) -> None:
        device = self.assistant.model.device

        def is_stopped(input_ids, scores, **kwargs) -> torch.Tensor:
            return torch.full((1,), self.stopped.is_set(), device=device)

        try:
            with torch.inference_mode():  # it holds for one thread
                self.assistant.model.generate(**inputs, streamer=self, stopping_criteria=[is_stopped])
        except Exception as error:  # raised again where the pieces are read
            self.error = error
            self.end()

    def put(self, value: torch.Tensor) -> None:
        """Take tokens from `generate`, the prompt first."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.first = self.first or perf_counter() - self.start
        self.token_cache += value.flatten().tolist()
        self.tokens = len(self.token_cache)
        text = self.assistant.decode(self.token_cache)
        if len(text) > self.print_len and not text.endswith("\ufffd"):
            self.on_finalized_text(text[self.print_len :])
            self.print_len = len(text)

    def end(self) -> None:
        """Pass on what is held back, and end the iteration."""
        self.seconds = perf_counter() - self.start
        self.on_finalized_text(self.assistant.decode(self.token_cache)[self.print_len :], stream_end=True)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            self.thread.join()
            if self.error is not None:
                raise self.error from None
            raise

    def stop(self) -> None:
        """End the answer after the token that is being computed, and wait for it."""
        self.stopped.set()
        self.thread.join()


def encode(processor: ProcessorMixin, items: list[dict], texts: list[str], side: str, device) -> dict:
    """Return the model inputs of `texts` with the pictures of `items`, padded on `side`."""
    images = [decode_image(image) for item in items for image in item["images"]]
    return processor(
        text=texts, images=images or None, return_tensors="pt", padding=True, padding_side=side,
        add_special_tokens=False,
    ).to(device)  # fmt: skip


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[dict], max_new_tokens: int = 64
) -> list[str]:
    """Return the greedy answer to each item of a batch."""
    inputs = encode(processor, items, [item["text"] for item in items], "left", model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def shared_features(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> dict | None:
    """Return the features of the items' pictures, repeated for each of an item's `options`; None without pictures."""
    inputs = encode(processor, items, [item["text"] for item in items], "right", model.device)
    if "pixel_values" not in inputs:
        return None
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output  # (N, I, D)
    parts = features.split([len(item["images"]) for item in items])
    repeated = torch.cat([part for part, item in zip(parts, items) for _ in item["options"]])
    return {"image": BaseModelOutputWithPooling(pooler_output=repeated)}


@torch.inference_mode()
def option_scores(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[list[float]]:
    """Return the log-probability of each of an item's `options` as the whole answer, the end token included.

    The tower sees each picture once, however many options there are.
    """
    pairs = [(item, option + processor.tokenizer.eos_token) for item in items for option in item["options"]]
    marker, expanded = processor.image_token, processor.image_token * processor.image_seq_length
    inputs = processor.tokenizer(
        [item["text"].replace(marker, expanded) + option for item, option in pairs],
        return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False,
    ).to(model.device)  # fmt: skip
    ids, ends = inputs["input_ids"], inputs["attention_mask"].sum(1)
    lengths = ends.new_tensor([len(processor.tokenizer(option)["input_ids"]) for _, option in pairs])
    place = torch.arange(ids.shape[1], device=ids.device)
    spoken = (place >= (ends - lengths)[:, None]) & (place < ends[:, None])  # (B, T): the option's own tokens
    asked = torch.nn.functional.pad(spoken[:, 1:], (0, 1))  # the positions that predict them
    logits = model(
        input_ids=ids, attention_mask=inputs["attention_mask"], logits_to_keep=asked,
        mm_encoder_outputs=shared_features(model, processor, items),
    ).logits[0].float()  # (K, V)  # fmt: skip
    scores = logits.log_softmax(-1).gather(1, ids[spoken][:, None])[:, 0]
    sums = iter(part.sum().item() for part in scores.split(lengths.tolist()))
    return [[next(sums) for _ in item["options"]] for item in items]


def rank(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[str]:
    """Return the likeliest of each item's `options`."""
    scores = option_scores(model, processor, items)
    return [max(zip(values, item["options"]))[1] for values, item in zip(scores, items)]


def answer_loss(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[tuple[float, int]]:
    """Return negative log-likelihood (nats) and number of tokens of each item's `answer`, the end token included."""
    # A reference that spells the image token means no picture; the model could not write it, either.
    answers = [item["answer"].replace(processor.image_token, "") for item in items]
    scores = option_scores(model, processor, [item | {"options": [a]} for item, a in zip(items, answers)])
    end = processor.tokenizer.eos_token
    return [(-s[0], len(processor.tokenizer(a + end)["input_ids"])) for s, a in zip(scores, answers)]
