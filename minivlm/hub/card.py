"""Write the model card, README.md, from the files that a run leaves behind: run.json, recipe.yaml and loss.png.

benchmarks.json, which `minivlm evaluate --tasks --json` writes, also goes into the card and into .eval_results, and
formats.json, which `minivlm benchmark-formats --json` writes, into the card.
"""

import json
import math
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from minivlm.hub.check import RESULTS, read_header
from minivlm.hub.format_table import RECORD, formats_section
from minivlm.hub.results import (
    benchmark_entries,
    benchmark_results,
    benchmark_table,
    counts,
    eval_results,
    read_benchmarks,
)
from minivlm.hub.secrets import anonymous

MARKER = "<!-- Written by minivlm/hub/card.py, and anew at each upload. Delete this line to keep your own words. -->"
# Options that say where a run was made, not how; the card leaves them out.
PLACES = ("output_dir", "resume", "feature_cache", "trackers", "run_name", "push_to_hub", "push_every", "hub_private")


def write_card(folder: Path, repo_id: str, run: dict | None) -> None:
    """Write README.md in `folder`; a card without our marker is the user's own and stays.

    Args:
        run: content of run.json; None if there is none.
    """
    path, run = folder / "README.md", run or {}
    benchmarks, formats = benchmarks_of(folder), formats_section(beside(folder, RECORD), folder / "model.safetensors")
    if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
        return
    name, options, metrics = repo_id.split("/")[-1], run.get("options", {}), run.get("metrics") or {}
    found = eval_results(metrics, options.get("eval_data", [])) + benchmark_results(benchmarks)
    header = ModelCardData(
        language=languages(metrics) or ["en", "zh"],
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vision-language", "minivlm", "custom_code"],
        datasets=[s.split(":")[1] for s in options.get("data", []) if s.startswith("hub:")] or None,
        model_name=name if found else None,
        eval_results=found or None,
    )
    size = sum(math.prod(t["shape"]) for file in folder.glob("*.safetensors") for t in read_header(file).values())
    plot = beside(folder, "loss.png")
    if plot and plot.parent != folder:
        put(folder / "loss.png", plot.read_bytes())
    parts = [
        MARKER,
        INTRODUCTION.format(name=name, millions=size / 1e6),
        "## Use\n\n" + SNIPPET.format(repo_id=repo_id),
        results(metrics),
        benchmark_table(benchmarks),
        formats,
        training(run, bool(plot)),
        fold("Recipe", recipe(folder, options), "yaml") if options else "",
        "## Training data\n\n" + "\n".join(f"- `{s}`" for s in options["data"]) if options.get("data") else "",
    ]
    body = anonymous("\n\n".join(filter(None, parts)))
    put(path, str(ModelCard(f"---\n{header}\n---\n\n{body}\n")).encode())


def languages(metrics: dict) -> list[str]:
    """Return the languages of the results of an evaluation, in order."""
    return sorted(
        {lang for task in metrics.get("tasks", {}).values() for lang in task if re.fullmatch("[a-z]{2,3}", lang)}
    )


def benchmarks_of(folder: Path) -> dict:
    """Return the results of public benchmarks for the model in `folder`, and write them to .eval_results, too."""
    found = read_benchmarks(beside(folder, "benchmarks.json"), folder / "model.safetensors")
    if found["results"]:
        (folder / RESULTS).parent.mkdir(exist_ok=True)
        put(folder / RESULTS, benchmark_entries(found).encode())
    return found


INTRODUCTION = """\
# {name}

A small vision-language model of {millions:,.1f} million parameters, made with MiniVLM: pictures and questions in, \
answers out."""
SNIPPET = """\
The model's code comes with its weights: read it, then allow it with `trust_remote_code=True`.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)

content = [{{"type": "image", "image": Image.open("picture.png")}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def results(metrics: dict) -> str:
    """Return the section of results: tables of right answers, ranked options and captions; empty without results."""
    tables, rules = [], metrics.get("rules", {})
    first = "right" if rules else "exact match"
    for key, title in (("tasks", first), ("ranked", "likeliest option"), ("words", "content words")):
        rows = [(task, lang, cell) for task, langs in metrics.get(key, {}).items() for lang, cell in langs.items()]
        if key == "tasks":
            rows = [(f"{task} ({rules[task]})" if task in rules else task, lang, cell) for task, lang, cell in rows]
        if key == "tasks" and metrics.get("overall"):
            rows.append(("overall", "", metrics["overall"]))
        lines = [
            f"| {task} | {lang} | {c['match']:.1%} | {counts(c)} | {c['low']:.1%} to {c['high']:.1%} |"
            for task, lang, c in rows
        ]
        if lines:
            counted = "answers" if key == "words" else "right"
            head = f"| task | language | {title} | {counted} | 95 % interval |"
            tables.append("\n".join([head, "|---|---|---|---|---|", *lines]))
    return "\n\n".join(["## Results", *tables]) if tables else ""


def training(run: dict, plot: bool) -> str:
    """Return the section of training: steps, time, device and versions, and the plot of the loss."""
    facts = {name: f"{run[name]:,}" for name in ("steps", "rows", "tokens") if run.get(name)}
    if run.get("seconds"):
        facts["time"] = f"{run['seconds'] / 60:.1f} min" if run["seconds"] < 7200 else f"{run['seconds'] / 3600:.1f} h"
    if run.get("device"):
        facts["device"] = f"{run['device']}, {run.get('processes', 1)} process(es)"
    facts |= {name: run[name] for name in ("precision", "commit") if run.get(name)}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    table = "\n".join(["| | |", "|---|---|", *rows]) if rows else ""
    parts = [table, "![Loss by step](loss.png)" if plot else ""]
    return "\n\n".join(["## Training", *filter(None, parts)]) if any(parts) else ""


def recipe(folder: Path, options: dict) -> str:
    """Return recipe.yaml of the run, or YAML of the options that were chosen if there is no such file."""
    if path := beside(folder, "recipe.yaml"):
        return path.read_text(encoding="utf-8")
    chosen = {name: value for name, value in options.items() if name not in PLACES and value not in (None, "", [], {})}
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def fold(title: str, text: str, language: str) -> str:
    """Return a code block that the reader opens by a click; empty without text."""
    return f"<details><summary>{title}</summary>\n\n```{language}\n{text.strip()}\n```\n\n</details>" if text else ""


def beside(folder: Path, name: str) -> Path | None:
    """Find a file of the run in the folder of the model or the one above."""
    return next((path for path in (folder / name, folder.resolve().parent / name) if path.is_file()), None)


def read_run(folder: Path) -> dict | None:
    """Return the content of the run's run.json; None if there is none."""
    path = beside(folder, "run.json")
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def put(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, and leave other hard links to the old file as they are."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_bytes(content)
    os.replace(partial_path, path)
