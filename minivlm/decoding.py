"""Say how an answer is made, and hold one: what every engine shares. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Decoding:
    """Say how long an answer may be, in tokens, and how each token is chosen; with temperature 0 the likeliest is."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # sample among the likeliest tokens that have this share of the probability
    grammar: str | None = None  # of `compile_schema` or `compile_tools`: the answer follows it

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature {self.temperature} must be from 0 (the likeliest answer) to 100.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be more than 0 and at most 1.")

    def arguments(self) -> dict:
        """Return the arguments of transformers' `generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        # Whole numbers too, as a slider gives them; `generate` takes floats only.
        chances = {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        sampling = {"do_sample": True, **chances, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Answer(NamedTuple):
    """An answer, the number of its tokens, the end token included, and whether that came before the limit."""

    text: str
    tokens: int
    ended: bool = True


class Pieces:
    """Turn tokens into text as they come; joined, the pieces are the text of all tokens.

    The whole answer is decoded after each token: with some tokenizers a blank is lost between tokens that are decoded
    apart. A character waits until all its bytes are there.

    Args:
        decode: returns the text of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.ids, self.length = decode, [], 0

    def add(self, ids: list[int]) -> str:
        """Return the text that can be shown now that these tokens have come; it may be empty."""
        self.ids += ids
        text = self.decode(self.ids)
        return "" if text.endswith("\ufffd") else self.new(text)

    def rest(self) -> str:
        """Return what still waits, at the end of the answer."""
        return self.new(self.decode(self.ids))

    def new(self, text: str) -> str:
        """Return the part of a text that was not returned before."""
        piece = text[self.length :]
        self.length += len(piece)
        return piece


def check_room(room: int, tokens: int, new_tokens: int, option: str = "max_new_tokens") -> None:
    """Raise ValueError if a conversation and an answer may be longer than what the model reads.

    Args:
        room: how many tokens the model reads.
        option: what the user calls `new_tokens`.
    """
    if tokens + new_tokens > room:
        raise ValueError(
            f"The conversation has {tokens} tokens and the answer may have {new_tokens}, but the model reads "
            f"{room}. Use fewer words, pictures or turns, or a smaller {option}."
        )
