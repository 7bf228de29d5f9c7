"""Draw the loss of one or more runs, and the scores of their evaluations."""

import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """Return the entries of a JSON-lines file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def plot(folders: list[Path], output: Path) -> Path:
    """Draw log.jsonl and eval.jsonl of the runs in `folders` into one picture.

    Raises:
        ImportError: matplotlib is not installed (it is in the extra `plot`).
        ValueError: a folder holds no log.
    """
    from matplotlib.figure import Figure  # no pyplot: it would ask for a display

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for folder in folders:
        log, evaluations = read(folder / "log.jsonl"), read(folder / "eval.jsonl")
        if not log:
            raise ValueError(f"{folder}: no log.jsonl with a step in it. Give the output_dir of a training run.")
        left.plot([e["step"] for e in log], [e["loss"] for e in log], label=f"{folder.name}, training", alpha=0.7)
        if evaluations:
            steps = [e["step"] for e in evaluations]
            left.plot(steps, [e["loss"] for e in evaluations], "o-", label=f"{folder.name}, evaluation")
            for name in ("match", "ranked"):
                if name in evaluations[0]:
                    right.plot(steps, [e[name] for e in evaluations], "o-", label=f"{folder.name}, {name}")
        else:
            right.plot([e["step"] for e in log], [e["lr"] for e in log], label=f"{folder.name}, learning rate")
    left.set(xlabel="step", ylabel="loss per answer token (nats)")
    right.set(xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=120)
    return output
