"""Time a training step, forward and backward, of our model and of its peers on the same rows."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from minivlm.benchmark.peers import minimind_v_step
from minivlm.benchmark.rows import Rows
from minivlm.benchmark.shapes import Shape, make_llava, make_ours
from minivlm.data.collators import PackingCollator, PaddingCollator
from minivlm.data.encoder import IGNORE
from minivlm.model.packed_attention import NAME as PACKED
from minivlm.training.device import compile_blocks

PAD = 0


def autocast(dtype: torch.dtype):
    """Return the context in which a step computes; parameters are always fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def our_step(shape: Shape, rows: Rows, dtype: torch.dtype, packing: str, compiled: bool) -> Callable[[], None]:
    """Return one step of ours.

    Args:
        packing: "padded", or the attention implementation under which the rows are packed.
    """
    model = make_ours(shape)
    model.set_attn_implementation("sdpa")
    if packing == "padded":
        batch = PaddingCollator(PAD)(rows.samples)
    else:
        model.model.language_model.set_attn_implementation(packing)
        batch = PackingCollator()([rows.samples])
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    if compiled:
        compile_blocks(model, torch.device("cpu"))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = model(**tensors, labels=tensors["shift_labels"], use_cache=False).loss
        loss.backward()

    return step


def llava_step(shape: Shape, rows: Rows, dtype: torch.dtype) -> Callable[[], None]:
    """Return one step of transformers' LLaVA with Qwen 3 on rows padded to the longest."""
    model = make_llava(shape)
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([s[key] for s in rows.samples], batch_first=True, padding_value=value)
        for key, value in (("input_ids", PAD), ("labels", IGNORE))
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = model(input_ids=ids, labels=labels, pixel_values=rows.pixels, use_cache=False).loss
        loss.backward()

    return step


def training_sides(shape: Shape, rows: Rows, dtype: torch.dtype, peer: str | None) -> dict[str, Callable[[], None]]:
    """Return the sides of the comparison by name; the first is the one that ratios refer to."""

    def found() -> Iterator[tuple[str, Callable]]:
        if peer:
            yield "MiniMind-V, fp32, padded to its length", minimind_v_step(peer, shape, rows)
        if shape.fits_llava:
            yield "LLaVA + Qwen 3, padded to the longest", llava_step(shape, rows, dtype)
        yield "ours, padded to the longest", our_step(shape, rows, dtype, "padded", False)
        yield "ours, padded to the longest, compiled", our_step(shape, rows, dtype, "padded", True)
        yield "ours, packed under a dense mask, compiled", our_step(shape, rows, dtype, "sdpa", True)
        yield "ours, packed row by row, compiled", our_step(shape, rows, dtype, PACKED, True)

    return dict(found())
