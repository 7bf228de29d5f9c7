"""Describe decoder and tokenizer by the names of llama.cpp: the metadata and tensors of its model file.

The names are those of `LLM_KV_NAMES` and `LLM_TENSOR_NAMES` in src/llama-arch.cpp. Our decoder is Qwen3 there.
"""

import json

import torch
from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from modeling_minivlm import MiniVLMForConditionalGeneration

DECODERS = ("minivlm_text", "qwen3")  # both have Qwen3's weights, by the same names
# How the tokenizers of MiniVLM and of Qwen 2 and 3 split a text; llama.cpp has the same pattern as "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama_token_type of include/llama.h
PARTS = {  # of a block: name in Qwen3 -> name in llama.cpp
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Changes of our chat template for llama.cpp; each left side stands in it once.
TEMPLATE_CHANGES = {
    # llama.cpp gives the parts of a message only to a template that walks through an empty list. Others get one
    # string, without the newline between a picture and a question.
    "{%- elif message.content %}": "{%- elif message.content is defined and message.content is not none %}",
    "part.type in ['image', 'image_url']": "part.type in ['image', 'image_url', 'media_marker']",
    # The server writes its own marker for a picture, a new one in each process.
    "set kind, text = 'image', '<|image_pad|>'": "set kind, text = 'image', part.text or '<|image_pad|>'",
}
# llama.cpp sets `enable_thinking` to true without being asked, and each answer would start with a thought.
NO_THOUGHT = "{%- set enable_thinking = none %}\n"


def beyond_qwen3(text: PreTrainedConfig) -> list[str]:
    """Return the settings of a decoder that the model file cannot express, a phrase each."""
    if text.model_type not in DECODERS:
        return [f"a decoder of type {text.model_type!r} (here: {' or '.join(DECODERS)})"]
    problems, rope = [], text.rope_parameters["rope_type"]
    if rope != "default":
        problems.append(f"rope_type={rope!r} (here: 'default')")
    if text.hidden_act != "silu":
        problems.append(f"hidden_act={text.hidden_act!r} (llama.cpp's Qwen3: 'silu')")
    if text.attention_bias:
        problems.append("attention_bias=True (llama.cpp's Qwen3: False)")
    if getattr(text, "use_sliding_window", False):
        problems.append("use_sliding_window=True (llama.cpp's Qwen3: False)")
    return problems


def split_name(tokenizer: dict) -> str | None:
    """Return llama.cpp's name for how a tokenizer splits a text into words; None if it has none.

    Args:
        tokenizer: content of tokenizer.json.
    """
    model, before = tokenizer["model"], tokenizer["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    last = steps[-1]
    known = model["type"] == "BPE" and not model.get("ignore_merges") and last.get("type") == "ByteLevel"
    # llama.cpp leaves out Qwen's NFC, which changes no text that is typed as usual.
    known = known and (tokenizer["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    if not known or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return "gpt-2"
    first = steps[0]
    same = len(steps) == 2 and first.get("pattern") == {"Regex": QWEN2_SPLIT} and first["behavior"] == "Isolated"
    return "qwen2" if same and not first["invert"] and not last["use_regex"] else None


def read_tokenizer(processor: ProcessorMixin) -> dict:
    """Return the content of tokenizer.json.

    Raises:
        ValueError: llama.cpp does not know how this tokenizer splits a text.
    """
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    if split_name(tokenizer) is None:
        raise ValueError(
            "llama.cpp has no name for how this tokenizer splits a text: it is not byte-level BPE with the pattern of "
            "Qwen 2 or GPT-2. Export the decoder by to_causal_lm, and convert it by llama.cpp's own converter."
        )
    return tokenizer


def chat_template(template: str) -> tuple[str, bool]:
    """Return our chat template as llama.cpp needs it, and whether it is ours; another one stays as it is."""
    ours = all(template.count(old) == 1 for old in TEMPLATE_CHANGES)
    for old, new in TEMPLATE_CHANGES.items() if ours else ():
        template = template.replace(old, new)
    return NO_THOUGHT + template, ours


def token_lists(tokenizer: dict, size: int) -> tuple[list[str], list[int]]:
    """Return the `size` tokens of a vocabulary and their types; ids without a token are called unused."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def tokenizer_metadata(processor: ProcessorMixin, size: int, generation: GenerationConfig) -> dict:
    """Return tokens, merges, special ids and the chat template of a model with `size` embeddings."""
    tokenizer = read_tokenizer(processor)
    tokens, types = token_lists(tokenizer, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    metadata = {
        "model": "gpt2",  # byte-level BPE
        "pre": split_name(tokenizer),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        # The chat template writes every token of a prompt; a BOS more would open a second turn.
        "add_bos_token": False,
        "add_eos_token": False,
    }
    if generation.suppress_tokens:
        metadata["suppress_tokens"] = list(generation.suppress_tokens)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        if (token := getattr(processor.tokenizer, f"{ours}_token_id")) is not None:
            metadata[f"{theirs}_token_id"] = token
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return metadata | {"tokenizer.chat_template": chat_template(processor.chat_template)[0]}


def text_metadata(model: MiniVLMForConditionalGeneration, processor: ProcessorMixin) -> dict:
    """Return the metadata of the model file, by llama.cpp's names."""
    text = model.config.text_config
    sizes = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "vocab_size": text.vocab_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": text.head_dim,
        "attention.value_length": text.head_dim,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(text.rope_parameters["rope_theta"]),
    }
    metadata = {f"qwen3.{key}": value for key, value in sizes.items()}
    if not model.generation_config.do_sample:
        metadata["general.sampling.temp"] = 0.0  # greedy, as `generate`; llama.cpp's own default is 0.8
    return metadata | tokenizer_metadata(processor, text.vocab_size, model.generation_config)


def text_tensors(model: MiniVLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the decoder's weights, by llama.cpp's names; it uses tied embeddings also as the LM head."""
    weights = model.model.language_model.state_dict()
    tensors = {
        "token_embd.weight": weights.pop("embed_tokens.weight"),
        "output_norm.weight": weights.pop("norm.weight"),
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    for name, weight in weights.items():
        layers, i, part = name.removesuffix(".weight").split(".", 2)
        assert layers == "layers", f"{name} is no weight of Qwen3"
        tensors[f"blk.{i}.{PARTS[part]}.weight"] = weight
    return tensors
