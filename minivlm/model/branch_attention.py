"""Attention over rows that share a picture, by blocks: `attn_implementation="sdpa_branches"`, on a CPU.

`share_prefix` joins such rows: a common beginning, then the rest of each row as a branch. A branch attends to the
beginning and to itself. A dense mask (B, 1, T, T) also computes what one branch would see of the others. Here each
branch gets a causal call of its own, and all branches of a row one call on the beginning. The log-sum-exps of the
scores tell how to join the two.

Branches are read from `position_ids`: the beginning counts from 0, and each branch goes on where the beginning ends.
So the first branch follows the beginning without a restart, and both are one causal block. The attention mask of
`PaddingCollator` says the same and is not read. For other batches this does what `sdpa_packed` does.

Letters in shapes: B rows of a batch, T tokens, H query heads, h width of a head.
"""

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minivlm.model.packed_attention import (
    BACKWARD,
    FORWARD,
    attend,
    attend_backward,
    cut,
    fake_attention,
    fake_gradients,
    find_rows,
    keep,
    packed_attention_forward,
    packed_mask,
    prepare,
)

NAME = "sdpa_branches"


def find_blocks(position_ids: torch.Tensor) -> tuple[list[tuple], list[tuple]]:
    """Return the causal blocks, as `find_rows` does, and (branches, beginning) of each row that shares one.

    Branches and beginning are entries (row of the batch, first token, token behind the last). The first branch is not
    among the branches: its causal block contains the beginning.
    """
    blocks, shared = find_rows(position_ids), []
    for b, start, end in blocks:
        position = int(position_ids[max(b, 0), start])
        if start == 0 or position == 0:
            root = start, end
            continue
        assert root[0] + position <= root[1], f"row {b}: position {position} follows no token"
        if shared and shared[-1][1] == (b, root[0], root[0] + position):
            shared[-1] = (b, root[1], end), shared[-1][1]
        else:
            shared.append(((b, root[1], end), (b, root[0], root[0] + position)))
    return blocks, shared


@torch.library.custom_op("minivlm::branch_attention", mutates_args=())
def branch_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of each token to its branch and its beginning, (B, H, T, h), and the log-sum-exps, (B, T, H).

    Args:
        query, key, value: (B, H, T, h) in one floating-point type. Scores are divided by the square root of h.
        position_ids: (B, T), see above.
    """
    blocks, shared = find_blocks(position_ids)
    output, sums = attend(query, key, value, blocks)
    for branches, beginning in shared:
        part, total = FORWARD(cut(query, branches), cut(key, beginning), cut(value, beginning), 0.0, False)
        own, own_total = cut(output, branches), cut(sums.transpose(1, 2), branches)
        share = torch.sigmoid(total - own_total)[..., None]  # of the beginning in the softmax of both
        own.copy_(torch.lerp(own.to(share.dtype), part.to(share.dtype), share))
        own_total.copy_(torch.logaddexp(own_total, total))
    return output, sums


@torch.library.custom_op("minivlm::branch_attention_backward", mutates_args=())
def branch_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, each (B, H, T, h).

    The kernel takes output and log-sum-exp of all that a token attends to, and gives the gradient by some of the keys.
    """
    blocks, shared = find_blocks(position_ids)
    grads = attend_backward(blocks, grad, query, key, value, output, sums)
    for branches, beginning in shared:
        d, q, out, total = (cut(x, branches) for x in (grad, query, output, sums.transpose(1, 2)))
        parts = BACKWARD(d, q, cut(key, beginning), cut(value, beginning), out, total, 0.0, False)
        for whole, part, place in zip(grads, parts, (branches, beginning, beginning)):
            cut(whole, place).add_(part)
    return grads


def _backward(ctx, grad, _):
    return *branch_attention_backward(grad, *ctx.saved_tensors), None


branch_attention.register_fake(fake_attention)
branch_attention_backward.register_fake(fake_gradients)
branch_attention.register_autograd(_backward, setup_context=keep)


def branch_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend as transformers' attention interface asks: (B, H, T, h) in, (B, T, H, h) and no weights out.

    Raises:
        ValueError: rows that share a picture with dropout, which the kernel does not have.
    """
    positions = kwargs.get("position_ids")
    T = query.shape[2]
    whole = attention_mask is not None and attention_mask.dtype.is_floating_point and positions is not None
    if not whole or T == 1 or key.shape[2] != T or query.device.type != "cpu":
        return packed_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"attn_implementation={NAME!r} has no dropout. Set attention_dropout to 0, or use 'sdpa'.")
    output, _ = branch_attention(*prepare(module, query, key, value, scaling), positions.expand(query.shape[0], T))
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, branch_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
