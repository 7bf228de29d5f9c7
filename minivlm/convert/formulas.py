"""Compute MiniMind's logits by its published formulas, from the tensors of its own files under their own names.

The code shares nothing with the model that a conversion makes, so that one can check the other. It is simple, not
fast: no cache, no batch, a loop over layers and experts.

Letters: T tokens, D width, h width of a head, N pictures, P patches, V width of the tower.
"""

import torch
from torch.nn.functional import gelu, layer_norm, linear, silu


def rms_norm(x, weight, eps):
    """Normalise by the root mean square (arXiv 1910.07467, equation 4)."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rope(x, theta):
    """Rotate x (T, heads, h) by its positions, in the rotate-half form of arXiv 2104.09864."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** -(torch.arange(half) / half)  # (T, h / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def attention(x, tensors, prefix, config):
    """Apply causal grouped-query attention to x (T, D), with QK-norm if the file has its weights."""
    T, h = len(x), config.head_dim

    def heads(name):  # (T, heads, h)
        projected = linear(x, tensors[f"{prefix}{name}_proj.weight"]).view(T, -1, h)
        norm = tensors.get(f"{prefix}{name}_norm.weight")
        return projected if norm is None else rms_norm(projected, norm, config.rms_norm_eps)

    theta = config.rope_parameters["rope_theta"]
    query, key, value = rope(heads("q"), theta), rope(heads("k"), theta), heads("v")
    group = query.shape[1] // key.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs = []
    for i in range(query.shape[1]):
        scores = query[:, i] @ key[:, i // group].T / h**0.5
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value[:, i // group])
    return linear(torch.cat(outputs, dim=-1), tensors[f"{prefix}o_proj.weight"])


def swiglu(x, tensors, prefix):
    """Apply the gated MLP of arXiv 2002.05202, equation 6, without biases."""
    gate, up, down = (tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def feed_forward(x, tensors, prefix, config):
    """Apply SwiGLU, or the experts with the largest router shares of each token, weighted by these shares."""
    router = tensors.get(f"{prefix}gate.weight")
    if router is None:
        return swiglu(x, tensors, prefix)
    shares, chosen = linear(x, router).softmax(-1).topk(config.num_experts_per_tok)
    if config.norm_topk_prob:
        shares = shares / shares.sum(-1, keepdim=True)
    output = torch.zeros_like(x)
    for t in range(len(x)):
        for share, expert in zip(shares[t], chosen[t].tolist()):
            output[t] += share * swiglu(x[t], tensors, f"{prefix}experts.{expert}.")
    return output


def project(features, tensors):
    """Project tower features (..., V) to (..., D): by LayerNorm and a GELU MLP, or by MiniMind2-V's one matrix."""
    if "vision_proj.vision_proj.0.weight" in tensors:
        return linear(features, tensors["vision_proj.vision_proj.0.weight"], tensors["vision_proj.vision_proj.0.bias"])
    (norm, norm_bias), first, second = (
        (tensors[f"vision_proj.mlp.{i}.weight"], tensors[f"vision_proj.mlp.{i}.bias"]) for i in (0, 1, 3)
    )
    x = layer_norm(features, norm.shape, norm, norm_bias)
    return linear(gelu(linear(x, *first)), *second)


def logits(tensors, config, ids, image_token_id=None, features=None):
    """Return logits (T, vocabulary) of the tokens `ids` (T,); image tokens are replaced by `features` (N, P, V)."""
    is_image = ids == image_token_id if features is not None else torch.zeros_like(ids, dtype=torch.bool)
    x = tensors["model.embed_tokens.weight"][ids.masked_fill(is_image, 0)]
    if features is not None:
        x[is_image] = project(features, tensors).flatten(0, 1)
    eps = config.rms_norm_eps
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, tensors[layer + "input_layernorm.weight"], eps)
        x = x + attention(normed, tensors, layer + "self_attn.", config)
        normed = rms_norm(x, tensors[layer + "post_attention_layernorm.weight"], eps)
        x = x + feed_forward(normed, tensors, layer + "mlp.", config)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return linear(rms_norm(x, tensors["model.norm.weight"], eps), head)
