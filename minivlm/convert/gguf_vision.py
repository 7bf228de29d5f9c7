"""Describe tower and projector by the names of llama.cpp: the metadata and tensors of its mmproj file.

The names are those of tools/mtmd/clip-impl.h in llama.cpp, and the graph is tools/mtmd/models/llava.cpp. Its projector
type "mlp" takes SigLIP and CLIP: blocks, final norm if there is one, Linear, GELU, Linear.
"""

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from configuration_minivlm import MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration

TOWERS = ("siglip_vision_model", "clip_vision_model")
# transformers' activation -> setting of llama.cpp. It computes GELU by tanh, from which exact GELU differs by 5e-4 at
# most. Without a setting it takes quick GELU.
ACTIVATIONS = {
    "gelu": {"use_gelu": True},
    "gelu_new": {"use_gelu": True},
    "gelu_pytorch_tanh": {"use_gelu": True},
    "quick_gelu": {},
    "silu": {"use_silu": True},
}
PROJECTOR_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")  # the graph has GELU there
CLASS_TOKEN = (
    "a tower with a class token, whose place it mixes up with those of the patches (ggml-org/llama.cpp issue 25814, "
    "closed without the repair of pull request 25844)"
)
OUTER = {  # name in transformers -> name in llama.cpp
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "post_layernorm.weight": "v.post_ln.weight",
    "post_layernorm.bias": "v.post_ln.bias",
}
PARTS = {  # of a block
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
SWAPPED = {"mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"}


def has_class_token(config: MiniVLMConfig) -> bool:
    """Return whether the tower is one whose class token llama.cpp misplaces."""
    return config.vision_config.model_type == "clip_vision_model"


def beyond_mtmd(config: MiniVLMConfig) -> list[str]:
    """Return the settings of tower and projector that the mmproj file cannot express, a phrase each."""
    vision, problems = config.vision_config, []
    if vision.model_type not in TOWERS:
        problems.append(f"a tower of type {vision.model_type!r} (llama.cpp's LLaVA: SigLIP or CLIP)")
    elif vision.hidden_act not in ACTIVATIONS:
        problems.append(f"hidden_act={vision.hidden_act!r} in the tower (llama.cpp: {', '.join(ACTIVATIONS)})")
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", 1)
    if not (isinstance(size, int) and isinstance(patch, int)):
        problems.append(f"image_size={size} with patch_size={patch} (llama.cpp: squares)")
    if config.projector_type != "mlp" or config.projector_layer_norm or config.pixel_shuffle_factor > 1:
        problems.append(
            f"projector_type={config.projector_type!r} with projector_layer_norm={config.projector_layer_norm} and "
            f"pixel_shuffle_factor={config.pixel_shuffle_factor} (llama.cpp: 'mlp', False, 1)"
        )
    if config.projector_hidden_act not in PROJECTOR_ACTIVATIONS:
        problems.append(f"projector_hidden_act={config.projector_hidden_act!r} (llama.cpp: 'gelu')")
    if has_class_token(config) and config.vision_feature_select_strategy == "full":
        problems.append("vision_feature_select_strategy='full' (llama.cpp drops the class token: 'default')")
    return problems


def edges(size) -> set[int]:
    """Return the numbers of a size such as {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    return {edge for edge in dict(size or {}).values() if edge is not None}


def beyond_preprocessing(processor: ProcessorMixin, vision: PreTrainedConfig) -> list[str]:
    """Return the settings of the image processor that llama.cpp does not follow, a phrase each."""
    pictures, side = processor.image_processor, vision.image_size
    steps = ("do_resize", "do_rescale", "do_normalize")
    problems = [f"{name}=False (llama.cpp: True)" for name in steps if not getattr(pictures, name)]
    if edges(pictures.size) != {side} or (pictures.do_center_crop and edges(pictures.crop_size) != {side}):
        problems.append(f"pictures of another size than the tower's {side} pixels: size={dict(pictures.size)}")
    if abs(pictures.rescale_factor * 255 - 1) > 1e-6:
        problems.append(f"rescale_factor={pictures.rescale_factor} (llama.cpp: 1/255)")
    return problems


def vision_metadata(config: MiniVLMConfig, processor: ProcessorMixin) -> dict:
    """Return the metadata of the mmproj file, by llama.cpp's names."""
    vision, pictures = config.vision_config, processor.image_processor
    blocks = config.num_vision_layers
    sizes = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": blocks,
        "projection_dim": config.text_config.hidden_size,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "image_mean": [float(value) for value in pictures.image_mean],
        "image_std": [float(value) for value in pictures.image_std],
        # Without this list the graph leaves out the last block of the file.
        "feature_layer": [blocks],
    }
    metadata = {"has_vision_encoder": True, "projector_type": "mlp"} | ACTIVATIONS[vision.hidden_act]
    metadata |= {f"vision.{key}": value for key, value in sizes.items()}
    return {f"clip.{key}": value for key, value in metadata.items()}


def vision_tensors(model: MiniVLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the weights of tower and projector, by llama.cpp's names."""
    vision, projector = model.config.vision_config, model.model.multi_modal_projector
    # If `ffn_down` has as many inputs as the tower is wide, llama.cpp takes the file for an old one and swaps the two.
    square = vision.hidden_size == vision.intermediate_size
    parts, tensors = PARTS | (SWAPPED if square else {}), {}
    for name, weight in model.model.vision_tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if name in OUTER:
            tensors[OUTER[name]] = weight
            continue
        part, kind = name.removeprefix("encoder.layers.").rsplit(".", 1)
        i, part = part.split(".", 1)
        tensors[f"v.blk.{i}.{parts[part]}.{kind}"] = weight
    for i, layer in ((0, projector.linear_1), (2, projector.linear_2)):
        tensors[f"mm.{i}.weight"] = layer.weight
        # The graph adds a bias in any case.
        tensors[f"mm.{i}.bias"] = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return tensors
