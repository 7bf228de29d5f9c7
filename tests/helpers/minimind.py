"""Write random weights in the formats that MiniMind publishes."""

import json

import torch
from safetensors.torch import save_file

from minivlm.commands.convert import main

# As published but for sizes: (projector, QK-norm, experts, key-value heads).
FORMATS = {
    "minimind-3v": ("mlp", True, 0, 4),
    "minimind-3v-moe": ("mlp", True, 4, 4),
    "minimind2-v": ("linear", False, 0, 2),
    "minimind-3": (None, True, 0, 4),
    "minimind-3-moe": (None, True, 4, 4),
    "minimind2": (None, False, 0, 2),
}
PICTURED = [name for name in FORMATS if FORMATS[name][0]]


def make_source(name, hidden=32, layers=2, width=64, vocabulary=None, tower=16, dtype=torch.float32):
    """Make random weights with MiniMind's names, shapes and numbers of heads; the sizes are smaller."""
    projector, normed, experts, kv = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    vocabulary = vocabulary or (6400 if normed else 259)
    head = hidden // 8

    def matrix(*shape):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (torch.randn(*shape, generator=generator) * scale + (len(shape) == 1)).to(dtype)

    def mlp(prefix):
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width),
        }

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": matrix(hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for part, rows in (("q", hidden), ("k", kv * head), ("v", kv * head), ("o", hidden)):
            tensors[f"{layer}self_attn.{part}_proj.weight"] = matrix(rows, hidden)
        for part in "qk" if normed else "":
            tensors[f"{layer}self_attn.{part}_norm.weight"] = matrix(head)
        for part in ("input", "post_attention"):
            tensors[f"{layer}{part}_layernorm.weight"] = matrix(hidden)
        if experts:
            tensors[f"{layer}mlp.gate.weight"] = matrix(experts, hidden)
        for expert in [f"experts.{e}." for e in range(experts)] or [""]:
            tensors |= mlp(f"{layer}mlp.{expert}")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    shapes = {
        "mlp": {"mlp.0": (tower,), "mlp.1": (hidden, tower), "mlp.3": (hidden, hidden)},
        "linear": {"vision_proj.0": (hidden, tower)},
    }.get(projector, {})
    for part, shape in shapes.items():
        tensors[f"vision_proj.{part}.weight"] = matrix(*shape)
        tensors[f"vision_proj.{part}.bias"] = matrix(shape[0]) - 1
    return tensors


def save(path, tensors):
    """Write tensors in the format of the file's suffix; a path without suffix becomes a folder of transformers."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    elif path.suffix:
        torch.save(tensors, path)
    else:
        path.mkdir()
        torch.save(tensors, path / "pytorch_model.bin")
        hidden = tensors["model.embed_tokens.weight"].shape[1]
        (path / "config.json").write_text(json.dumps({"hidden_size": hidden, "num_attention_heads": 8}))
    return path


def options(name, parts, out):
    """Return the options of `convert from_minimind`: tokenizer and tower that belong to the format, and the output."""
    projector, normed, *_ = FORMATS[name]
    tower = ["--vision_model", str(parts["folder"] / parts[projector].config.model_type)] if projector else []
    return ["--tokenizer", str(parts["folder"] / ("third" if normed else "second")), *tower, "--out", str(out)]


def make(name, parts, tmp_path, file="weights.pth", **sizes):
    """Convert random weights of a published form; return the weights and the folder of the model."""
    tensors = make_source(name, **sizes)
    source = save(tmp_path / file, tensors)
    main(["from_minimind", str(source), *options(name, parts, tmp_path / "out"), "--verify"])
    return tensors, tmp_path / "out"
