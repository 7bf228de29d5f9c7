"""MiniMind's and MiniMind-V's weights, into this repository's form and back.

A table of names, built from the sizes, serves both directions. Facts of the formats: a file holds the decoder under
`model.` and `lm_head.`, and the projector under `vision_proj.`, but not the tower.

| file | decoder here | projector | picture |
|---|---|---|---|
| MiniMind-3V | `minivlm_text` (QK-norm) | LayerNorm, two-layer GELU MLP | the token `<|image_pad|>`, 64 times |
| MiniMind-3V-MoE | `qwen3_moe` | the same | the same |
| MiniMind2-V | `llama` (no QK-norm) | one matrix | the character `@`, 196 times |
| MiniMind, MiniMind-MoE, MiniMind2 | `qwen3`, `qwen3_moe`, `llama` | none | none |
"""

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from scripts.convert import formulas
from scripts.convert.verify import example, largest_difference

Tensors = dict[str, torch.Tensor]

PROJECTORS = {  # MiniMind's names of the projector's parts -> ours
    "mlp": {"vision_proj.mlp.0": "layer_norm", "vision_proj.mlp.1": "linear_1", "vision_proj.mlp.3": "linear_2"},
    "linear": {"vision_proj.vision_proj.0": "linear_1"},
}
TOWERS = {"mlp": "siglip_vision_model", "linear": "clip_vision_model"}  # that MiniMind-V's own code can load


def names(text: PreTrainedConfig, projector: str | None, vocab_size: int) -> dict[str, tuple[str, tuple]]:
    """MiniMind's name of each tensor -> our name, and the slice of our tensor that it fills."""
    inner = "model.language_model." if projector else "model."
    table = {f"model.{name}": (f"{inner}{name}", ()) for name in layer_names(text)}
    for i in range(text.num_hidden_layers) if text.model_type == "qwen3_moe" else ():
        theirs, ours, width = f"model.layers.{i}.mlp", f"{inner}layers.{i}.mlp", text.moe_intermediate_size
        table[f"{theirs}.gate.weight"] = (f"{ours}.gate.weight", ())
        for e in range(text.num_experts):  # one tensor here for all experts, gate and up in one
            table[f"{theirs}.experts.{e}.gate_proj.weight"] = (f"{ours}.experts.gate_up_proj", (e, slice(width)))
            table[f"{theirs}.experts.{e}.up_proj.weight"] = (f"{ours}.experts.gate_up_proj", (e, slice(width, None)))
            table[f"{theirs}.experts.{e}.down_proj.weight"] = (f"{ours}.experts.down_proj", (e,))
    table["model.embed_tokens.weight"] = (f"{inner}embed_tokens.weight", (slice(vocab_size),))
    table["lm_head.weight"] = ("lm_head.weight", (slice(vocab_size),))
    for theirs, ours in PROJECTORS.get(projector, {}).items():
        for kind in ("weight", "bias"):
            table[f"{theirs}.{kind}"] = (f"model.multi_modal_projector.{ours}.{kind}", ())
    return table


def layer_names(text: PreTrainedConfig) -> list[str]:
    """Names that are the same in both, without `model.`."""
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    if text.model_type != "llama":
        parts += ["self_attn.q_norm", "self_attn.k_norm"]
    if text.model_type != "qwen3_moe":
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layers = [f"layers.{i}.{part}.weight" for i in range(text.num_hidden_layers) for part in parts]
    return [*layers, "norm.weight"]


