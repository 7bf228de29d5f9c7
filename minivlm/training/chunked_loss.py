"""Compute LM head and loss for some tokens at a time: logits of a large vocabulary need the most memory of a step.

The gradients are computed beside the loss, so that nothing as long as the vocabulary waits for the backward pass, and
no product is computed twice. Their scale is known only there: the number of answer tokens of all ranks.
"""

import torch

from minivlm.data.encoder import IGNORE

LARGEST = 1 << 24  # logits that are computed at once


class ChunkedLoss(torch.autograd.Function):
    """Return the summed loss with the z-loss, which has the gradient, and the summed loss alone.

    Args:
        hidden: (K, D), what the LM head reads.
        weight: (vocabulary, D), of the LM head.
        labels: (K,); `IGNORE` has no loss.
        z: weight of the squared log-partition (arXiv 2204.02311, section 5).
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, z):
        dtype, losses = compute_dtype(hidden), []
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        of_hidden = torch.empty_like(inputs)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        count = max(1, LARGEST // len(weight))
        for x, label, grad in zip(inputs.split(count), labels.split(count), of_hidden.split(count)):
            logits, counted = (x @ matrix.T).float(), label != IGNORE
            partition, label = logits.logsumexp(-1), label.where(counted, 0)[:, None]
            chosen = logits.gather(1, label)[:, 0]
            losses.append(torch.stack([(partition - chosen)[counted].sum(), partition[counted].square().sum()]))
            slope = logits.sub_(partition[:, None]).exp_().mul_(1 + 2 * z * partition[:, None])
            slope.scatter_add_(1, label, torch.full_like(slope[:, :1], -1.0)).mul_(counted[:, None])
            slope = slope.to(dtype)
            grad.copy_(slope @ matrix)
            if of_weight is not None:
                of_weight.add_(slope.T @ x)
        ctx.grads, ctx.dtypes = (of_hidden, of_weight), (hidden.dtype, weight.dtype)
        loss, squares = torch.stack(losses).sum(0)
        ctx.mark_non_differentiable(loss)
        return loss + z * squares, loss

    @staticmethod
    def backward(ctx, scale, _):
        if ctx.grads is None:
            raise RuntimeError("The gradients of this loss were taken already; it has no second backward pass.")
        grads, ctx.grads = ctx.grads, None
        scaled = [None if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return *scaled, None, None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type in which products with `x` are computed here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def is_large(labels: torch.Tensor, head: torch.nn.Module) -> bool:
    """Return whether the logits of `labels` are too many to be computed at once by a plain head; LoRA wraps it."""
    return type(head) is torch.nn.Linear and labels.numel() * head.out_features > LARGEST
