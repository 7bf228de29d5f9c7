"""Train the runs whose losses are kept in `tests/golden/`, and renew them there.

    python -m tools.golden              print the losses beside those that are kept
    python -m tools.golden --renew      also write them

A change of the model, the data path or the optimizers that is not meant to change training leaves these losses as they
are, up to 1e-3; `tests/test_golden.py` compares. Renew them when a change is wanted, and say in its commit why.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minivlm.cli import Parser, run_command

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
RUNS = {  # name -> (recipe, ranks)
    "micro": (ROOT / "recipes" / "micro.yaml", 1),
    "packed_streamed": (GOLDEN / "packed_streamed.yaml", 2),
}
STEPS = 20
TOLERANCE = 1e-3  # other processors and thread counts stay far below it
# Losses of fp32 on the CPU, whatever the recipe says; the number of threads changes the order of sums.
OPTIONS = ["--max_steps", str(STEPS), "--device", "cpu", "--mixed_precision", "no", "--compile", "false"]
OPTIONS += ["--workers", "0", "--log_every", "1", "--resume", "never"]


def train(name: str, folder: Path) -> dict[str, list[float]]:
    """Train a run from scratch in `folder`; return the loss and the learning rate of each step."""
    recipe, ranks = RUNS[name]
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"] if ranks > 1 else []
    command = [sys.executable, *start, str(ROOT / "train_accelerate.py"), "--recipe", str(recipe), *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output_dir", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with code {done.returncode}:\n{done.stderr}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: [line[key] for line in log if key in line] for key in ("loss", "lr")}


def read(name: str) -> dict[str, list[float]]:
    """Return the metrics that are kept of a run."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, metrics: dict[str, list[float]]) -> None:
    """Keep the metrics of a run, rounded to six digits, so that a difference can be read."""
    rounded = {key: [float(f"{value:.6g}") for value in values] for key, values in metrics.items()}
    (GOLDEN / f"{name}.json").write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Train the runs and print their losses."""
    parser = Parser(__doc__, prog="python -m tools.golden")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"Runs to train. Default: {', '.join(RUNS)}.")
    parser.add_argument("--renew", action="store_true", help="Write the losses to tests/golden/.")
    args = parser.parse_args(argv)
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"{', '.join(sorted(unknown))}: no such run. Runs are {', '.join(RUNS)}.")
    for name in args.runs or RUNS:
        kept = read(name)["loss"] if (GOLDEN / f"{name}.json").is_file() else []
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(name, Path(folder) / name)
        for step, loss in enumerate(metrics["loss"], 1):
            beside = f"  kept {kept[step - 1]:.5f}  difference {loss - kept[step - 1]:+.1e}" if kept else ""
            print(f"{name} step {step:>2}  loss {loss:.5f}{beside}", flush=True)
        if args.renew:
            write(name, metrics)
            print(f"written: tests/golden/{name}.json")


if __name__ == "__main__":
    sys.exit(run_command(main))
