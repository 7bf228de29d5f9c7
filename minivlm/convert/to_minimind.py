"""Write a MiniVLM in the form that MiniMind-V's own code loads. It reverses `from_minimind`, bit for bit."""

import json
import math
from pathlib import Path

import torch
from transformers import ProcessorMixin

from configuration_minivlm import MiniVLMConfig
from minivlm.convert.files import new_folder, read_tensors
from minivlm.convert.minimind import TOWERS, compare, names
from minivlm.model.loading import load_trained

# Fields of the decoder in config.json; MiniMind's configuration takes them as keyword arguments.
STATED = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size hidden_act
max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id num_experts num_experts_per_tok
moe_intermediate_size norm_topk_prob router_aux_loss_coef""".split()


def to_minimind(source: str | Path, out: str | Path, verify: bool = False) -> list[str]:
    """Write the model of `source` for MiniMind-V: `sft_vlm_SIZE.pth`, and its tower and tokenizer in folders.

    The .pth file is a plain dictionary of tensors, since MiniMind-V reads no other format.

    Args:
        source: folder or Hub id of a MiniVLM.
        out: new folder.
        verify: also compare the written weights by MiniMind's formulas with ours; a difference is an error.

    Returns:
        Lines for the user.

    Raises:
        ValueError: MiniMind-V has no such projector, tower or decoder, or the comparison failed.
    """
    model, processor = load_trained(source)
    projector = check_expressible(model.config)
    stated = describe(model.config, processor, projector)
    state, table = model.state_dict(), names(model.config.text_config, projector, stated["vocab_size"])
    tensors = {name: state[target][index].clone() for name, (target, index) in table.items()}
    tower = model.model.vision_tower
    if projector == "mlp":
        tower.config.vision_use_head = False  # we do not build the pooling head, and MiniMind-V does not use it
    name = f"sft_vlm_{stated['hidden_size']}{'_moe' * stated['use_moe']}.pth"
    with new_folder(out) as folder:
        torch.save(tensors, folder / name)
        (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        tower.save_pretrained(folder / "vision_model")
        processor.image_processor.save_pretrained(folder / "vision_model")
        processor.tokenizer.chat_template = processor.chat_template
        processor.tokenizer.save_pretrained(folder / "tokenizer")
        lines = [f"{len(tensors)} tensors in {name}", *assumptions(stated, projector)]
        if verify:
            lines += compare(model.float(), read_tensors(folder / name))
    return lines


def describe(config: MiniVLMConfig, processor: ProcessorMixin, projector: str) -> dict:
    """Return the content of config.json: the fields of MiniMind-V's `VLMConfig`."""
    text = config.text_config
    return {key: getattr(text, key) for key in STATED if hasattr(text, key)} | {
        "model_type": "minimind-v",
        **image_tokens(config, processor, projector),
        "rope_theta": text.rope_parameters["rope_theta"],
        "use_moe": text.model_type == "qwen3_moe",
        "image_token_len": config.image_seq_length,
        "image_hidden_size": config.vision_config.hidden_size,
    }


def image_tokens(config: MiniVLMConfig, processor: ProcessorMixin, projector: str) -> dict:
    """Return the size of the vocabulary, and the ids and the spelling of a picture in MiniMind-V's prompts."""
    vocab_size, image_id, spelling = config.text_config.vocab_size, config.image_token_id, processor.image_token
    if projector == "mlp":
        return {"vocab_size": vocab_size, "image_ids": [image_id], "image_special_token": spelling}
    at = processor.tokenizer.convert_tokens_to_ids("@")
    if image_id == vocab_size - 1 and processor.tokenizer.convert_ids_to_tokens(at) == "@":
        # from_minimind added the last row; MiniMind2-V itself spells a picture with `@`.
        vocab_size, image_id, spelling = vocab_size - 1, at, "@"
    n = config.image_seq_length
    return {"vocab_size": vocab_size, "image_ids": [image_id] * n, "image_special_token": spelling * n}


def check_expressible(config: MiniVLMConfig) -> str:
    """Return the kind of this model's projector, one of MiniMind-V's two.

    Raises:
        ValueError: MiniMind-V's code cannot express the model; the message lists every reason.
    """
    text, tower, kind = config.text_config, config.vision_config.model_type, config.projector_type
    decoders = {"mlp": ("minivlm_text", "qwen3", "qwen3_moe"), "linear": ("llama",)}[kind]
    whole = config.vision_feature_layer is None or (
        kind == "linear" and config.num_vision_layers == config.vision_config.num_hidden_layers
    )
    demands = {
        f"projector_layer_norm={config.projector_layer_norm}": config.projector_layer_norm == (kind == "mlp"),
        f"projector_hidden_act={config.projector_hidden_act!r}": config.projector_hidden_act == "gelu",
        f"multimodal_projector_bias={config.multimodal_projector_bias}": config.multimodal_projector_bias,
        f"pixel_shuffle_factor={config.pixel_shuffle_factor}": config.pixel_shuffle_factor == 1,
        f"vision_feature_layer={config.vision_feature_layer}, not None": whole,
        f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}": kind == "mlp"
        or config.vision_feature_select_strategy == "default",
        f"a tower of type {tower!r}, not {TOWERS[kind]!r}": tower == TOWERS[kind],
        f"a decoder of type {text.model_type!r}, not {' or '.join(decoders)}": text.model_type in decoders,
        "heads wider than their share of the decoder": kind == "mlp"
        or text.head_dim * text.num_attention_heads == text.hidden_size,
        "biases in the decoder": not getattr(text, "attention_bias", False) and not getattr(text, "mlp_bias", False),
        "scaled RoPE": (text.rope_parameters or {}).get("rope_type") == "default",
        "sliding windows": "sliding_attention" not in (getattr(text, "layer_types", None) or ()),
        "dense blocks between sparse ones": not getattr(text, "mlp_only_layers", None)
        and getattr(text, "decoder_sparse_step", 1) == 1,
    }
    if problems := [problem for problem, holds in demands.items() if not holds]:
        raise ValueError(
            f"MiniMind-V's code for a projector of type {kind!r} cannot express {'; '.join(problems)}. Nothing was "
            "written. Try minivlm convert to_llava."
        )
    return kind


def assumptions(stated: dict, projector: str) -> list[str]:
    """Return a line with the sizes that differ from those in MiniMind-V's scripts; no line if none does."""
    hidden = stated["hidden_size"]
    assumed = {"num_attention_heads": 8, "vocab_size": 6400, "rope_theta": 1e6, "hidden_act": "silu"}
    assumed |= {"tie_word_embeddings": True, "head_dim": hidden // 8}
    if projector == "mlp":
        width = math.ceil(hidden * math.pi / 64) * 64
        assumed |= {"num_key_value_heads": 4, "intermediate_size": width, "rms_norm_eps": 1e-6}
        assumed |= {"image_ids": [12], "image_token_len": 64, "num_experts": 4, "num_experts_per_tok": 1}
    else:
        assumed |= {"num_key_value_heads": 2, "intermediate_size": -(-(hidden * 8 // 3) // 64) * 64}
        assumed |= {"rms_norm_eps": 1e-5, "image_token_len": 196}
    differing = [f"{key}={stated[key]}" for key, value in assumed.items() if stated.get(key, value) != value]
    return [f"MiniMind-V's scripts assume other sizes: give its VLMConfig {', '.join(differing)}"] if differing else []
