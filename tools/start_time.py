"""Measure how long `minivlm ask` takes from its start to its first answer, each time in a new process.

    python -m tools.start_time . runs/onnx runs/page/model

A folder with ONNX graphs is asked by --engine onnx. The folders take turns. The wall time is longer if other programs
run; the processor's time depends less on them. --cold drops the files that the system keeps in memory before each
start: Linux, as root.
"""

import os
import resource
import statistics
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from time import perf_counter

from minivlm.cli import Parser, positive, run_command
from minivlm.onnx_engine.files import has_graphs

CACHES = Path("/proc/sys/vm/drop_caches")
PICTURE, QUESTION = "data/examples/pig-face.png", "What is this?"


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="python -m tools.start_time")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="Folders of models or of ONNX graphs.")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="Starts of each. Default: 5.")
    parser.add_argument(
        "--checkouts",
        nargs="+",
        default=["."],
        metavar="DIR",
        help="Whose code to run, by turns. Default: this one's.",
    )
    parser.add_argument("--cold", action="store_true", help="Drop the system's file cache before each start.")
    return parser.parse_mixed_args(argv)


def start(folder: str, checkout: str, cold: bool) -> tuple[float, float, str]:
    """Return wall seconds and processor seconds of one start, and the answer."""
    engine = ["--engine", "onnx"] if has_graphs(Path(folder)) else []
    command = [sys.executable, "-m", "minivlm", "ask", str(Path(PICTURE).resolve()), QUESTION, *engine]
    command += ["--model", str(Path(folder).resolve())]
    if cold:
        os.sync()
        CACHES.write_text("3")
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    """Print the median, the lowest and the highest time of each folder."""
    args = parse_args(argv)
    sides = list(product(args.folders, args.checkouts))
    if not args.cold:
        for side in sides:  # so that its files are in memory
            start(*side, cold=False)
    rounds = [[start(*side, args.cold) for side in sides] for _ in range(args.rounds)]
    for side, times in zip(sides, zip(*rounds)):
        wall, used = ([time[i] for time in times] for i in (0, 1))
        spread = [f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in (wall, used)]
        answers = ", ".join({time[2] for time in times})
        print(f"{side[0]} by {side[1]}: {spread[0]} s, of the processor {spread[1]} s: {answers}")


if __name__ == "__main__":
    sys.exit(run_command(main))
