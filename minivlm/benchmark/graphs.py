"""Time answers of exported graphs: our model by onnxruntime, in fp32 and with matrices of 8 and 4 bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from minivlm.benchmark.shapes import IMAGE, Shape, make_ours
from minivlm.onnx_engine.graphs import Graphs

ARITHMETIC = ("fp32", "int8", "int4")


def export_graphs(shape: Shape, folder: Path) -> dict[str, Path]:
    """Write the graphs of our model of a shape, with random weights, in each arithmetic; return their folders.

    Raises:
        ValueError: a package of the extra `onnx` is not installed.
    """
    from minivlm.convert.onnx_graphs import export
    from minivlm.convert.quantize import shrink
    from minivlm.convert.to_onnx import check_packages

    check_packages()
    plain, *others = found = {name: folder / name for name in ARITHMETIC}
    found[plain].mkdir(parents=True)
    export(make_ours(shape).eval(), found[plain])
    for name, content in (("config", {"image_token_id": IMAGE}), ("generation_config", {})):  # no end token
        (found[plain] / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for name in others:
        shutil.copytree(found[plain], found[name])
        shrink(found[name], name)
    return found


def graphs_generate(folder: Path, prompt: dict[str, torch.Tensor], threads: int) -> Callable[[int], None]:
    """Return a greedy answer by onnxruntime; it takes the number of tokens."""
    graphs = Graphs(folder, threads)
    inputs = {name: tensor.numpy() for name, tensor in prompt.items()}
    return lambda new: graphs.generate(inputs, new)
