"""Make the rows and prompts of a benchmark: random tokens of realistic lengths with a picture, alike for all sides."""

import random
from dataclasses import dataclass

import torch

from minivlm.benchmark.shapes import IMAGE, Shape
from minivlm.data.encoder import IGNORE


@dataclass(frozen=True)
class Rows:
    """Hold rows as the collators take them, with their pictures (N, 3, H, W)."""

    samples: list[dict]
    pixels: torch.Tensor

    @property
    def tokens(self) -> int:
        """Return the tokens of all rows, without padding."""
        return sum(len(sample["input_ids"]) for sample in self.samples)

    @property
    def sizes(self) -> str:
        """Return what a table says of the rows: their number and lengths."""
        lengths = [len(sample["input_ids"]) for sample in self.samples]
        return f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, {self.tokens:,} in all"

    @property
    def answers(self) -> int:
        """Return the tokens that carry loss."""
        return sum(int((sample["labels"][1:] != IGNORE).sum()) for sample in self.samples)


def draw_lengths(shape: Shape, count: int, seed: int = 0) -> list[int]:
    """Return the lengths of rows, captions and instructions in turn, whose mean is that of the two ranges."""
    rng = random.Random(seed)
    ranges = (shape.captions, shape.instructions)
    middles = [rng.random() for _ in range(-(-count // 4))]
    shares = [share for middle in middles for share in (middle, middle, 1 - middle, 1 - middle)]  # in balance
    return [round(low + (high - low) * shares[i]) for i in range(count) for low, high in [ranges[i % 2]]]


def make_rows(shape: Shape, lengths: list[int]) -> Rows:
    """Return rows of such lengths: the picture, a question, and an answer that is the second half of the text."""
    config, generator = shape.config(), torch.Generator().manual_seed(0)
    image, size, samples = config.image_seq_length, shape.vision["image_size"], []
    for length in lengths:
        text = max(4, length - image)
        words = torch.randint(20, shape.text["vocab_size"], (text,), generator=generator)
        ids = torch.cat([torch.full((image,), IMAGE), words])
        labels = ids.masked_fill(torch.arange(len(ids)) < image + text // 2, IGNORE)
        pixels = torch.randn(1, 3, size, size, generator=generator)
        samples.append({
            "input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids)), "pixel_values": pixels,
            "branch": torch.zeros_like(ids), "places": ["made"], "bad_rows": [], "epoch": 0,
        })  # fmt: skip
    return Rows(samples, torch.cat([sample["pixel_values"] for sample in samples]))


def make_prompt(shape: Shape, batch: int) -> dict[str, torch.Tensor]:
    """Return `batch` equal prompts of a picture and a question, as `generate` takes them."""
    [sample] = make_rows(shape, [shape.config().image_seq_length + shape.prompt]).samples
    ids = sample["input_ids"].repeat(batch, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": sample["pixel_values"].repeat(batch, 1, 1, 1)}  # fmt: skip
