"""Find the words of a question that name a place of the picture: what `--grounding_loss` teaches attention with.

    {"images", "messages", "phrases": [Phrase("cat", [(0.1, 0.2, 0.5, 0.6)], True)]} -> Encoder -> "grounding"

Only samples that a program composes have phrases; see `minivlm/data/composed.py`.
"""

from bisect import bisect_left
from typing import NamedTuple

import torch

PLACES = 3  # columns of a batch before those of the image tokens: row, last token of the phrase, where it is read
ANSWER = -1  # stands in the third column for a phrase without words
TOKENS = {"add_special_tokens": False, "return_offsets_mapping": True}
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture


class Phrase(NamedTuple):
    """Describe words of a question.

    Args:
        text: the words, as they stand in the question; None for the answer, which is not known before it is written:
            its place is looked for where it begins.
        boxes: where the picture shows what they name; empty if it does not.
        is_read: whether the answer depends on them. Of the options of a choice only the right one is read.
    """

    text: str | None
    boxes: list[Box]
    is_read: bool = False


def cover(boxes: list[Box], side: int) -> torch.Tensor:
    """Return which cells of a grid of side x side image tokens have their centre in a box, (side * side,) of 0 and 1.

    A box without the centre of any cell covers the cell in which its own centre lies.
    """
    grid = torch.zeros(side, side, dtype=torch.long)
    for left, top, right, bottom in boxes:
        columns, rows = (cells(*ends, side) for ends in ((left, right), (top, bottom)))
        grid[rows, columns] = 1
    return grid.flatten()


def cells(start: float, end: float, side: int) -> slice:
    """Return the cells of an axis whose centres lie between two shares of its length."""
    first, last = round(start * side), round(end * side)
    if first < last:
        return slice(first, last)
    middle = min(side - 1, int((start + end) / 2 * side))
    return slice(middle, middle + 1)


def locate(phrases: list[Phrase], question: str, header: str, tokenizer, first_answer: int, side: int) -> torch.Tensor:
    """Return a row for each phrase, (n, 2 + I): where it ends, the position that is to read it, what it covers.

    The first column is the position of the phrase's last token. The second is the position that predicts the first
    token of the answer, or 0 if the answer does not depend on the phrase. The others are `cover` of its boxes.
    A phrase without words has the position that predicts the first token of the answer, and `ANSWER`.

    Args:
        header: what the chat template writes between a question and its answer.
        first_answer: position of the answer's first token.

    Raises:
        ValueError: a phrase does not stand in the question.
    """
    # From the answer backwards: the template may write anything before the question.
    begins = [begin for begin, _ in tokenizer(question + header, **TOKENS)["offset_mapping"]]
    start, found = first_answer - len(begins), []
    for text, boxes, is_read in phrases:
        if text is None:
            places = [first_answer - 1, ANSWER]
        elif (at := question.rfind(text)) < 0:
            raise ValueError(f"The phrase {text!r} does not stand in the question {question!r}.")
        else:
            last = start + bisect_left(begins, at + len(text)) - 1  # a rare character has several tokens
            places = [last, first_answer - 1 if is_read else 0]
        found.append(torch.cat([torch.tensor(places), cover(boxes, side)]))
    return torch.stack(found)
