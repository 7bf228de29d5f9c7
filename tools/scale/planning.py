"""Choose a strategy and a micro-batch for a number of GPUs, and compute time and price of a run."""

from dataclasses import dataclass, replace

from tools.scale.communication import Cluster, Time, step_time
from tools.scale.flops import Rows
from tools.scale.memory import HELD, largest_micro_batch
from tools.scale.shapes import Sizes

TIE = 0.01  # of two plans whose times differ by less, the one with the simpler strategy is chosen


@dataclass(frozen=True)
class Plan:
    """Hold how a step is computed.

    Args:
        largest: the largest micro-batch that fits, in rows.
        micro, accumulation: rows of a micro-batch, and how many a rank computes in a step.
        rows: of the step, over all ranks.
    """

    strategy: str
    ranks: int
    recompute: bool
    largest: int
    micro: int
    accumulation: int
    time: Time

    @property
    def rows(self) -> int:
        return self.ranks * self.micro * self.accumulation

    @property
    def rate(self) -> float:
        """Return rows per second over all ranks."""
        return self.rows / self.time.total

    @property
    def waiting(self) -> float:
        """Return the share of a step during which a rank only waits for its transfers."""
        return self.time.waiting / self.time.total


def plan(
    model: Sizes, strategy: str, ranks: int, cluster: Cluster, step: Rows, recompute: bool = False
) -> Plan | None:
    """Return the plan of a strategy for steps of at least `step.count` rows; None if not one row fits.

    The micro-batch is as large as memory and step allow, so that ZeRO 2 and FSDP 2 send as seldom as they can.
    """
    memory = cluster.memory * (1 - cluster.reserve)
    largest = largest_micro_batch(model, strategy, ranks, memory, replace(step, count=1), recompute)
    if largest < 1:
        return None
    share = -(-step.count // ranks)
    accumulation = -(-share // largest)
    micro = -(-share // accumulation)
    time = step_time(model, strategy, cluster, ranks, replace(step, count=micro), accumulation, recompute)
    return Plan(strategy, ranks, recompute, largest, micro, accumulation, time)


def plans(model: Sizes, ranks: int, cluster: Cluster, step: Rows) -> list[Plan]:
    """Return the plans that fit, the simplest strategy first; without recomputation before with it.

    A single GPU has nothing to share: it trains as one process of DDP does.
    """
    names = HELD if ranks > 1 else ["DDP"]
    found = [plan(model, name, ranks, cluster, step, again) for again in (False, True) for name in names]
    return [one for one in found if one]


def best_plan(model: Sizes, ranks: int, cluster: Cluster, step: Rows) -> Plan | None:
    """Return the plan with the most rows per second; of nearly equal ones the simplest; None if nothing fits."""
    found = plans(model, ranks, cluster, step)
    fastest = max((one.rate for one in found), default=0)
    return next((one for one in found if one.rate >= (1 - TIE) * fastest), None)


def winner(model: Sizes, ranks: int, cluster: Cluster, micro: Rows) -> str:
    """Return the strategy with the shortest step of one micro-batch, if all fit; of equal ones the simplest."""
    times = {name: step_time(model, name, cluster, ranks, micro).total for name in HELD}
    return next(name for name, seconds in times.items() if seconds <= (1 + TIE) * min(times.values()))


def winners(model: Sizes, ranks: int, cluster: Cluster, micro: Rows) -> list[tuple[str, float]]:
    """Return the strategies that win as the network gets slower, each with the machine balance from which it wins.

    The balance, in FLOP per byte, rises from 10 in steps of one per cent to a million.
    """
    found, balance = [], 10.0
    while balance < 1e6:
        speed = cluster.peak * cluster.mfu / balance
        name = winner(model, ranks, replace(cluster, nvlink=2 * speed, network=speed), micro)
        if not found or found[-1][0] != name:
            found.append((name, balance))
        balance *= 1.01
    return found
