"""Add to the loss of a batch: z-loss, and the balance of a mixture of experts."""

import torch

from minivlm.data.encoder import IGNORE


def z_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a scalar: the sum of squared log-partitions of `logits` (1, K, vocabulary) with a label in `labels`.

    Source: PaLM (arXiv 2204.02311, section 5).
    """
    return logits.float().logsumexp(-1)[labels != IGNORE].square().sum()


def load_balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return a scalar that grows when a mixture uses its experts unequally, summed over the blocks.

    E times the sum over experts of the share of tokens that an expert gets times its mean probability (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6): `top_k` per block if all are used alike, E at most.
    """
    total = 0.0
    for logits in router_logits:
        shares = logits.float().softmax(-1)  # (tokens, E)
        sent = torch.zeros_like(shares).scatter(1, shares.topk(top_k).indices, 1.0)
        total = total + shares.shape[1] * (sent.mean(0) * shares.mean(0)).sum()
    return total
