"""Answer questions about pictures in batches or streamed.

`Assistant` answers conversations in the chat format of transformers; commands, app and server call it. The rows of an
evaluation are answered and scored by `minivlm/reading.py`.
"""

from functools import cached_property
from threading import Event, Thread
from time import perf_counter

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer

from minivlm.constrained import FollowGrammar, vocabulary
from minivlm.data.encoder import Encoder
from minivlm.data.pictures import decode_image, pictures_in
from minivlm.decoding import Answer, Decoding, Pieces, check_room


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

    def encode(self, messages: list[dict], **options) -> dict[str, torch.Tensor]:
        """Return `input_ids` (T,) of a conversation and `pixel_values` (N, 3, H, W), empty without pictures.

        Args:
            options: of the chat template, as `tools` and `enable_thinking`.

        Raises:
            ValueError: a picture cannot be read, or the chat template refuses the conversation.
        """
        images = pictures_in(messages)
        ids = self.tokens(messages, **options)
        decoded = [decode_image(image) for image in images]
        pixels = self.encoder.pixels(decoded) if decoded else torch.empty(0)
        return {"input_ids": torch.tensor(ids), "pixel_values": pixels}

    def tokens(self, messages: list[dict], **options) -> list[int]:
        """Return the tokens of a conversation; its pictures are not looked at. `options` are the chat template's.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        try:
            return self.encoder.tokenize_messages(messages, add_generation_prompt=True, **options)[0]
        except TemplateError as error:
            raise ValueError(f"The chat template refuses the conversation: {error}") from error

    def check_room(self, tokens: int, new_tokens: int, option: str = "max_new_tokens") -> None:
        """Raise ValueError if a conversation and an answer may be longer than what the model reads.

        Args:
            option: what the user calls `new_tokens`.
        """
        check_room(self.room, tokens, new_tokens, option)

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
        if decoding.grammar is not None:
            inputs["logits_processor"] = [self.follow(decoding.grammar)]
        return inputs | decoding.arguments()

    def ends(self) -> list[int]:
        """Return the tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @cached_property
    def vocabulary(self):
        """Return the tokens as `FollowGrammar` reads them."""
        return vocabulary(self.tokenizer, self.model.get_output_embeddings().weight.shape[0], self.ends())

    def follow(self, grammar: str) -> FollowGrammar:
        """Return the argument of `generate` by which answers follow a grammar; take a new one for each call."""
        return FollowGrammar(grammar, self.vocabulary)

    @torch.inference_mode()
    def answer(self, encoded: list[dict], decoding: Decoding = Decoding()) -> list[Answer]:
        """Return the answers to a batch of conversations that `encode` returned."""
        inputs = self.batch(encoded, decoding)
        output = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        ends = torch.tensor(self.ends(), device=output.device)
        running = (torch.isin(output, ends).cumsum(1) == 0).sum(1)  # (B,): tokens before the end token
        lengths = (running + 1).clamp(max=output.shape[1]).tolist()
        texts = [self.decode(ids[:length].tolist()) for ids, length in zip(output, lengths)]
        ended = (running < output.shape[1]).tolist()
        return [Answer(*answer) for answer in zip(texts, lengths, ended)]

    def stream(self, encoded: dict, decoding: Decoding = Decoding()) -> "AnswerStream":
        """Start the answer to one conversation that `encode` returned; iterate over the result for its pieces."""
        return AnswerStream(self, self.batch([encoded], decoding))

    def decode(self, ids: list[int]) -> str:
        """Return the words of an answer."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class AnswerStream(TextIteratorStreamer):
    """Compute an answer in a thread and yield its text piece by piece; joined, the pieces are that of `answer`.

    The class of transformers decodes each line for itself; `Pieces` decodes the whole answer.

    Attributes:
        tokens: how many there are so far, the end token included.
        first, seconds: seconds from the start to the first token and to the end; None until then.
    """

    def __init__(self, assistant: Assistant, inputs: dict):
        super().__init__(assistant.tokenizer, skip_prompt=True)
        self.assistant, self.tokens, self.first, self.seconds = assistant, 0, None, None
        self.pieces = Pieces(assistant.decode)
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
        if piece := self.pieces.add(value.flatten().tolist()):
            self.on_finalized_text(piece)
        self.tokens = len(self.pieces.ids)

    def end(self) -> None:
        """Pass on what is held back, and end the iteration."""
        self.seconds = perf_counter() - self.start
        self.on_finalized_text(self.pieces.rest(), stream_end=True)

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
