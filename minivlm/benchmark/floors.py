"""Time the matrix products of a model alone: the floor that no arrangement of the same arithmetic goes below."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from minivlm.benchmark.rows import Rows
from minivlm.benchmark.shapes import Shape, make_ours


def products(shape: Shape, pictures: int, tokens: int, answers: int, training: bool) -> Counter:
    """Return how often each product (rows, inner, columns) is needed.

    Args:
        tokens: those that the decoder reads, `answers` those for which the LM head is asked.
        training: also the two products of each trained layer's backward pass.
    """
    needed = Counter()
    with torch.device("meta"):  # sizes alone
        model = make_ours(shape)
    config = model.config
    patches = config.patch_grid[0] * config.patch_grid[1]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if "vision_tower" in name:
            rows = pictures * patches
        elif "projector" in name:
            rows = pictures * config.image_seq_length
        else:
            rows = answers if name == "lm_head" else tokens
        if not rows:
            continue
        n, k = module.weight.shape
        needed[rows, k, n] += 1
        if training and module.weight.requires_grad:
            needed[rows, n, k] += 1  # gradient of the input
            needed[n, rows, k] += 1  # gradient of the weight
    return needed


def multiply(needed: Counter, dtype: torch.dtype) -> Callable[[], None]:
    """Return work that computes the products."""
    made = [(torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).T, count)
            for (m, k, n), count in needed.items()]  # fmt: skip

    def work() -> None:
        for a, b, count in made:
            for _ in range(count):
                a @ b

    return work


def training_floor(shape: Shape, rows: Rows, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products of one training step on rows, without padding."""
    return multiply(products(shape, len(rows.pixels), rows.tokens, rows.answers, training=True), dtype)


def decoding_floor(shape: Shape, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products for one more token of each of `batch` answers."""
    return multiply(products(shape, 0, batch, batch, training=False), dtype)


def first_token_floor(shape: Shape, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products for the first token of each of `batch` answers about a picture."""
    tokens = batch * (shape.config().image_seq_length + shape.prompt)
    return multiply(products(shape, batch, tokens, batch, training=False), dtype)
