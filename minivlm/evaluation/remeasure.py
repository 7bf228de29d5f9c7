"""Measure a model again and compare the shares of right answers with those in its record."""

import json
from pathlib import Path

import torch

from minivlm.data.rows import Rows, load_rows
from minivlm.evaluation.scoring import evaluate, wilson
from minivlm.hub.card import read_run
from minivlm.hub.findings import Finding, finding
from minivlm.model.loading import load_trained, place
from minivlm.resources import digest

Z = 3.29  # half width of a 99.9 % interval: one right model in a thousand is called wrong
SLACK = 0.01  # share of the answers that may differ between two machines, if all rows are measured again


def find_record(folder: Path) -> dict | None:
    """Return what was measured of the model in `folder`; None if nothing is recorded.

    It is looked for in data/results.json of the folder, in results/test.json beside it, and in run.json of the run.

    Returns:
        metrics as `evaluate` gives them, with `source`, `data`, `limit` and, if it is known, `weights_sha256`.
    """
    weights = folder / "model.safetensors"
    for path in (folder / "data" / "results.json", folder.resolve().parent / "results" / "test.json"):
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8")) | {"source": f"{path.parent.name}/{path.name}"}
            own = path.parent.parent == folder
            if own or weights.is_file() and record.get("weights_sha256") == digest(weights):
                return record
    run = read_run(folder) or {}
    options, metrics = run.get("options", {}), run.get("metrics")
    if not metrics or not options.get("eval_data"):
        return None
    return metrics | {"source": "run.json", "data": options["eval_data"], "limit": options.get("eval_limit")}


def remeasure(folder: Path, limit: int, ours: bool) -> Finding:
    """Answer the first `limit` rows of the recorded data and compare with the record.

    If these are all rows of the record, the number of right answers must be the same, to one per cent of each task.
    Otherwise the recorded overall share must lie in the 99.9 % interval of the new one.
    """
    record = find_record(folder)
    if record is None:
        return finding("metrics", ["no record of metrics (data/results.json, run.json): nothing to compare"], "", ours)
    weights, source = folder / "model.safetensors", record["source"]
    if record.get("weights_sha256") and weights.is_file() and record["weights_sha256"] != digest(weights):
        return Finding("metrics", "wrong", f"{source} is of other weights. Measure these: minivlm evaluate --json")
    try:
        rows = load_recorded(folder, record["data"])
    except (ValueError, OSError) as error:
        return finding("metrics", [f"the data of {source} is not here: {error}"], "", ours)
    every = min(record["limit"] or len(rows), len(rows))
    new = measure_first(folder, rows, min(limit, every))
    problems, text = compare(record, new, limit >= every)
    where = f"on {'all' if limit >= every else 'the first'} {min(limit, every)} rows of {', '.join(record['data'])}"
    return finding("metrics", problems, f"{text} in {source} and {new['overall']['match']:.1%} {where}")


def load_recorded(folder: Path, names: list[str]) -> Rows:
    """Load the rows of these files, which are named from here or from the folder of the model.

    Raises:
        ValueError: a file is in neither place, or the data is on the Hub, which a check does not ask.
    """
    if online := [name for name in names if name.startswith("hub:")]:
        raise ValueError(f"{', '.join(online)} is on the Hub, and this check does not use the network")
    try:
        return load_rows(names)
    except (ValueError, OSError):
        return load_rows([str(folder / name) for name in names])


def measure_first(folder: Path, rows: Rows, limit: int) -> dict:
    """Return the metrics of the first `limit` rows, as `evaluate` does."""
    model, processor = load_trained(folder)
    return evaluate(place(model, "cuda" if torch.cuda.is_available() else "cpu"), processor, rows, limit)


def compare(record: dict, new: dict, complete: bool) -> tuple[list[str], str]:
    """Return what differs between two measurements, and the recorded overall share in words."""
    old, text = record["overall"], f"overall {record['overall']['match']:.1%}"
    if not complete:
        low, high = wilson(new["overall"]["hits"], new["overall"]["count"], Z)
        inside = low <= old["match"] <= high
        words = f"{text} is recorded, but {new['overall']['match']:.1%} of {new['overall']['count']} answers are right"
        return ([] if inside else [f"{words} (99.9 % interval {low:.1%} to {high:.1%})"]), text
    problems = []
    for task, languages in {"overall": {"": old}, **record["tasks"]}.items():
        for language, cell in languages.items():
            found = new["overall"] if task == "overall" else new["tasks"].get(task, {}).get(language)
            name = f"{task} {language}".strip()
            if found is None or found["count"] != cell["count"]:
                problems.append(
                    f"{name}: {cell['count']} rows are recorded, {found['count'] if found else 0} are there"
                )
            elif abs(found["hits"] - cell["hits"]) > max(1, SLACK * cell["count"]):
                problems.append(f"{name}: {cell['hits']} right answers are recorded, {found['hits']} were given")
    return problems, text
