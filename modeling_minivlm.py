"""MiniVLM: a vision tower, a projector and a small causal decoder, written to be read once from top to bottom.

    picture -> vision tower -> projector -> written over the image-token embeddings -> decoder -> LM head -> text

Shapes in trailing comments use: B batch, T tokens, S cached + new tokens, N pictures in the batch, P patches of a
picture, I image tokens of a picture, V width of the tower, D width of the decoder, Hq and Hkv query and key-value
heads, h width of a head.
"""

import inspect
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

try:
    from .configuration_minivlm import MiniVLMConfig, MiniVLMTextConfig
except ImportError:  # a checkout or `pip install` imports these files as top-level modules
    from configuration_minivlm import MiniVLMConfig, MiniVLMTextConfig

KNOWN_KEYWORDS = {*TransformersKwargs.__annotations__, "use_cache", "return_dict", "shift_labels", "ignore_index"}
KNOWN_KEYWORDS.add("tokenizer")  # `generate` passes it on with `stop_strings`
# transformers 5.24 says `cache` in outputs and in `generate`. Up to 5.23 that is `past_key_values`, and `cache` is a
# keyword of paged attention functions, which must reach them.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class MiniVLMRMSNorm(nn.Module):
    """Root-mean-square norm without mean or bias, computed in fp32 (arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)


class MiniVLMRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (arXiv 2104.09864), `head_dim` wide.

    The name, `original_inv_freq`, `rope_type` and `compute_default_rope_parameters` are what transformers looks for to
    fill the buffers again after loading through the meta device; without them they hold uninitialised memory.
    """

    def __init__(self, config: MiniVLMTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        default = self.rope_type == "default"
        init = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = init(config)  # (h / 2,)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # "dynamic" changes the frequencies when a sequence is longer than the model was trained for
    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)  # (B, T, h / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, h)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x, cos, sin):
    """Rotate pair (i, i + h / 2) of each head by its position's angle i."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(Q K^T * scaling + mask) V; `key` and `value` are repeated for the query heads that share them."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, Hq, S, h)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, Hq, S, h)
    weights = query @ key.transpose(2, 3) * scaling  # (B, Hq, T, S)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, T, Hq, h)


class MiniVLMAttention(nn.Module):
    """Grouped-query attention, RMS norm on each query and key head (Qwen3, arXiv 2505.09388, section 2)."""

    def __init__(self, config: MiniVLMTextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.q_norm = MiniVLMRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = MiniVLMRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        past_key_values = kwargs.pop(CACHE, past_key_values)
        B, T, _ = hidden_states.shape
        heads = (B, T, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, Hq, T, h)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, Hkv, T, h)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # (B, Hkv, T, h)
        cos, sin = (c.unsqueeze(1) for c in position_embeddings)  # (B, 1, T, h)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            # A paged cache (5.24) writes into `kwargs` what its attention function needs; other caches ignore them.
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, Hkv, S, h)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # (B, T, Hq, h)
        return self.o_proj(output.reshape(B, T, -1)), weights  # (B, T, D)


class MiniVLMMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, equation 6, without biases)."""

    def __init__(self, config: MiniVLMTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MiniVLMDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MiniVLMTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MiniVLMAttention(config, layer_idx)
        self.mlp = MiniVLMMLP(config)
        self.input_layernorm = MiniVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniVLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MiniVLMPreTrainedModel(PreTrainedModel):
    config_class = MiniVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniVLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def take_cache(self, kwargs, past_key_values):
        """Return the cache, under either name; refuse keywords that all parts of the model would ignore."""
        config = getattr(self.config, "text_config", self.config)
        past_key_values = kwargs.pop(CACHE, past_key_values)
        unknown = [name for name, value in kwargs.items() if value is not None and name not in KNOWN_KEYWORDS]
        # Continuous batching (its cache is no `Cache`) and engines bring attention functions with own keywords.
        paged = not isinstance(kwargs.get("cache", past_key_values), Cache | None)
        if unknown and not paged and config._attn_implementation.startswith(("eager", "sdpa", "flex", "flash")):
            decoder = getattr(self.base_model, "language_model", self.base_model)
            attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager_attention_forward)
            taken = {*inspect.signature(decoder.forward).parameters, *inspect.signature(attend).parameters}
            known = sorted({*taken, *KNOWN_KEYWORDS, *inspect.signature(self.forward).parameters})
            for name in set(unknown) - taken:
                near = "".join(f" Did you mean {word!r}?" for word in get_close_matches(name, known, n=1))
                raise TypeError(f"{type(self).__name__} takes no keyword {name!r}.{near}")
        return past_key_values