def read_config(tensors: Tensors, stated: dict, multimodal: bool) -> PreTrainedConfig:
    """The decoder's configuration: sizes by the weights, the rest by config.json (`stated`) or as MiniMind publishes.

    Raises:
        ValueError: these are not MiniMind's names, or config.json states another size than the weights have.
    """
    layer = "model.layers.0."
    needed = ["model.embed_tokens.weight", f"{layer}self_attn.q_proj.weight", f"{layer}self_attn.k_proj.weight"]
    if absent := [name for name in needed if name not in tensors]:
        raise ValueError(
            f"These are not the weights of a MiniMind of April 2025 or later: {', '.join(absent)} absent, "
            f"{len(tensors)} tensors found, as {', '.join(sorted(tensors)[:3])}."
        )
    if any(".shared_experts." in name for name in tensors):
        raise ValueError("MiniMind2's mixture of experts with shared experts has no counterpart here: not converted.")
    vocab_size, hidden_size = tensors[needed[0]].shape
    normed, sparse = f"{layer}self_attn.q_norm.weight" in tensors, f"{layer}mlp.gate.weight" in tensors
    heads = stated.get("num_attention_heads") or 8
    # Without QK-norm no tensor shows the width of a head.
    head_dim = len(tensors[f"{layer}self_attn.q_norm.weight"]) if normed else hidden_size // heads
    rows = {name: len(tensors.get(f"{layer}{name}.weight", ())) for name in ("mlp.gate_proj", "mlp.gate")}
    found = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
        "num_attention_heads": len(tensors[needed[1]]) // head_dim,
        "num_key_value_heads": len(tensors[needed[2]]) // head_dim,
        "head_dim": head_dim,
    }
    if sparse:
        width = len(tensors.get(f"{layer}mlp.experts.0.gate_proj.weight", ()))
        found |= {"num_experts": rows["mlp.gate"], "moe_intermediate_size": width}
    else:
        found["intermediate_size"] = rows["mlp.gate_proj"]
    wrong = [f"{key}={stated[key]} (the weights have {value})" for key, value in found.items()
             if stated.get(key) not in (None, value)]  # fmt: skip
    if wrong:
        raise ValueError(f"config.json does not describe these weights: {', '.join(wrong)}. Take the one that does.")
    rope = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    if stated.get("inference_rope_scaling") or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError("config.json scales RoPE (inference_rope_scaling), which is not converted: set it to false.")
    kept = ("hidden_act", "max_position_embeddings", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")
    published = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": stated.get("rms_norm_eps", 1e-6 if normed else 1e-5),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(stated.get("rope_theta") or rope.get("rope_theta") or 1e6),
        },
        "tie_word_embeddings": is_tied(tensors, stated),
    }
    if sparse:
        published |= {"num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4}
        published["intermediate_size"] = found["moe_intermediate_size"]
    dense = ("minivlm_text" if multimodal else "qwen3") if normed else "llama"
    options = published | {key: stated[key] for key in kept if key in stated} | found
    return AutoConfig.for_model("qwen3_moe" if sparse else dense, **options)


def is_tied(tensors: Tensors, stated: dict) -> bool:
    """Whether the LM head is the embeddings: files hold both even where they are one."""
    head = tensors.get("lm_head.weight")
    same = head is None or torch.equal(head, tensors["model.embed_tokens.weight"])
    if not same and stated.get("tie_word_embeddings"):
        raise ValueError("config.json says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight.")
    return same


@torch.no_grad()
def compare(model: PreTrainedModel, tensors: Tensors) -> list[str]:
    """Hold our logits against MiniMind's formulas on its own tensors, in fp32, for text and for a picture with text.

    Raises:
        ValueError: they differ.
    """
    model.float().eval()
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    config, text, lines = model.config, model.config.get_text_config(), []
    vocab_size = len(tensors["model.embed_tokens.weight"])
    for kind in ("text", "picture and text") if config.model_type == "minivlm" else ("text",):
        inputs, place = example(config, vocab_size, pictured=kind != "text"), {}
        if "pixel_values" in inputs:
            features = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
            place = {"image_token_id": config.image_token_id, "features": features[:, -config.image_seq_length :]}
        expected = formulas.logits(tensors, text, inputs["input_ids"][0], **place)
        actual = model(**inputs).logits[0, :, :vocab_size]
        difference = largest_difference(actual, expected, f"{kind}: logits and those of MiniMind's formulas")
        lines.append(f"{kind}: largest logit difference from MiniMind's formulas {difference:.2e}")
    return lines
