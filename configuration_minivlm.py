"""Configuration of MiniVLM: a vision tower, a projector and a causal decoder.

`MiniVLMConfig` holds two sub-configurations. Any transformers vision configuration may be the tower and any
transformers causal-LM configuration the decoder; the decoder that this repository teaches is `MiniVLMTextConfig`.
"""

from re import findall
from typing import Literal

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

FIRST, LAST = (5, 19), (5, 24)  # the versions of transformers that the tests ran with

if not FIRST <= tuple(map(int, findall(r"\d+", transformers.__version__)[:2])) <= LAST:
    logging.get_logger("transformers").warning_once(  # once per process, however many copies of this file are loaded
        "MiniVLM is tested with transformers {}.{} to {}.{}".format(*FIRST, *LAST)
        + f"; this is {transformers.__version__}, and answers may be wrong. Install a tested version if they are."
    )


@strict
class MiniVLMTextConfig(PreTrainedConfig):
    """The decoder: RMSNorm, RoPE over `head_dim`, grouped-query attention with QK-norm, SwiGLU.

    Field names and semantics are those of Qwen3 (arXiv 2505.09388) and of MiniMind-3, so weights move by name.
    The defaults are MiniMind-3V's decoder: 768 wide, 8 blocks, 8 query heads and 4 key-value heads of 96.

    Args:
        head_dim: width of one attention head; RoPE rotates exactly this width. Defaults to
            `hidden_size // num_attention_heads`, and may differ from it.
        rope_parameters: `{"rope_type": "default" | "linear" | "dynamic" | "yarn", "rope_theta": ..., "factor": ...}`.

    Raises:
        StrictDataclassClassValidationError: an odd `head_dim`, or query heads that key-value heads do not divide.
    """

    model_type = "minivlm_text"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 6400
    hidden_size: int = 768
    intermediate_size: int = 2432
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size`={self.hidden_size} is not a multiple of `num_attention_heads`="
                    f"{self.num_attention_heads}. Change one of them, or give `head_dim`."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if self.head_dim % 2:
            raise ValueError(f"`head_dim`={self.head_dim} is odd, but RoPE rotates pairs. Use an even `head_dim`.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads`={self.num_attention_heads} is not a multiple of `num_key_value_heads`="
                f"{self.num_key_value_heads}. Choose a divisor of {self.num_attention_heads}."
            )


# A composite config finds its sub-configs by model type. "minivlm" itself is never registered: with it, loading with
# `trust_remote_code=False` would stop refusing.
AutoConfig.register("minivlm_text", MiniVLMTextConfig, exist_ok=True)

CONVOLUTIONAL_TOWERS = ("resnet", "convnext", "convnextv2")  # their output is a feature map (N, V, rows, columns)
# Vision towers whose output starts with no class token; the others have one, and `num_register_tokens` after it.
TOWERS_WITHOUT_CLASS_TOKEN = ("siglip_vision_model", *CONVOLUTIONAL_TOWERS)


def sub_config(value: dict | PreTrainedConfig | None, model_type: str, **defaults) -> PreTrainedConfig:
    """Return `value` as a configuration; a dict names its class by `model_type`, None asks for the defaults."""
    if value is None:
        return AutoConfig.for_model(model_type, **defaults)
    if isinstance(value, dict):
        value = dict(value)
        return AutoConfig.for_model(value.pop("model_type", model_type), **value)
    return value


