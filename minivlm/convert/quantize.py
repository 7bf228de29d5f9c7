"""Store the weights of ONNX graphs in 8 or 16 bits, or compute with 8 or 4 bits.

"q8" and "fp16" change what a file holds; the arithmetic stays fp32.

A Cast, and for 8 bits a Mul, widen each weight; onnxruntime does it once, when it loads the graph. Its own
`quantize_dynamic` would also round what flows between the operators, by instructions that differ from one processor to
the next: a browser and Python would not always answer alike, and of 200 questions to the released model eleven got
another answer than in fp32. So would onnxruntime by itself if it found a DequantizeLinear in place of Cast and Mul.

"int8" and "int4" are for speed: onnxruntime's MatMulNBits multiplies in 8 bits, with a scale for each 32 numbers of
the weights and of what flows through. Reading the weights takes most of the time of a token, and they are a quarter or
an eighth as large. Of the 200 answers two change with 8 bits, and eleven with 4.
"""

import logging
from pathlib import Path

import numpy as np

from minivlm.onnx_engine.graphs import DECODER, EMBED, SUFFIXES, VISION

# A convolutional tower suffers from 8 bits: of 200 questions to the released model three got another answer.
DTYPES = {
    "q8": {VISION: "fp16", EMBED: "q8", DECODER: "q8"},
    "fp16": {VISION: "fp16", EMBED: "fp16", DECODER: "fp16"},
    "fp32": {VISION: "fp32", EMBED: "fp32", DECODER: "fp32"},
    "int8": {VISION: "fp16", EMBED: "q8", DECODER: "int8"},
    "int4": {VISION: "fp16", EMBED: "q8", DECODER: "q4"},
}
FOR_BROWSERS = ("q8", "fp16", "fp32")
BITS = {"int8": 8, "q4": 4}  # of the matrices with which MatMulNBits computes
BLOCK = 32  # numbers that share a scale
IN_8_BITS = 4  # MatMulNBits' name for multiplying in 8 bits, `accuracy_level`
WEIGHTS = {"MatMul": 1, "Conv": 1, "Gemm": 1, "Gather": 0}  # operator -> which of its inputs is the weight


def shrink(folder: Path, *choices: str) -> None:
    """Replace the fp32 graphs in `folder`/onnx by smaller ones, and name those of the last choice in config.json.

    Args:
        choices: keys of `DTYPES`, whose values are the data types of the graphs. The folder then has the graphs of
            all of them; one that two choices share is written once.
    """
    import onnx  # of the extra `onnx`

    from minivlm.convert.onnx_graphs import LARGEST_FILE  # it imports torch
    from minivlm.convert.transformers_js import update_json

    for name in (VISION, EMBED, DECODER):
        path, wanted = folder / "onnx" / f"{name}.onnx", {DTYPES[choice][name] for choice in choices}
        for dtype in wanted - {"fp32"}:
            model = onnx.load(path)
            if dtype in BITS:
                model = compute_in(BITS[dtype], model)
            else:
                store_weights(model, dtype)
            small, is_large = folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx", model.ByteSize() > LARGEST_FILE
            onnx.save(model, small, save_as_external_data=is_large, location=f"{small.name}.data")
        if "fp32" not in wanted:
            for old in path.parent.glob(f"{path.name}*"):  # and its weights, if they are in a file beside it
                old.unlink()
    update_json(folder / "config.json", {"transformers.js_config": {"dtype": DTYPES[choices[-1]]}})


def compute_in(bits: int, model):
    """Return a graph that multiplies by matrices of 4 or 8 bits; each `BLOCK` numbers of a column share a scale."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    options = {"block_size": BLOCK, "is_symmetric": True, "accuracy_level": IN_8_BITS, "bits": bits}
    quantizer = MatMulNBitsQuantizer(model, algo_config=DefaultWeightOnlyQuantConfig(**options))
    quantizer.process()
    return quantizer.model.model


def store_weights(model, dtype: str) -> None:
    """Store every matrix, kernel and table of embeddings of a graph in "q8" or "fp16"."""
    graph, nodes, done = model.graph, [], set()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        name = node.input[WEIGHTS[node.op_type]] if node.op_type in WEIGHTS else ""
        axis = channel_axis(node, len(stored[name].dims)) if name in stored else None
        if axis is None:
            nodes.append(node)
            continue
        small = f"{name}_{'rows' if node.op_type == 'Gather' else axis}"
        if small not in done:
            graph.initializer.extend(round_weight(stored[name], axis, small, dtype))
        nodes += look_up(node, small, dtype) if node.op_type == "Gather" else widen(node, small, dtype, small in done)
        done.add(small)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in stored.values():
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def channel_axis(node, rank: int) -> int | None:
    """Return the axis of the weight along which each channel gets its own scale; None if the weight stays as it is."""
    if rank < 2:
        return None
    options = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Gather":
        return None if options.get("axis", 0) else 0
    if node.op_type == "Gemm":
        return 0 if options.get("transB", 0) else 1
    return 0 if node.op_type == "Conv" else rank - 1


def round_weight(tensor, axis: int, name: str, dtype: str) -> list:
    """Return the tensor `name`_small, and for "q8" `name`_scale, by which a channel's largest number becomes 127."""
    from onnx import numpy_helper

    weight = numpy_helper.to_array(tensor)
    if dtype == "fp16":
        return [numpy_helper.from_array(weight.astype(np.float16), f"{name}_small")]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded = np.round(weight / scale).astype(np.int8)
    return [numpy_helper.from_array(rounded, f"{name}_small"), numpy_helper.from_array(scale, f"{name}_scale")]


def widen(node, name: str, dtype: str, exists: bool) -> list:
    """Return the operator, reading a widened weight, and what widens it unless that exists."""
    node.input[WEIGHTS[node.op_type]] = f"{name}_wide"
    return [node] if exists else [*times_scale(f"{name}_small", f"{name}_scale", f"{name}_wide", dtype), node]


def look_up(node, name: str, dtype: str) -> list:
    """Return operators that take rows of a table and widen only these."""
    from onnx import helper

    ids, out = node.input[1], node.output[0]
    nodes = [helper.make_node("Gather", [f"{name}_small", ids], [f"{out}_small"], axis=0)]
    if dtype == "q8":
        nodes.append(helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"], axis=0))
    return [*nodes, *times_scale(f"{out}_small", f"{out}_scale", out, dtype)]


def times_scale(small: str, scale: str, wide: str, dtype: str) -> list:
    """Return operators that widen a tensor to fp32, and for "q8" multiply it by its scale."""
    from onnx import TensorProto, helper

    if dtype == "fp16":
        return [helper.make_node("Cast", [small], [wide], to=TensorProto.FLOAT)]
    return [
        helper.make_node("Cast", [small], [f"{wide}_unscaled"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{wide}_unscaled", scale], [wide]),
    ]
