"""Attention over packed rows on a CPU, at the cost of the rows: `attn_implementation="sdpa_packed"`.

Rows that stand one after another in a single row of a batch must not see each other. With `sdpa` transformers builds a
mask (B, 1, T, T) for this, so the work grows with the square of a pack's length. Here each row gets a call of its own
to PyTorch's causal attention kernel; where the rows begin is read from `position_ids`, which restart there. A
registered operator hides the loop from `torch.compile`, so another number of rows compiles nothing anew.

Importing this module registers the implementation for all models of transformers that use its attention interface.
Where a mask is needed all the same (padding on the left, a cache, a sliding window), it does what `sdpa` does.

Letters in shapes: B rows of a batch, T tokens, H query heads, h width of a head.
"""

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_packed"
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def find_rows(position_ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return (row of the batch, first token, token behind the last) of each packed row; `position_ids` is (B, T).

    A batch in which nothing is packed is one entry (-1, 0, T), which stands for all its rows.
    """
    B, T = position_ids.shape
    restarts = position_ids.diff(dim=-1) != 1
    if not restarts.any():
        return [(-1, 0, T)]
    found = []
    for b in range(B):
        edges = [0, *(restarts[b].nonzero().flatten() + 1).tolist(), T]
        found += [(b, start, end) for start, end in zip(edges, edges[1:])]
    return found


def cut(x: torch.Tensor, row: tuple[int, int, int]) -> torch.Tensor:
    """Return the part of x (B, H, T, ...) that belongs to an entry of `find_rows`, as a view."""
    b, start, end = row
    return x[:, :, start:end] if b < 0 else x[b : b + 1, :, start:end]


def like_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor (B, H, T, h) whose memory holds one token after another, as the next layer reads it."""
    B, H, T, h = x.shape
    return x.new_empty(B, T, H, h).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: list[tuple]) -> tuple:
    """Return causal attention within each entry of `find_rows`, (B, H, T, h), and the log-sum-exps, (B, T, H)."""
    output, sums = fake_attention(query)
    for row in rows:
        part, total = FORWARD(*(cut(x, row) for x in (query, key, value)), 0.0, True)
        cut(output, row).copy_(part)
        cut(sums.transpose(1, 2), row).copy_(total)
    return output, sums


def attend_backward(rows: list[tuple], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of query, key and value by `attend`; `tensors` are those of `packed_attention_backward`."""
    grads, (*tokens, sums) = fake_gradients(*tensors), tensors
    for row in rows:
        inputs = [cut(x, row) for x in (*tokens, sums.transpose(1, 2))]
        for whole, part in zip(grads, BACKWARD(*inputs, 0.0, True)):
            cut(whole, row).copy_(part)
    return grads


def fake_attention(query: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty tensors of the shapes and types of an attention's output and log-sum-exps."""
    B, H, T, _ = query.shape
    return like_tokens(query), query.new_empty(B, T, H, dtype=torch.promote_types(query.dtype, torch.float32))


def fake_gradients(grad, query, key, value, *_) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty tensors of the shapes and types of the gradients of query, key and value."""
    return like_tokens(query), like_tokens(key), like_tokens(value)


def keep(ctx, inputs, output) -> None:
    """Save for the backward pass what an operator took and returned, the position ids last."""
    *inputs, position_ids = inputs
    ctx.save_for_backward(*inputs, *output, position_ids)


@torch.library.custom_op("minivlm::packed_attention", mutates_args=())
def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal attention within each packed row, (B, H, T, h), and the log-sum-exp of its scores, (B, T, H).

    Scores are divided by the square root of h.

    Args:
        query, key, value: (B, H, T, h) in one floating-point type.
        position_ids: (B, T), which restart where a row begins.
    """
    return attend(query, key, value, find_rows(position_ids))


@torch.library.custom_op("minivlm::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, each (B, H, T, h)."""
    return attend_backward(find_rows(position_ids), grad, query, key, value, output, sums)


def _backward(ctx, grad, _):
    return *packed_attention_backward(grad, *ctx.saved_tensors), None


packed_attention.register_fake(fake_attention)
packed_attention_backward.register_fake(fake_gradients)
packed_attention.register_autograd(_backward, setup_context=keep)


def prepare(module, query, key, value, scaling) -> list[torch.Tensor]:
    """Return query, key and value as the operators take them: a head of keys for each of the queries', scaled."""
    groups, h = getattr(module, "num_key_value_groups", 1), query.shape[-1]
    if scaling is not None and scaling != h**-0.5:
        query = query * (scaling * h**0.5)
    inputs = [query, repeat_kv(key, groups), repeat_kv(value, groups)]
    if torch.is_autocast_enabled("cpu"):  # SDPA is on autocast's list; an operator of our own is not
        inputs = [x.to(torch.get_autocast_dtype("cpu")) for x in inputs]
    return inputs


def packed_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend as transformers' attention interface asks: (B, H, T, h) in, (B, T, H, h) and no weights out.

    Raises:
        ValueError: packed rows with dropout, which the kernel does not have.
    """
    positions = kwargs.get("position_ids")
    B, _, T, _ = query.shape
    own = (
        attention_mask is None and positions is not None and T > 1 and key.shape[2] == T and query.device.type == "cpu"
    )
    if not own or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attn_implementation={NAME!r} has no dropout. Set attention_dropout to 0, or use 'sdpa'.")
    output, _ = packed_attention(*prepare(module, query, key, value, scaling), positions.expand(B, T))
    return output.transpose(1, 2), None


def packed_mask(*args, attention_mask=None, local_size=None, **kwargs):
    """Return no mask for causal rows without padding, packed or not; otherwise that of `sdpa`."""
    is_plain = attention_mask is None and local_size is None and not kwargs.get("use_vmap")
    lengths = kwargs.get("q_length"), kwargs.get("kv_length")
    on_cpu = torch.device(kwargs.get("device", "cpu")).type == "cpu"
    if is_plain and on_cpu and lengths[0] == lengths[1] and not kwargs.get("allow_is_bidirectional_skip"):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)


def use_packed_attention(decoder: PreTrainedModel) -> None:
    """Let a decoder on a CPU that uses `sdpa` attend row by row; others stay as they are."""
    config = decoder.config
    if config._attn_implementation == "sdpa" and not getattr(config, "attention_dropout", 0):
        decoder.set_attn_implementation(NAME)
