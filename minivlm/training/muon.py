"""Muon (Jordan et al. 2024): a step moves a matrix along the nearest one whose singular values are equal.

Unlike `torch.optim.Muon` it takes convolutions, computes matrices of one shape together on a GPU, and has a choice of
the type of the products. That of torch is always bf16, which takes 20 times as long as fp32 on a processor without the
instructions.
"""

import math
from itertools import groupby

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, (x x^T) x and (x x^T)^2 x in a step of Newton-Schulz
STEPS = 5
LARGEST = 1 << 24  # numbers that a GPU computes together; several copies of them are held


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return roughly the nearest matrices whose singular values are one; these lie between 0.5 and 1.5.

    Args:
        matrices: (n, rows, columns); fastest if there are more columns than rows.
        dtype: in which the products are computed.
    """
    x = matrices.float()
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Optimize matrices; a convolution is treated as a matrix (out, in * height * width).

    Args:
        params: parameters of two or more dimensions, or groups of them.
        match_adamw: scale the steps so that learning rates of AdamW suit (arXiv 2502.16982, section 2.2); else by the
            root of rows / columns where there are more rows (Jordan et al. 2024).
        dtype: in which the products are computed.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, momentum=0.95, match_adamw=True, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.match_adamw, self.dtype = match_adamw, dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update each parameter that has a gradient; return the loss if `closure` computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = sorted((p for p in group["params"] if p.grad is not None), key=size)
            for together in (chunk for _, same in groupby(params, size) for chunk in chunks(list(same))):
                self.move(together, group)
        return loss

    def move(self, params: list[torch.nn.Parameter], group: dict) -> None:
        """Update parameters of one size, as (rows, columns) or as (columns, rows), by the options of a group."""
        updates = [self.direction(p, group["momentum"]) for p in params]
        tall = [update.shape[0] > update.shape[1] for update in updates]
        stack = orthogonalize(torch.stack([u.T if t else u for u, t in zip(updates, tall)]), self.dtype)
        for p, update, t in zip(params, stack, tall):
            update = update.T if t else update
            rows, columns = update.shape
            scale = 0.2 * math.sqrt(max(rows, columns)) if self.match_adamw else math.sqrt(max(1, rows / columns))
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def direction(self, p: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        """Return Nesterov's mean of a parameter's gradients, (rows, columns), and take this one into it."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum).flatten(1)


def size(p: torch.Tensor) -> tuple[int, int]:
    """Return the shorter and the longer side of a parameter's matrix."""
    rows = p.shape[0]
    return min(rows, p.numel() // rows), max(rows, p.numel() // rows)


def most(device: torch.device) -> int:
    """Return the numbers that are computed together at most; a CPU is faster with one parameter after the other."""
    return 1 if device.type == "cpu" else LARGEST


def chunks(params: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Return parameters of one size in the lists that are computed together."""
    count = max(1, most(params[0].device) // params[0].numel())
    return [params[i : i + count] for i in range(0, len(params), count)]