class MiniVLMTextModel(MiniVLMPreTrainedModel):
    """The decoder without its LM head: token ids or embeddings in, final hidden states out.

    Rows packed one after another into (1, T) stay separate if `position_ids` restart at 0 for each of them,
    `attention_mask` is None and `use_cache` is False.
    """

    config_class = MiniVLMTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": MiniVLMDecoderLayer, "attentions": MiniVLMAttention}

    def __init__(self, config: MiniVLMTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MiniVLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiniVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniVLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        past_key_values = self.take_cache(kwargs, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, D)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + cached)[None]  # (1, T)
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        hidden_states = inputs_embeds
        kwargs["position_embeddings"] = self.rotary_emb(hidden_states, position_ids)
        kwargs |= {"attention_mask": causal_mask, "position_ids": position_ids, "use_cache": use_cache}
        kwargs[CACHE] = past_key_values  # by this name gradient checkpointing finds the cache and leaves it out
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)  # positional: the capture of hidden states reads `args[0]`
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values if use_cache else None)


class MiniVLMMultiModalProjector(nn.Module):
    """Carry patch features from the tower's width to the decoder's, optionally folding r x r patches into one."""

    def __init__(self, config: MiniVLMConfig):
        super().__init__()
        self.factor, self.grid = config.pixel_shuffle_factor, config.patch_grid
        width_in = config.vision_hidden_size * self.factor**2
        width_out, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.layer_norm = nn.LayerNorm(width_in) if config.projector_layer_norm else nn.Identity()
        self.linear_1 = nn.Linear(width_in, width_out, bias=bias)
        if config.projector_type == "mlp":
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(width_out, width_out, bias=bias)
        else:
            self.act, self.linear_2 = nn.Identity(), nn.Identity()

    def forward(self, features):
        if self.factor > 1:
            (rows, columns), r = self.grid, self.factor
            x = features.unflatten(1, (rows // r, r, columns // r, r))  # (N, rows / r, r, columns / r, r, V)
            features = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (N, I, r * r * V)
        return self.linear_2(self.act(self.linear_1(self.layer_norm(features))))  # (N, I, D)


def build_vision_tower(config: MiniVLMConfig) -> PreTrainedModel:
    """Build the tower without what no feature depends on: later blocks, the unread final norm, the pooling head.

    A part that is built but not used gets no gradient, which hangs distributed training, and costs time for nothing.
    """
    tower = AutoModel.from_config(config.vision_config)
    depth = config.vision_depth
    blocks = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if blocks is None:
        kind = config.vision_config.model_type
        raise ValueError(
            f"A tower of type {kind!r} has no list of {depth} blocks. Use CLIP, SigLIP, DINO, ViT or ResNet."
        )
    del blocks[config.num_vision_layers :]
    unused = ["head", "pooler"]
    # The final norm of these acts on the pooled feature alone; in other towers it acts on the output that is read.
    pooled_norm = config.is_convolutional or config.vision_config.model_type == "clip_vision_model"
    if config.vision_feature_layer is not None or pooled_norm:
        unused += ["post_layernorm", "layernorm", "norm"]
    for name in unused:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, nn.Identity())
    for module in tower.modules():  # DINO's mask token serves its own pretraining: kept, but as nothing that learns
        if isinstance(mask_token := getattr(module, "mask_token", None), nn.Parameter):
            del module.mask_token
            module.register_buffer("mask_token", mask_token.data)
    return tower


@dataclass
class MiniVLMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states`: projected picture features, (N, I, D). `router_logits`: if asked for and the decoder is a
    mixture of experts, (B * T, experts) per block."""

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


@dataclass
class MiniVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` (), `logits` (B, T, vocabulary), `image_hidden_states` (N, I, D); the rest as in transformers."""

    image_hidden_states: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None


class MiniVLMModel(MiniVLMPreTrainedModel):
    """Tower, projector and decoder without the LM head. All pictures of a batch come in one (N, 3, H, W) tensor.

    Pictures belong to the runs of image tokens in reading order: row after row, and left to right within a row.
    """

    def __init__(self, config: MiniVLMConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config)
        self.multi_modal_projector = MiniVLMMultiModalProjector(config)
        if config.text_config.model_type == "minivlm_text":  # not through AutoModel: a folder's config class is a copy
            self.language_model = MiniVLMTextModel._from_config(config.text_config)
        else:
            self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True):
        """Set the mode of all modules; a frozen tower and all batch norms stay in evaluation mode.

        Batch norms keep the statistics that their tower came with. Otherwise a picture would depend on its neighbours.
        """
        super().train(mode)
        frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        for module in self.vision_tower.modules():
            if frozen or isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode pictures (N, 3, H, W); `pooler_output` of the result holds the decoder's embeddings (N, I, D)."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected (pictures, channels, height, width). "
                "Concatenate the pictures of all rows along the first dimension, in reading order."
            )
        kwargs["return_dict"] = True
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
        outputs.pooler_output = self.multi_modal_projector(self.select_features(outputs.last_hidden_state))
        return outputs

    def select_features(self, features):
        """Return (N, P, V), what the projector reads of a tower's output, which may be a map (N, V, rows, columns)."""
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2)
        if self.config.vision_feature_select_strategy == "default":  # class and register tokens come first
            rows, columns = self.config.patch_grid
            features = features[:, features.shape[1] - rows * columns :]
        return features

    def merge_image_features(self, input_ids, inputs_embeds, features):
        """Write `features` (N, I, D) over the embeddings of the image placeholders, in reading order."""
        if input_ids is None:  # a caller that embedded the tokens: placeholders are rows equal to the image token's
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_image = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)  # (B, T)
        else:
            is_image = input_ids == self.config.image_token_id  # (B, T)
        tokens = is_image.sum()
        torch_compilable_check(
            tokens * features.shape[-1] == features.numel(),
            lambda: (
                f"{int(tokens)} image tokens in the prompt but {features.shape[0] * features.shape[1]} image features "
                f"({features.shape[0]} pictures x {features.shape[1]}). Was the prompt truncated, or built without "
                "the processor?"
            ),
        )
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(inputs_embeds))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> MiniVLMModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        past_key_values = self.take_cache(kwargs, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        features = None
        if mm_encoder_outputs:  # features that a caller computed beforehand
            features = mm_encoder_outputs["image"].pooler_output
        elif pixel_values is not None:
            features = self.get_image_features(pixel_values, return_dict=True).pooler_output  # (N, I, D)
        if features is not None:
            inputs_embeds = self.merge_image_features(input_ids, inputs_embeds, features)
        kwargs |= {CACHE: past_key_values, "return_dict": True}
        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return MiniVLMModelOutputWithPast(**outputs, image_hidden_states=features)


class MiniVLMForConditionalGeneration(MiniVLMPreTrainedModel, GenerationMixin):
    """`MiniVLMModel` with an LM head: logits, loss and `generate`."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MiniVLMConfig):
        super().__init__(config)
        self.model = MiniVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"model.{embeddings}.weight"}  # decoders differ in the name
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MiniVLMCausalLMOutputWithPast:
        """Next-token logits, and the loss if `labels` (B, T) are given; -100 marks tokens without loss.

        Args:
            pixel_values: all pictures of the batch in reading order, (N, 3, H, W).
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`. With an
                argument of this name `generate` repeats pictures row by row for beams, not picture by picture.
            logits_to_keep: compute logits for the last so many positions, or for the given indices; 0 is all. A mask
                (B, T) keeps its K true positions, each row's own: `logits` are (1, K, vocabulary) in reading order. In
                training only answers need the LM head, which is a fifth of a small decoder's work.
            num_items_in_batch: divide the summed loss by this count, e.g. the answer tokens of all ranks.

        Raises:
            ValueError: image tokens and image features differ in number.
            TypeError: a keyword that neither the model nor its attention function takes.
        """
        past_key_values = self.take_cache(kwargs, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
        elif logits_to_keep.ndim == 2:
            hidden_states = hidden_states[logits_to_keep][None]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MiniVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits,
        )


MiniVLMModel.register_for_auto_class("AutoModel")
MiniVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MiniVLMForConditionalGeneration", "MiniVLMModel", "MiniVLMPreTrainedModel", "MiniVLMTextModel"]
