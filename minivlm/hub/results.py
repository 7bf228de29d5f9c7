"""Turn the metrics of an evaluation into the results of a model card."""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import EvalResult

from minivlm.hub.secrets import anonymous
from minivlm.resources import digest

KINDS = (  # key of the metrics, metric, title, what follows the name of a task in a list of all
    ("tasks", "exact_match", "Exact match", ""),
    ("ranked", "accuracy", "Likeliest option", "-likeliest"),
    ("words", "f1", "Content words", "-words"),
)


def cells(metrics: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Yield metric, title, part (`name-en`, "" for all) and cell of each share in the metrics of an evaluation.

    A task with a rule of its own, like "point in box", has this rule as its title.
    """
    if metrics.get("overall"):
        yield "exact_match", "Exact match", "", metrics["overall"]
    for key, metric, title, _ in KINDS:
        for task, languages in metrics.get(key, {}).items():
            rule = metrics.get("rules", {}).get(task) if key == "tasks" else None
            for language, cell in languages.items():
                part = f"{task}-{language}"
                yield ("accuracy", rule[0].upper() + rule[1:], part, cell) if rule else (metric, title, part, cell)


def counts(cell: dict) -> str:
    """Return of how many answers a share is; the mean of captions has no count of right ones."""
    return f"{cell['hits']} of {cell['count']}" if "hits" in cell else f"mean of {cell['count']}"


def evidence(cell: dict) -> str:
    """Return counts and interval of a share, for a reader."""
    return f"{counts(cell)}, 95 % interval {cell['low']:.4f} to {cell['high']:.4f}"


def eval_results(metrics: dict, sources: list[str]) -> list[EvalResult]:
    """Return the model-index: one entry per task and language, and one over all of them."""
    hub = [source.split(":")[1] for source in sources if source.startswith("hub:")]
    data = {"dataset_type": hub[0] if hub else "custom", "dataset_name": anonymous(", ".join(sources)) or "evaluation"}
    return [
        EvalResult(
            "image-text-to-text", metric_type=metric, metric_name=f"{title} ({evidence(cell)})",
            metric_value=cell["match"], dataset_config=part or None, **data,
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip


def read_record(path: Path, weights: Path, command: str) -> dict:
    """Return the content of a JSON file with results of the model whose weights are in the file `weights`.

    Args:
        command: what writes the file, for the message.

    Raises:
        ValueError: the results are those of other weights.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if weights.is_file() and record.get("weights_sha256") != digest(weights):
        raise ValueError(f"{path} holds results of other weights than {weights}. Run {command} again.")
    return record


def read_benchmarks(path: Path | None, weights: Path) -> dict:
    """Return what `minivlm evaluate --tasks --json` wrote to `path`; without results if `path` is None.

    Errors are those of `read_record`.
    """
    return {"results": []} if path is None else read_record(path, weights, "minivlm evaluate --tasks")


def benchmark_evidence(row: dict, record: dict) -> str:
    """Return number of answers, standard error and harness of a benchmark's value, for a reader."""
    stderr = "" if row["stderr"] is None else f", standard error {row['stderr']:.4f}"
    part = f", only the first {record['limit']} questions" if record.get("limit") else ""
    return f"{row['n']} answers{stderr}{part}, {record['harness']}"


def benchmark_results(record: dict) -> list[EvalResult]:
    """Return the model-index of public benchmarks: one entry per metric."""
    return [
        EvalResult(
            "image-text-to-text", dataset_type=row["dataset"], dataset_name=row["benchmark"],
            metric_type=row["metric"], metric_name=f"{row['metric']} ({benchmark_evidence(row, record)})",
            metric_value=row["value"],
        )
        for row in record["results"]
    ]  # fmt: skip


def benchmark_table(record: dict) -> str:
    """Return the card's section of public benchmarks; empty without results."""
    rows = [
        f"| {row['benchmark']} | {row['metric']} | {row['value']:.4f} | {benchmark_evidence(row, record)} |"
        for row in record["results"]
    ]
    head = ["## Public benchmarks", "", "| benchmark | metric | value | of |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def benchmark_entries(record: dict) -> str:
    """Return `.eval_results/benchmarks.yaml`, the file that the Hub reads."""
    entries = [
        {
            "dataset": {"id": row["dataset"], "task_id": f"{row['task']}-{row['metric']}"},
            "value": row["value"],
            "notes": benchmark_evidence(row, record),
        }
        for row in record["results"]
    ]
    return yaml.safe_dump(entries, sort_keys=False, width=110)
