"""Compose rows for a test of `--data compose:helpers.composer`."""

import random

from helpers.pictures import noise
from minivlm.data.phrases import Phrase

BAD = (0, 3)  # epoch and number of a picture whose second sample has no marker


class Composer:
    """Compose three questions about each of ten pictures, as the seed says."""

    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        return 10

    def compose(self, epoch: int, index: int) -> list[dict]:
        """Return samples whose questions name seed, epoch, index and their own number."""
        picture = noise(random.Random(f"{self.seed}/{epoch}/{index}"), (32, 32))
        return [self.sample(picture, f"{index} {n}?", bad=(epoch, index) == BAD and n == 1) for n in range(3)]

    @staticmethod
    def sample(picture, question: str, bad: bool) -> dict:
        """Return one question and its answer; the bad one does not say where the picture stands."""
        marker = [] if bad else [{"type": "image"}]
        asked = {"role": "user", "content": [*marker, {"type": "text", "text": question}]}
        turns = [asked, {"role": "assistant", "content": "a"}]
        index, number = question[:-1].split()
        # The number of the picture lies in its top left corner, that of the question nowhere.
        phrases = [Phrase(index, [(0, 0, 0.5, 0.5)], is_read=True), Phrase(number, [], is_read=False)]
        return {"images": [picture], "messages": turns, "phrases": phrases}


def open_composer(seed: int) -> Composer:
    """Return the composer of a seed."""
    return Composer(seed)
