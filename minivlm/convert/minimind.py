"""Describe the weights of MiniMind and MiniMind-V: names and sizes of their tensors, and the same in MiniVLM.

One table of names serves both directions. A file holds the decoder under `model.` and `lm_head.`, and the projector
under `vision_proj.`; it does not hold the tower.

| file | decoder here | projector | picture |
|---|---|---|---|
| MiniMind-3V | `minivlm_text` (QK-norm) | LayerNorm, two-layer GELU MLP | the token `<|image_pad|>`, 64 times |
| MiniMind-3V-MoE | `qwen3_moe` | the same | the same |
| MiniMind2-V | `llama` (no QK-norm) | one matrix | the character `@`, 196 times |
| MiniMind, MiniMind-MoE, MiniMind2 | `qwen3`, `qwen3_moe`, `llama` | none | none |
"""

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from minivlm.convert import formulas
from minivlm.convert.verify import example, largest_difference

Tensors = dict[str, torch.Tensor]

PROJECTORS = {  # MiniMind's names of the projector's parts -> ours
    "mlp": {"vision_proj.mlp.0": "layer_norm", "vision_proj.mlp.1": "linear_1", "vision_proj.mlp.3": "linear_2"},
    "linear": {"vision_proj.vision_proj.0": "linear_1"},
}
TOWERS = {"mlp": "siglip_vision_model", "linear": "clip_vision_model"}  # the towers that MiniMind-V's code can load

EMBEDDINGS, LAYER = "model.embed_tokens.weight", "model.layers.0."
QUERY, KEY = (f"{LAYER}self_attn.{name}_proj.weight" for name in "qk")
# Fields of config.json that are taken as they are; no tensor shows them.
TAKEN = ("hidden_act", "max_position_embeddings", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")


def names(text: PreTrainedConfig, projector: str | None, vocab_size: int) -> dict[str, tuple[str, tuple]]:
    """Return MiniMind's name of each tensor -> our name, and the slice of our tensor that it fills.

    Args:
        text: configuration of our decoder.
        projector: kind of projector, a key of `PROJECTORS`; None for a decoder alone.
        vocab_size: rows of MiniMind's embeddings; ours may have more.
    """
    inner = "model.language_model." if projector else "model."
    table = {f"model.{name}": (f"{inner}{name}", ()) for name in layer_names(text)}
    for i in range(text.num_hidden_layers) if text.model_type == "qwen3_moe" else ():
        theirs, ours, width = f"model.layers.{i}.mlp", f"{inner}layers.{i}.mlp", text.moe_intermediate_size
        table[f"{theirs}.gate.weight"] = (f"{ours}.gate.weight", ())
        for e in range(text.num_experts):  # we have one tensor for all experts, with gate and up in one
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
    """Return the names that are the same in both, without `model.`."""
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    if text.model_type != "llama":
        parts += ["self_attn.q_norm", "self_attn.k_norm"]
    if text.model_type != "qwen3_moe":
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    layers = [f"layers.{i}.{part}.weight" for i in range(text.num_hidden_layers) for part in parts]
    return [*layers, "norm.weight"]


def read_config(tensors: Tensors, stated: dict, multimodal: bool) -> PreTrainedConfig:
    """Return the configuration of the decoder.

    Args:
        tensors: MiniMind's; they show most sizes.
        stated: config.json, or empty. Values that are in neither take MiniMind's published defaults.
        multimodal: whether the decoder is part of a MiniVLM.

    Raises:
        ValueError: these are not MiniMind's names, or config.json states another size than the weights have.
    """
    check_names(tensors)
    normed, sparse = f"{LAYER}self_attn.q_norm.weight" in tensors, f"{LAYER}mlp.gate.weight" in tensors
    sizes = read_sizes(tensors, stated)
    check_stated(stated, sizes)
    published = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": stated.get("rms_norm_eps", 1e-6 if normed else 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": read_rope_theta(stated)},
        "tie_word_embeddings": is_tied(tensors, stated),
    }
    if sparse:
        published |= {"num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4}
        published["intermediate_size"] = sizes["moe_intermediate_size"]
    dense = ("minivlm_text" if multimodal else "qwen3") if normed else "llama"
    options = published | {key: stated[key] for key in TAKEN if key in stated} | sizes
    return AutoConfig.for_model("qwen3_moe" if sparse else dense, **options)


def check_names(tensors: Tensors) -> None:
    """Raise ValueError if these are not the weights of a MiniMind that can be converted."""
    if absent := [name for name in (EMBEDDINGS, QUERY, KEY) if name not in tensors]:
        raise ValueError(
            f"These are not the weights of a MiniMind of April 2025 or later: {', '.join(absent)} absent, "
            f"{len(tensors)} tensors found, as {', '.join(sorted(tensors)[:3])}."
        )
    if any(".shared_experts." in name for name in tensors):
        raise ValueError("MiniMind2's mixture of experts with shared experts has no counterpart here: not converted.")


def read_sizes(tensors: Tensors, stated: dict) -> dict[str, int]:
    """Return the sizes of the decoder that the shapes of its tensors show, under transformers' names."""
    vocab_size, hidden_size = tensors[EMBEDDINGS].shape
    norm = tensors.get(f"{LAYER}self_attn.q_norm.weight")
    # Without QK-norm no tensor shows the width of a head.
    head_dim = hidden_size // (stated.get("num_attention_heads") or 8) if norm is None else len(norm)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
        "num_attention_heads": len(tensors[QUERY]) // head_dim,
        "num_key_value_heads": len(tensors[KEY]) // head_dim,
        "head_dim": head_dim,
    }

    def rows(name):
        return len(
            tensors.get(f"{LAYER}mlp.{name}.weight", ())
        )  # an absent tensor is reported when weights are copied

    if f"{LAYER}mlp.gate.weight" in tensors:
        return sizes | {"num_experts": rows("gate"), "moe_intermediate_size": rows("experts.0.gate_proj")}
    return sizes | {"intermediate_size": rows("gate_proj")}


def check_stated(stated: dict, sizes: dict[str, int]) -> None:
    """Raise ValueError if config.json states another size than the weights have."""
    wrong = [f"{key}={stated[key]} (the weights have {value})" for key, value in sizes.items()
             if stated.get(key) not in (None, value)]  # fmt: skip
    if wrong:
        raise ValueError(f"config.json does not describe these weights: {', '.join(wrong)}. Take the one that does.")


def read_rope_theta(stated: dict) -> float:
    """Return the base of the position embedding; raise ValueError if config.json scales the positions."""
    rope = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    if stated.get("inference_rope_scaling") or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError("config.json scales RoPE (inference_rope_scaling), which is not converted: set it to false.")
    return float(stated.get("rope_theta") or rope.get("rope_theta") or 1e6)


def is_tied(tensors: Tensors, stated: dict) -> bool:
    """Return whether the LM head shares its weights with the embeddings; a file holds both in any case.

    Raises:
        ValueError: config.json says that they are shared, but they differ.
    """
    head = tensors.get("lm_head.weight")
    same = head is None or torch.equal(head, tensors["model.embed_tokens.weight"])
    if not same and stated.get("tie_word_embeddings"):
        raise ValueError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight. "
            "Take the config.json of these weights, or set it to false."
        )
    return same


@torch.no_grad()
def compare(model: PreTrainedModel, tensors: Tensors) -> list[str]:
    """Compare our logits with those of MiniMind's formulas on its own tensors, in fp32, for text and for a picture.

    Returns:
        Lines for the user.

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
