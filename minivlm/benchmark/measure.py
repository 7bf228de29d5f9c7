"""Time the sides of a comparison by turns, and describe the machine."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from minivlm.training.record import commit, device_name


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


def summarise(seconds: dict[str, list[float]], amount: float, base: str) -> list[dict]:
    """Return a row for each side: `amount` per second, and the ratio to the side `base`, both medians over rounds.

    The ratio pairs the times of one round.
    """
    rows = []
    for name, times in seconds.items():
        rates = [amount / took for took in times]
        ratios = [other / took for took, other in zip(times, seconds[base], strict=True)]
        rows.append({"side": name, "rate": statistics.median(rates), "lowest": min(rates), "highest": max(rates),
                     "ratio": statistics.median(ratios)})  # fmt: skip
    return rows


def milliseconds(seconds: dict[str, list[float]], base: str) -> list[str]:
    """Return a line for each side: its median, lowest and highest milliseconds, and the ratio to the side `base`."""
    lines = []
    for side in summarise(seconds, 1, base):
        times = sorted(1000 / side[name] for name in ("rate", "lowest", "highest"))
        ratio = f"{side['ratio']:.2f} x as fast"
        lines.append(f"{side['side']}: {times[1]:.0f} ms ({times[0]:.0f} to {times[2]:.0f}), {ratio}")
    return lines


def machine() -> dict[str, str | int]:
    """Return what a figure depends on: processor, instructions for bf16, threads, versions, commit."""
    file = Path("/proc/cpuinfo")
    info = file.read_text() if file.is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if f" {flag} " in info]
    return {"processor": names[0] if names else device_name(torch.device("cpu")), "instructions": " ".join(known),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": commit() or "not in a checkout"}  # fmt: skip