@strict
class MiniVLMConfig(PreTrainedConfig):
    """A vision-language model: picture -> tower -> projector -> written over the image tokens -> decoder.

    Args:
        vision_config: any transformers vision configuration, default CLIP ViT-B/16 at 224 px. A ResNet or ConvNeXt
            also needs `image_size`, which transformers leaves open; its last feature map takes the place of patches.
        text_config: any transformers causal-LM configuration, default `MiniVLMTextConfig`.
        image_token_id: id of the placeholder token; one placeholder stands for one image feature.
        vision_feature_layer: which hidden state of the tower is read, counted as in LLaVA (0 is the embedding output,
            -1 the last block before the tower's final norm, -2 the one before). Blocks after it are not built. `None`
            reads the tower's own output, final norm included where the tower has one; a convolutional tower needs it.
        vision_feature_select_strategy: "default" drops class and register tokens, "full" keeps all tokens.
        projector_type: "mlp" is LLaVA-1.5's two-layer MLP (arXiv 2310.03744), "linear" one matrix (MiniMind2-V).
        projector_layer_norm: put a LayerNorm before the projector, as MiniMind-3V does.
        pixel_shuffle_factor: fold squares of r x r patches into one image token (arXiv 2404.16821, section 3.2); each
            picture then costs r * r times fewer tokens.
        tie_word_embeddings: share the LM head with the token embeddings; default: what `text_config` says.

    Raises:
        StrictDataclassClassValidationError: a combination that cannot work, with value, limit and remedy.
    """

    model_type = "minivlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 12
    vision_feature_layer: int | None = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_type: Literal["mlp", "linear"] = "mlp"
    projector_hidden_act: str = "gelu"
    projector_layer_norm: bool = False
    multimodal_projector_bias: bool = True
    pixel_shuffle_factor: int = 1
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = sub_config(self.vision_config, "clip_vision_model", patch_size=16)
        self.text_config = sub_config(self.text_config, "minivlm_text")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings  # serving engines read it there
        super().__post_init__(**kwargs)
        self.auto_map = {  # saving adds the entry of the class that is saved only; a repository needs all of them
            "AutoConfig": "configuration_minivlm.MiniVLMConfig",
            "AutoModel": "modeling_minivlm.MiniVLMModel",
            "AutoModelForCausalLM": "modeling_minivlm.MiniVLMForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_minivlm.MiniVLMForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_minivlm.MiniVLMForConditionalGeneration",
            "AutoProcessor": "processing_minivlm.MiniVLMProcessor",
        }

    @property
    def is_convolutional(self) -> bool:
        """True if the tower's output is a feature map, not a sequence of patches."""
        return self.vision_config.model_type in CONVOLUTIONAL_TOWERS

    @property
    def vision_hidden_size(self) -> int:
        """Width of the tower's features."""
        return self.vision_config.hidden_sizes[-1] if self.is_convolutional else self.vision_config.hidden_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the tower's patches, or of the places of a convolutional tower's last feature map."""
        vision = self.vision_config
        size, patch = vision.image_size, getattr(vision, "patch_size", 4)  # the stem of a ResNet halves twice
        if self.is_convolutional:
            patch *= 2 ** (len(vision.hidden_sizes) - 1) * (1 + getattr(vision, "downsample_in_first_stage", False))
        height, width = (size, size) if isinstance(size, int) else size
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        return height // patch_height, width // patch_width

    @property
    def image_seq_length(self) -> int:
        """Image tokens per picture."""
        rows, columns = self.patch_grid
        tokens = rows * columns // self.pixel_shuffle_factor**2
        if self.vision_feature_select_strategy == "full":
            if self.vision_config.model_type not in TOWERS_WITHOUT_CLASS_TOKEN:
                tokens += 1 + getattr(self.vision_config, "num_register_tokens", 0)
        return tokens

    @property
    def vision_depth(self) -> int:
        """Blocks of a transformer tower, stages of a convolutional one."""
        return len(self.vision_config.depths) if self.is_convolutional else self.vision_config.num_hidden_layers

    @property
    def num_vision_layers(self) -> int:
        """Blocks of the tower that are needed for `vision_feature_layer`."""
        if self.vision_feature_layer is None:
            return self.vision_depth
        return self.vision_feature_layer + (self.vision_depth + 1 if self.vision_feature_layer < 0 else 0)

    def validate_architecture(self):
        vision, text = self.vision_config, self.text_config
        if self.is_convolutional:
            self._check_feature_map()
        missing = [name for name in ("image_size", "patch_size", "num_hidden_layers") if not hasattr(vision, name)]
        if missing and not self.is_convolutional:
            raise ValueError(
                f"`vision_config` of type {vision.model_type!r} has no {', '.join(missing)}: it is not a vision "
                "transformer. Use a CLIP, SigLIP, DINO, ViT, ResNet or ConvNeXt vision configuration."
            )
        if not hasattr(text, "vocab_size"):
            raise ValueError(
                f"`text_config` of type {text.model_type!r} has no vocab_size: it is not a causal decoder. Use the "
                "configuration of a language model, or the `text_config` of a multimodal one."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"`image_token_id`={self.image_token_id} is outside the vocabulary of {text.vocab_size} entries. "
                "Add the image token to the tokenizer and resize the embeddings, or correct the id."
            )
        if not 1 <= self.num_vision_layers <= self.vision_depth:
            raise ValueError(
                f"`vision_feature_layer`={self.vision_feature_layer} does not name a block of a tower with "
                f"{self.vision_depth}. Use 1 to {self.vision_depth}, "
                f"-{self.vision_depth} to -1, or None for the tower's output."
            )
        if self.pixel_shuffle_factor < 1:
            raise ValueError(f"`pixel_shuffle_factor`={self.pixel_shuffle_factor} must be 1 (off) or more.")
        rows, columns = self.patch_grid
        if rows % self.pixel_shuffle_factor or columns % self.pixel_shuffle_factor:
            raise ValueError(
                f"`pixel_shuffle_factor`={self.pixel_shuffle_factor} does not divide the {rows} x {columns} patch "
                f"grid (image_size {vision.image_size} / patch_size {vision.patch_size}). Use a divisor of the grid."
            )
        if self.pixel_shuffle_factor > 1 and self.vision_feature_select_strategy == "full":
            raise ValueError(
                "`pixel_shuffle_factor` above 1 folds a square grid of patches, but "
                '`vision_feature_select_strategy`="full" keeps the class token. Use "default".'
            )

    def _check_feature_map(self):
        vision = self.vision_config
        if getattr(vision, "image_size", None) is None:
            raise ValueError(
                f"`vision_config` of type {vision.model_type!r} has no image_size, which decides the number of image "
                "tokens. Add it, in pixels."
            )
        if self.vision_feature_layer is not None:
            raise ValueError(
                f"`vision_feature_layer`={self.vision_feature_layer} names a block, but a tower of type "
                f"{vision.model_type!r} has stages with maps of different sizes. Use None, which reads the last map."
            )


MiniVLMConfig.register_for_auto_class()  # `save_pretrained` copies this file and writes `auto_map`

__all__ = ["MiniVLMConfig", "MiniVLMTextConfig"]
