"""Time answers: the first token of one, and each further token of one or of several at once."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from minivlm.benchmark.floors import decoding_floor, first_token_floor
from minivlm.benchmark.graphs import graphs_generate
from minivlm.benchmark.measure import alternate
from minivlm.benchmark.peers import minimind_v_generate
from minivlm.benchmark.rows import make_prompt
from minivlm.benchmark.shapes import Shape, make_llava, make_ours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def generate(model, prompt: dict, dtype: torch.dtype) -> Callable[[int], None]:
    """Return a greedy answer by transformers' `generate`; it takes the number of tokens."""
    model = model.to(dtype).eval()
    inputs = prompt | {"pixel_values": prompt["pixel_values"].to(dtype)}
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def work(new: int) -> None:
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return work


def answer_sides(
    shape: Shape, batch: int, peer: str | None, graphs: dict[str, Path], words: list[str]
) -> dict[str, Callable[[int], None]]:
    """Return the sides of a comparison of `batch` answers of a number of tokens; ratios refer to the first.

    Args:
        graphs: folders that `export_graphs` returned.
        words: of `DTYPES`, in which torch computes.
    """
    prompt = make_prompt(shape, batch)

    def found() -> Iterator[tuple[str, Callable]]:
        for word in words:
            dtype = DTYPES[word]
            if peer:
                yield f"MiniMind-V's own loop, {word}", minimind_v_generate(peer, shape, prompt, dtype)
            if shape.fits_llava:
                yield f"LLaVA + Qwen 3, {word}", generate(make_llava(shape), prompt, dtype)
            yield f"ours, {word}", generate(make_ours(shape), prompt, dtype)
        for word, folder in graphs.items():
            yield f"ours by onnxruntime, {word}", graphs_generate(folder, prompt, torch.get_num_threads())

    return dict(found())


def time_answers(
    shape: Shape, batch: int, rounds: int, peer: str | None, graphs: dict[str, Path], words: list[str]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds to the first token, and those of all further tokens of an answer, of each side and round.

    The second is the time of a whole answer without that of its first token, in the same round.
    """
    new, sides = shape.answer, answer_sides(shape, batch, peer, graphs, words)
    work = {f"{name}: first token": partial(side, 1) for name, side in sides.items()}
    work |= {f"{name}: whole answer": partial(side, 1 + new) for name, side in sides.items()}
    floors = {f"floor, {word}": DTYPES[word] for word in words}
    for name, dtype in floors.items():
        work[f"{name}: first token"] = first_token_floor(shape, batch, dtype)
        work[f"{name}: one token"] = decoding_floor(shape, batch, dtype)
    seconds = alternate(work, rounds)
    to_first = {name: seconds[f"{name}: first token"] for name in (*sides, *floors)}
    further = {
        name: [all_ - one for all_, one in zip(seconds[f"{name}: whole answer"], to_first[name], strict=True)]
        for name in sides
    }
    return to_first, further | {name: [new * t for t in seconds[f"{name}: one token"]] for name in floors}
