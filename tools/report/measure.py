"""Measure a model on each evaluation file of the embedded data, once for the same weights, and keep its answers."""

import json
from pathlib import Path

from minivlm.commands import evaluate
from minivlm.resources import digest

# Evaluation files, without .parquet; the first one is the test that the README reports.
FILES = {
    "test": "single things and scenes in a drawing style that no training picture has (Twemoji)",
    "test_grounding": "scenes in that style, with questions about places and in two steps",
    "test_compositions": "scenes in styles of the training, of things that no training scene shows",
    "test_photos": "photographs of 36 of the things; no photograph was trained on",
    "dev": "the style that choices were made by (FxEmojis)",
}


def measure(model: Path, output: Path, root: Path, names: list[str], limit: int | None) -> list[Path]:
    """Evaluate the model on data/NAME.parquet of `root`, each into NAME.json and NAME.jsonl (answers) in `output`.

    A file that was measured with the same weights and limit is left as it is. Return the paths of the JSON files.
    """
    weights = digest(model / "model.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        scores, answers = output / f"{name}.json", output / f"{name}.jsonl"
        paths.append(scores)
        if answers.is_file() and is_current(read(scores), weights, limit):
            print(f"measured before: {scores}")
            continue
        print(f"{name}: {FILES[name]}", flush=True)
        options = ["--data", str(root / "data" / f"{name}.parquet"), "--answers", str(answers), "--json", str(scores)]
        scores.unlink(missing_ok=True)  # an interrupted measurement must not look like a finished one
        options += ["--among", "name"] if name == "test_photos" else []  # a choice among all 1,358 would say little
        evaluate.main([str(model), *options, *(["--limit", str(limit)] if limit else [])])
    return paths


def is_current(record: dict | None, weights: str, limit: int | None) -> bool:
    """Return whether a record is of these weights and this number of rows."""
    return record is not None and (record["weights_sha256"], record["limit"]) == (weights, limit)


def read(path: Path) -> dict | None:
    """Return the content of a JSON file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_answers(path: Path) -> list[dict]:
    """Return the answers that `minivlm evaluate --answers` wrote, one per row, in the order of the rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def combine(output: Path) -> dict:
    """Return one record of all files: the metrics of `test` at the top, those of the others under `files`.

    Raises:
        ValueError: a file was not measured, or not all of its rows, or not with the weights of the others.
    """
    records = {name: read(output / f"{name}.json") for name in FILES}
    absent = [name for name, record in records.items() if record is None]
    if absent:
        raise ValueError(f"{output}: {', '.join(absent)} not measured yet. Run the step --evaluate.")
    cut = [name for name, record in records.items() if record["limit"]]
    if cut:
        raise ValueError(f"{output}: only the first rows of {', '.join(cut)} were measured. Measure without --limit.")
    weights = {record["weights_sha256"] for record in records.values()}
    if len(weights) > 1:
        raise ValueError(f"{output}: the files were measured with {len(weights)} models. Run the step --evaluate.")
    return merge(records)


def merge(records: dict[str, dict]) -> dict:
    """Return one record of those of several files: the metrics of `test` at the top, the others under `files`."""
    for name, record in records.items():
        record["data"] = [f"data/{name}.parquet"]
    kept = ("data", "overall", "tasks", "ranked", "words", "rules")
    files = {name: {key: record[key] for key in kept if key in record} for name, record in records.items()}
    files.pop("test")
    return records["test"] | {"model": ".", "files": files}
