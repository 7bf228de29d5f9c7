"""Store the weights of ONNX graphs in 8 or 16 bits.

The 8-bit graphs compute in fp32: a DequantizeLinear widens each weight for the operator that reads it. onnxruntime's
`quantize_dynamic` would also round what flows between the operators, by instructions that differ from one processor to
the next: a browser and Python would not always answer alike.
"""

from pathlib import Path

import numpy as np

from minivlm.convert.onnx_generate import SUFFIXES
from minivlm.convert.transformers_js import update_json

WEIGHTS = {"MatMul": 1, "Conv": 1, "Gemm": 1, "Gather": 0}  # operator -> which of its inputs is the weight


def shrink(folder: Path, dtype: str) -> None:
    """Replace the fp32 graphs in `folder`/onnx by those of another data type, where transformers.js looks for them.

    Args:
        dtype: "q8" or "fp16"; "fp32" leaves the graphs as they are.
    """
    import onnx  # of the extra `onnx`

    if dtype == "fp32":
        return
    for path in sorted((folder / "onnx").glob("*.onnx")):
        model = onnx.load(path)
        model = to_int8(model) if dtype == "q8" else to_fp16(model)
        onnx.save(model, path.with_name(f"{path.stem}{SUFFIXES[dtype]}.onnx"))
        path.unlink()
    update_json(folder / "config.json", {"transformers.js_config": {"dtype": dtype}})


def to_fp16(model):
    """Return a graph with weights and arithmetic in fp16; inputs and outputs stay fp32, as transformers.js wants."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True)


def to_int8(model):
    """Store every matrix, kernel and table of embeddings in int8, with a scale for each channel; return the model."""
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
            graph.initializer.extend(round_weight(stored[name], axis, small, node.op_type == "Gather"))
        nodes += look_up(node, small) if node.op_type == "Gather" else widen(node, axis, small, small in done)
        done.add(small)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in stored.values():
        if tensor.name not in read:
            graph.initializer.remove(tensor)
    return model


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


def round_weight(tensor, axis: int, name: str, table: bool) -> list:
    """Return the tensors `name`_int8 and `name`_scale of a weight; the largest number of a channel becomes 127.

    Args:
        table: keep the scales as a column beside the rows, of which a Gather takes the same rows.
    """
    from onnx import numpy_helper

    weight = numpy_helper.to_array(tensor)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded = np.round(weight / scale).astype(np.int8)
    scale = scale if table else scale.reshape(-1)
    return [numpy_helper.from_array(rounded, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")]


def widen(node, axis: int, name: str, exists: bool) -> list:
    """Return the operator, reading its weight from a DequantizeLinear, and that one before it unless it exists."""
    from onnx import helper

    node.input[WEIGHTS[node.op_type]] = f"{name}_wide"
    inputs = [f"{name}_int8", f"{name}_scale"]
    return [*([] if exists else [helper.make_node("DequantizeLinear", inputs, [f"{name}_wide"], axis=axis)]), node]


def look_up(node, name: str) -> list:
    """Return operators that take rows of a table in int8 and widen only these."""
    from onnx import TensorProto, helper

    ids, out = node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"], axis=0),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"], axis=0),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}_wide", f"{out}_scale"], [out]),
    ]
