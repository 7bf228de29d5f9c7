"""Write the tables to plan from: strategy and micro-batch for 1, 8 and 64 GPUs, time and price of a run."""

from tools.scale.communication import Cluster
from tools.scale.flops import Rows, step_flops
from tools.scale.pages import networks
from tools.scale.planning import Plan, best_plan
from tools.scale.shapes import MODELS
from tools.scale.text import duration, share, short, table

# Measured, from PERFORMANCE.md, "Training beside peers", rows of 364 tokens, 11 rows: rows/s on one thread of an AMD
# EPYC with avx512_bf16, forward and backward without the optimizer.
CPU_RATES = {
    "MiniMind-V, fp32, padded to 768": 0.237,
    "MiniVLM, one row beside the other": 0.988,
    "MiniVLM, packed row by row, compiled": 1.05,
}
FASTEST = "MiniVLM, packed row by row, compiled"
LOADER = 1074  # measured, from PERFORMANCE.md, "Data": rows/s of one worker process, pictures of 128 pixels
MUON_SECONDS = 5.4  # measured once on the same processor, commit e63da10: what Muon adds to a step of the 64 M model


def plan_row(name: str, where: str, found: Plan | None) -> list[str]:
    """Return a line of the table of plans."""
    if found is None:
        return [name, where, "does not fit", "", "", "", "", ""]
    strategy = "one process" if found.ranks == 1 else found.strategy
    again = ", recomputed" if found.recompute else ""
    step = f"{found.micro} x {found.accumulation} x {found.ranks}"
    return [name, where, strategy + again, str(found.largest), step, f"{short(1000 * found.time.total)} ms",
            share(found.waiting), short(found.rate)]  # fmt: skip


def plans_table(cluster: Cluster, step: Rows) -> str:
    """Return the best plan of each model on 1, 8 and 64 GPUs."""
    lines = []
    for name, model in MODELS.items():
        for where, (ranks, one) in {"1 GPU": (1, cluster), **networks(cluster)}.items():
            lines.append(plan_row(name, where, best_plan(model, ranks, one, step)))
    head = ["model", "GPUs", "strategy", "rows that fit", "rows x micro-batches x ranks", "step", "waiting", "rows/s"]
    return table(head, lines)


def cpu_table(rows: int) -> str:
    """Return the time of `rows` rows on one thread of a CPU at the measured rates, for the 64 M model."""
    work = sum(step_flops(MODELS["64 M"], Rows()).values())
    return table(["one CPU thread", "rows/s, measured", "TFLOP/s", "time"], [
        [name, str(rate), short(rate * work / 1e12) if "MiniVLM" in name else "", duration(rows / rate)]
        for name, rate in CPU_RATES.items()
    ])  # fmt: skip


def gpu_table(cluster: Cluster, step: Rows, rows: int, price: float) -> str:
    """Return time and price of `rows` rows on one GPU and on eight; measured is the loader's rate alone."""
    lines = []
    for name, model in MODELS.items():
        for ranks in (1, 8):
            found = best_plan(model, ranks, cluster, step)
            where = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
            if found is None:
                lines.append([name, where, "does not fit", "", "", ""])
                continue
            seconds = rows / found.rate
            dollars = f"{short(seconds / 3600 * ranks * price)} $"
            loaders = str(-int(-found.rate // LOADER))
            lines.append([name, where, short(found.rate), duration(seconds), dollars, loaders])
    return table(["model", "GPUs", "rows/s", "time", "price", "loader processes, all ranks"], lines)


def muon_on_cpu() -> tuple[int, int]:
    """Return from how many rows a step on Muon is a tenth of it, and pays with half the steps, by measured times."""
    tenth, even = (-int(-MUON_SECONDS * CPU_RATES[FASTEST] * factor // 1) for factor in (9, 1))
    return tenth, even
