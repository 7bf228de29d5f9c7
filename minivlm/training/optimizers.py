"""Build optimizers, set the learning rate over a run, average the weights."""

import math

import torch
from torch import nn

from minivlm.model.parts import BLOCK, part_of
from minivlm.training.muon import Muon
from minivlm.training.precision import supports_bf16

SCHEDULES = ("linear", "cosine", "wsd", "constant")
DECAY_SHARE = 0.2  # last part of a WSD run, in which the learning rate falls (arXiv 2405.18392, section 4.1: 10-20 %)


def build_optimizers(model: nn.Module, args) -> list[torch.optim.Optimizer]:
    """Return AdamW, or Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for everything else.

    Each group carries `peak_lr`, its part's learning rate after warm-up. Norms, biases and embeddings are not decayed.
    """
    embedding = model.get_input_embeddings().weight
    adamw: dict[tuple[float, float], list[nn.Parameter]] = {}
    muon: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = args.learning_rates.get(part_of(name), args.learning_rate)
        is_matrix = parameter.ndim >= 2 and parameter is not embedding
        if args.optimizer == "muon" and parameter.ndim == 2 and is_matrix and BLOCK.search(name):
            muon.setdefault(rate, []).append(parameter)
        else:
            adamw.setdefault((rate, args.weight_decay if is_matrix else 0.0), []).append(parameter)
    if not (adamw or muon):
        raise ValueError(f"Nothing is left to train: --train {' '.join(args.train)} names no parameter.")
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        groups = [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in adamw.items()]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2), fused=True))
    if muon:  # scaled so that one learning rate suits both
        groups = [{"params": p, "lr": lr, "peak_lr": lr} for lr, p in muon.items()]
        in_bf16 = args.mixed_precision not in ("no", "tf32") and supports_bf16(embedding.device)
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        optimizers.append(Muon(groups, weight_decay=args.weight_decay, dtype=dtype))
    return optimizers


def schedule(progress: float, warmup: float, kind: str = "linear", final: float = 0.0) -> float:
    """Return the factor of the learning rate at `progress`, the share of the run that is done.

    Args:
        warmup: share of the run over which the factor rises from zero.
        kind: `linear` falls from the start to the end (arXiv 2502.15938), `cosine` likewise as half a cosine, `wsd`
            stays and falls linearly over the last fifth, `constant` stays.
        final: the factor at the end.
    """
    if kind == "linear":
        fall = 1 - progress
    elif kind == "cosine":
        fall = (1 + math.cos(math.pi * progress)) / 2
    elif kind == "wsd":
        fall = min(1.0, (1 - progress) / DECAY_SHARE)
    else:
        fall = 1.0
    rise = min(progress / warmup, 1.0) if warmup else 1.0
    return rise * (final + (1 - final) * fall)


def set_learning_rates(optimizers: list, factor: float) -> None:
    """Set the learning rate of each group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def step_all(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Take a step with `factor` times the peak learning rates, and drop the gradients."""
    set_learning_rates(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class WeightAverage:
    """Exponential moving average of the trainable weights (arXiv 1806.04498), in fp32 beside the model.

    The decay grows with the steps, (1 + t) / (10 + t) at most, so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of this step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        values = [p.detach().float() for p in self.live.values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; a second call undoes the first."""
        for name, parameter in self.live.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
