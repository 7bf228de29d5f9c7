"""What learns and how: parts of the model by name, optimizers, the learning rate over a run, averaged weights."""

import math
import re

import torch
from torch import nn

PARTS = {  # a parameter belongs to the first part whose prefix it has
    "vision": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "lm_head": "lm_head.",  # of a model that does not share it with the token embeddings
    "text": "",
}
SCHEDULES = ("linear", "cosine", "wsd", "constant")
DECAY_SHARE = 0.2  # last part of a WSD run, in which the learning rate falls (arXiv 2405.18392, section 4.1: 10-20 %)
BLOCK = re.compile(r"\.(?:layers|layer|blocks|h)\.(\d+)\.")
SELECTOR = re.compile(r"(vision|projector|text|lm_head)(?::(first_last|(last)_(\d+)))?")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def check_selector(selector: str) -> str | None:
    """What is wrong with an entry of `--train`, or None."""
    match = SELECTOR.fullmatch(selector)
    if match is None or (match[2] and match[1] not in ("vision", "text")) or match[4] == "0":
        return (
            f"--train {selector}: no such part. Parts are {', '.join(PARTS)}; of vision and text also the "
            "last N blocks, text:last_2, or the first and the last, text:first_last."
        )
    return None


def freeze(model: nn.Module, train: list[str]) -> dict[str, list[nn.Parameter]]:
    """Let only the named parts learn; return the learning parameters of each part.

    Args:
        train: parts, each whole (`text`, `lm_head`) or some of its blocks (`text:first_last`, `vision:last_2`).
            `lm_head` of a model that shares it with the token embeddings is the shared matrix.

    Raises:
        ValueError: a part has fewer blocks than are asked for.
    """
    blocks = {part: set() for part in PARTS}
    for name, _ in model.named_parameters():
        if match := BLOCK.search(name):
            blocks[part_of(name)].add(int(match[1]))
    chosen: dict[str, set[int] | None] = {}  # None: the whole part
    for selector in train:
        _, part_name, rule, _, count = (selector, *SELECTOR.fullmatch(selector).groups())
        indices = sorted(blocks[part_name])
        if rule is None:
            chosen[part_name] = None
        elif chosen.get(part_name, set()) is not None:
            if len(indices) < int(count or 1):
                raise ValueError(f"--train {selector}: {part_name} has {len(indices)} blocks. Ask for fewer.")
            wanted = {indices[0], indices[-1]} if rule == "first_last" else set(indices[-int(count) :])
            chosen[part_name] = chosen.get(part_name, set()) | wanted
    shared = getattr(model.get_output_embeddings(), "weight", None) if "lm_head" in chosen else None
    trainable: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        learns = part in chosen
        if learns and chosen[part] is not None:
            match = BLOCK.search(name)
            learns = match is not None and int(match[1]) in chosen[part]
        parameter.requires_grad_(learns or parameter is shared)
        if parameter.requires_grad:
            trainable[part].append(parameter)
    return trainable


def check_gradients(model: nn.Module) -> None:
    """Stop if a part that should learn got no gradient, or one that should not got one."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    extra = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if missing or extra:
        raise RuntimeError(
            f"After the first backward pass {len(missing)} parameters that should learn have no gradient "
            f"({', '.join(missing[:5])}) and {len(extra)} frozen ones have one ({', '.join(extra[:5])})."
        )


def build_optimizers(model: nn.Module, args) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) for the matrices of the blocks beside AdamW for everything else.

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
    if muon:  # scaled so that one learning rate suits both (arXiv 2502.16982, section 2.2)
        groups = [{"params": p, "lr": lr, "peak_lr": lr} for lr, p in muon.items()]
        optimizers.append(torch.optim.Muon(groups, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def schedule(done: float, warmup: float, kind: str = "linear", final: float = 0.0) -> float:
    """Factor of the learning rate when the share `done` of a run is behind.

    Args:
        warmup: share of the run over which the factor rises from zero.
        kind: `linear` falls from the start to the end (arXiv 2502.15938), `cosine` likewise as half a cosine, `wsd`
            stays and falls linearly over the last fifth, `constant` stays.
        final: what the factor falls to.
    """
    if kind == "linear":
        fall = 1 - done
    elif kind == "cosine":
        fall = (1 + math.cos(math.pi * done)) / 2
    elif kind == "wsd":
        fall = min(1.0, (1 - done) / DECAY_SHARE)
    else:
        fall = 1.0
    rise = min(done / warmup, 1.0) if warmup else 1.0
    return rise * (final + (1 - final) * fall)


def load_balance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """How unevenly a mixture's routers (logits (tokens, E) per block) use their experts, summed over blocks, ().

    E * sum over experts of the share of tokens that are sent to one times the mean probability that it is given
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6): `top_k` per block if all are used alike, E at most.
    """
    total = 0.0
    for logits in router_logits:
        shares = logits.float().softmax(-1)  # (tokens, E)
        sent = torch.zeros_like(shares).scatter(1, shares.topk(top_k).indices, 1.0)
        total = total + shares.shape[1] * (sent.mean(0) * shares.mean(0)).sum()
    return total


class WeightAverage:
    """Exponential moving average of the learning weights (arXiv 1806.04498), in fp32 beside the model.

    The decay grows with the steps, (1 + t) / (10 + t) at most, so that the random start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
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
