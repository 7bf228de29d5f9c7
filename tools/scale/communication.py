"""Compute what ranks send each other in a step, and how long they wait for it.

A ring of N ranks sends (N - 1) / N of a buffer in a reduce-scatter or an all-gather, and twice that in an all-reduce.
So DDP sends 2 gradients a parameter, ZeRO 1 and 2 a gradient and a weight, and FSDP, which is ZeRO 3, gathers the
weights twice and sends a gradient (arXiv 1910.02054, section 7; arXiv 2304.11277, section 3.2).
"""

from dataclasses import dataclass
from functools import cache

from minivlm.training.flops import PEAK
from tools.scale.flops import Rows, forward_flops, step_flops
from tools.scale.shapes import Sizes


@dataclass(frozen=True)
class Cluster:
    """Hold what is assumed about the GPUs and their network.

    Args:
        peak: FLOP/s of a GPU in bf16; the makers' data sheet.
        mfu: share of `peak` that computing reaches while no rank waits.
        memory: bytes of a GPU, of which `reserve` stays free for buffers and fragments.
        nvlink: bytes per second between the GPUs of a node, both directions together, as data sheets say.
        network: bytes per second of a network card, one direction.
        cards: network cards of a node.
        node: GPUs of a node.
        gradient: bytes of a gradient that DDP sends: 4, or 2 with a hook that compresses to bf16.
    """

    peak: float = PEAK["H100"]
    mfu: float = 0.3
    memory: float = 80e9
    reserve: float = 0.1
    nvlink: float = 900e9
    network: float = 50e9
    cards: int = 8
    node: int = 8
    gradient: int = 4

    def bandwidth(self, ranks: int) -> float:
        """Return the bytes per second that each rank can send around a ring.

        The rings of a node leave it through all of its cards, so the GPUs of a node together send what one ring does.
        """
        inside = self.nvlink / 2
        return inside if ranks <= self.node else min(inside, self.network * self.cards)

    def balance(self, ranks: int) -> float:
        """Return the machine balance: FLOPs that a GPU computes while it sends a byte."""
        return self.peak * self.mfu / self.bandwidth(ranks)


@dataclass(frozen=True)
class Transfer:
    """Hold a transfer of a step.

    Args:
        trained: bytes a trained parameter, frozen: bytes a frozen one, as sent by many ranks.
        behind: the pass during which it goes on, "forward" or "backward"; "" if nothing computes meanwhile.
        each: True if every micro-batch has it, False if it comes once a step.
    """

    trained: int
    frozen: int
    behind: str
    each: bool


def transfers(strategy: str, gradient: int = 4) -> list[Transfer]:
    """Return the transfers of a step: bf16, except for DDP, whose gradients have `gradient` bytes."""
    return {
        "DDP": [Transfer(2 * gradient, 0, "backward", False)],
        "ZeRO 1": [Transfer(2, 0, "backward", False), Transfer(2, 0, "", False)],
        "ZeRO 2": [Transfer(2, 0, "backward", True), Transfer(2, 0, "", False)],
        "FSDP 2": [Transfer(2, 2, "forward", True), Transfer(4, 0, "backward", True)],
    }[strategy]


def sent_bytes(model: Sizes, transfer: Transfer, ranks: int) -> float:
    """Return the bytes that a rank sends in one transfer."""
    whole = transfer.trained * model.trained + transfer.frozen * model.tower.parameters
    return whole * (ranks - 1) / ranks


def step_bytes(model: Sizes, strategy: str, ranks: int, accumulation: int = 1, gradient: int = 4) -> float:
    """Return the bytes that a rank sends in a step of `accumulation` micro-batches."""
    return sum(
        sent_bytes(model, transfer, ranks) * (accumulation if transfer.each else 1)
        for transfer in transfers(strategy, gradient)
    )


@cache  # the tables and plots ask for few rows, and often
def pass_flops(model: Sizes, rows: Rows, recompute: bool = False) -> dict[str, float]:
    """Return the FLOPs of the forward and of the backward pass, in which recomputation takes place."""
    forward = sum(forward_flops(model, rows).values())
    return {"forward": forward, "backward": sum(step_flops(model, rows, recompute).values()) - forward, "": 0}


@dataclass(frozen=True)
class Time:
    """Hold the seconds of a step: computing, sending, and the part of sending that nothing hides."""

    compute: float
    sending: float
    waiting: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting


def step_time(
    model: Sizes,
    strategy: str,
    cluster: Cluster,
    ranks: int,
    micro: Rows,
    accumulation: int = 1,
    recompute: bool = False,
) -> Time:
    """Return the time of a step in which each rank computes `accumulation` micro-batches.

    A transfer hides behind the pass of one micro-batch during which it goes on; what takes longer is waited for.
    """
    rate, flops = cluster.peak * cluster.mfu, pass_flops(model, micro, recompute)
    sending = waiting = 0.0
    for transfer in transfers(strategy, cluster.gradient):
        seconds = sent_bytes(model, transfer, ranks) / cluster.bandwidth(ranks)
        times = accumulation if transfer.each else 1
        sending += times * seconds
        waiting += times * max(0.0, seconds - flops[transfer.behind] / rate)
    return Time(accumulation * sum(flops.values()) / rate, sending, waiting)


def hiding_balance(model: Sizes, strategy: str, ranks: int, micro: Rows, gradient: int = 4) -> float:
    """Return the highest machine balance, in FLOP per byte, at which the transfers during a pass are hidden."""
    flops = pass_flops(model, micro)
    during = [transfer for transfer in transfers(strategy, gradient) if transfer.behind]
    return min(flops[transfer.behind] / sent_bytes(model, transfer, ranks) for transfer in during)


def hiding_rows(model: Sizes, strategy: str, ranks: int, cluster: Cluster, row: Rows) -> int:
    """Return from how many rows a rank and micro-batch on the transfers during a pass are hidden."""
    share = cluster.balance(ranks) / hiding_balance(model, strategy, ranks, row, cluster.gradient)
    return max(1, -int(-share // 1))
