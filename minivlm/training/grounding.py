"""Teach attention to look at what words name.

A question such as "Is this a cat?" has to be compared with the picture. The loss on its answer, one token of many,
does not lead a small decoder there: after 450 steps of the demo it still guesses. With this loss nine of ten answers
are right. One head of one block learns to attend from the last token of a phrase to the image tokens that show what it
names or, if the picture does not show it, to anything but the picture. One head of a later block learns to attend from
where the answer begins to the phrase that it depends on, and one of a still later block from there to the place that
the answer is about ("what is left of the cat?"). The model itself is not changed.

Supervised attention is as old as attention in translation (arXiv 1609.04186) and in answers about pictures
(arXiv 1709.06308).
"""

import math

import torch
import torch.nn.functional as F

from minivlm.data.phrases import ANSWER, PLACES
from modeling_minivlm import rotate


def taught_blocks(blocks: int) -> tuple[int, int, int]:
    """Return the blocks whose first head searches the picture, reads the phrase, and looks where the answer is."""
    return blocks // 4, blocks // 2, 3 * blocks // 4


def check_grounding(model) -> None:
    """Raise ValueError for a model that `grounding_loss` cannot teach."""
    config, tokens = model.config.text_config, model.config.image_seq_length
    if config.model_type != "minivlm_text" or config.num_hidden_layers < 3:
        raise ValueError(
            "--grounding_loss needs a decoder of type minivlm_text with three blocks or more. This one is of type "
            f"{config.model_type} with {config.num_hidden_layers}. Leave the option out."
        )
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(
            f"--grounding_loss needs a square grid of image tokens, not {tokens} of them. Leave the option out."
        )


def attention_of_first_head(decoder, number: int, hidden_states, tensors, row, token) -> torch.Tensor:
    """Return the logarithm of what the first head of block `number` attends to from some tokens, (n, T), in fp32.

    Computed again from the block's input, so it does not matter which attention function the model uses.

    Args:
        hidden_states: inputs of all blocks, each (B, T, D).
        tensors: the batch; its rows must have `position_ids`.
        row, token: the tokens, (n,) each.
    """
    layer = decoder.layers[number]
    attention, x = layer.self_attn, layer.input_layernorm(hidden_states[number])  # (B, T, D)
    first = slice(attention.head_dim)

    def project(linear, norm, x):
        return norm(F.linear(x, linear.weight[first], linear.bias[first] if linear.bias is not None else None))

    cos, sin = decoder.rotary_emb(x, tensors["position_ids"])  # (B, T, h)
    keys = rotate(project(attention.k_proj, attention.k_norm, x), cos, sin)[row]  # (n, T, h)
    queries = rotate(project(attention.q_proj, attention.q_norm, x[row, token]), cos[row, token], sin[row, token])
    scores = torch.einsum("nth,nh->nt", keys, queries).float() * attention.scaling
    if "attention_mask" in tensors:
        scores = scores + tensors["attention_mask"][row, 0, token]
    else:
        later = torch.arange(scores.shape[1], device=scores.device) > token[:, None]
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)


def grounding_loss(model, hidden_states: tuple[torch.Tensor, ...], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a scalar: minus the logarithm of the attention that goes where it should, summed over phrases and heads.

    Args:
        model: `MiniVLMForConditionalGeneration`; each row of the batch has one picture.
        hidden_states: inputs of all blocks, each (B, T, D).
        tensors: the batch; its `grounding` (n, 3 + I) is described in `PaddingCollator`.
    """
    decoder = model.model.language_model
    search, read, look = taught_blocks(len(decoder.layers))
    row, token, start = tensors["grounding"][:, :PLACES].unbind(1)
    covered = tensors["grounding"][:, PLACES:].bool()  # (n, I)
    is_image = tensors["input_ids"][row] == model.config.image_token_id  # (n, T)
    is_right = torch.where(covered.any(1)[:, None], False, ~is_image).masked_scatter(is_image, covered)

    def attention(block, kept, tokens):
        return attention_of_first_head(decoder, block, hidden_states, tensors, row[kept], tokens[kept])

    loss = torch.zeros((), device=row.device)
    for block, kept in ((search, start != ANSWER), (look, start == ANSWER)):
        if kept.any():
            found = attention(block, kept, token).masked_fill(~is_right[kept], -math.inf)
            loss = loss - found.logsumexp(1).sum()
    if (is_read := start > 0).any():
        loss = loss - attention(read, is_read, start).gather(1, token[is_read][:, None]).sum()
    return loss
