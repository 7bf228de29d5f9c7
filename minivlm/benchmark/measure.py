"""Time the sides of a comparison by turns, and describe the machine."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm


def clock() -> float:
    """Return CPU seconds of this process with one thread, which other processes disturb less; else wall seconds."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side in each round; the sides take turns, after one round that does not count.

    The first round compiles, allocates and fills caches.
    """
    seconds = {name: [] for name in sides}
    with tqdm(total=(rounds + 1) * len(sides), unit="run", dynamic_ncols=True) as bar:
        for turn in range(rounds + 1):
            for name, work in sides.items():
                bar.set_description(f"round {turn}, {name}" if turn else f"warm-up, {name}")
                start = clock()
                work()
                if turn:
                    seconds[name].append(clock() - start)
                bar.update()
    return seconds


def summarise(seconds: dict[str, list[float]], units: dict[str, float], base: str) -> list[dict]:
    """Return a row for each side: units per second, and the ratio to the side `base`, both medians over rounds.

    The ratio pairs the times of one round.
    """
    rows = []
    for name, times in seconds.items():
        rates = [units[name] / took for took in times]
        ratios = [units[name] / took / (units[base] / other) for took, other in zip(times, seconds[base], strict=True)]
        rows.append({"side": name, "rate": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
                     "ratio": statistics.median(ratios)})  # fmt: skip
    return rows


def processor_name() -> str:
    """Return the name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def machine() -> dict[str, str | int]:
    """Return what a figure depends on: processor, instructions for bf16, threads, versions, commit."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if f" {flag} " in flags]
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {"processor": processor_name(), "instructions": " ".join(known), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": asked.stdout.strip() or "not in a checkout"}  # fmt: skip
