"""The model card of a trained model, from what its run left behind: run.json, recipe.yaml and loss.png.

    python -m scripts.model_card          # the results of data/results.json into this repository's own card

The second way writes them twice: as `model-index` into the header of README.md, and as .eval_results/minivlm.yaml.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_token

OWN_REPO = "jinv2/minivlm"  # model and data are one tree
MARKER = "<!-- Written by scripts/model_card.py, and anew at each upload. Delete this line to keep your own words. -->"
# Options that say where a run was made and not how.
PLACES = ("output_dir", "resume", "feature_cache", "trackers", "run_name", "push_to_hub", "push_every", "hub_private")


def write_card(folder: Path, repo_id: str, run: dict | None) -> None:
    """Write README.md, the model card, from `run` (run.json) and what lies beside it; one that is not ours is kept."""
    path, run = folder / "README.md", run or {}
    if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
        return
    name, options, metrics = repo_id.split("/")[-1], run.get("options", {}), run.get("metrics") or {}
    languages = {
        lang for task in metrics.get("tasks", {}).values() for lang in task if re.fullmatch("[a-z]{2,3}", lang)
    }
    found = eval_results(metrics, options.get("eval_data", []))
    header = ModelCardData(
        language=sorted(languages) or ["en", "zh"],
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
        f"# {name}\n\nA small vision-language model of {size / 1e6:,.1f} million parameters, made with MiniVLM: "
        "pictures and questions in, answers out.",
        "## Use\n\n" + SNIPPET.format(repo_id=repo_id),
        results(metrics),
        training(run, bool(plot)),
        fold("Recipe", recipe(folder, options), "yaml") if options else "",
        "## Training data\n\n" + "\n".join(f"- `{s}`" for s in options["data"]) if options.get("data") else "",
    ]
    body = anonymous("\n\n".join(filter(None, parts)))
    put(path, str(ModelCard(f"---\n{header}\n---\n\n{body}\n")).encode())


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


def cells(metrics: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Metric, its title, what it is of (`name-en`, "" for all) and the figures, for each share of an evaluation."""
    if metrics.get("overall"):
        yield "exact_match", "Exact match", "", metrics["overall"]
    for key, metric, title in (("tasks", "exact_match", "Exact match"), ("ranked", "accuracy", "Likeliest option")):
        for task, languages in metrics.get(key, {}).items():
            for language, cell in languages.items():
                yield metric, title, f"{task}-{language}", cell


def evidence(cell: dict) -> str:
    return f"{cell['hits']} of {cell['count']}, 95 % interval {cell['low']:.4f} to {cell['high']:.4f}"


def eval_results(metrics: dict, sources: list[str]) -> list[EvalResult]:
    """The model-index: one entry per task and language, and one over all of them."""
    hub = [source.split(":")[1] for source in sources if source.startswith("hub:")]
    data = {"dataset_type": hub[0] if hub else "custom", "dataset_name": anonymous(", ".join(sources)) or "evaluation"}
    return [
        EvalResult(
            "image-text-to-text", metric_type=metric, metric_name=f"{title} ({evidence(cell)})",
            metric_value=cell["match"], dataset_config=part or None, **data,
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip


def own_results(metrics: dict) -> list[EvalResult]:
    """The model-index of the released weights, on the data that lies beside them."""
    return [
        EvalResult(
            "image-text-to-text", dataset_type=OWN_REPO, dataset_name="MiniVLM emoji", dataset_config="default",
            dataset_split="test", metric_type=metric, metric_value=cell["match"],
            metric_name=f"{title}, {part or 'overall'} ({evidence(cell)})",
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip


def own_entries(metrics: dict) -> list[dict]:
    """The same for `.eval_results/`, which the Hub reads today; `-likeliest` marks tasks whose options were ranked."""
    return [
        {
            "dataset": {
                "id": OWN_REPO,
                "task_id": (part or "overall") + ("-likeliest" if metric == "accuracy" else ""),
            },
            "value": cell["match"],
            "notes": f"{title}: {evidence(cell)}",
        }
        for metric, title, part, cell in cells(metrics)
    ]


def write_own(root: Path) -> list[Path]:
    """Write data/results.json into the header of README.md, whose other keys stay, and .eval_results/minivlm.yaml."""
    metrics = json.loads((root / "data" / "results.json").read_text(encoding="utf-8"))
    readme, entries = root / "README.md", root / ".eval_results" / "minivlm.yaml"
    card = ModelCard(readme.read_text(encoding="utf-8"))
    card.data.datasets, card.data.model_name = [OWN_REPO], OWN_REPO.split("/")[1]
    card.data.eval_results = own_results(metrics)
    put(readme, str(card).encode())
    entries.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(own_entries(metrics), sort_keys=False, width=110)
    put(entries, text.encode())
    return [readme, entries]


def results(metrics: dict) -> str:
    tables = []
    for key, title in (("tasks", "exact match"), ("ranked", "likeliest option")):
        rows = [(task, lang, cell) for task, langs in metrics.get(key, {}).items() for lang, cell in langs.items()]
        if key == "tasks" and metrics.get("overall"):
            rows.append(("overall", "", metrics["overall"]))
        lines = [
            f"| {task} | {lang} | {c['match']:.1%} | {c['hits']} of {c['count']} | {c['low']:.1%} to {c['high']:.1%} |"
            for task, lang, c in rows
        ]
        if lines:
            tables.append(
                "\n".join([f"| task | language | {title} | right | 95 % interval |", "|---|---|---|---|---|", *lines])
            )
    return "\n\n".join(["## Results", *tables]) if tables else ""


def training(run: dict, plot: bool) -> str:
    """What the model was trained on, with and for how long."""
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
    if path := beside(folder, "recipe.yaml"):
        return path.read_text(encoding="utf-8")
    chosen = {name: value for name, value in options.items() if name not in PLACES and value not in (None, "", [], {})}
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def fold(title: str, text: str, language: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```{language}\n{text.strip()}\n```\n\n</details>" if text else ""


def anonymous(text: str) -> str:
    """Without tokens and the folders of somebody's machine, before it is shown to everybody."""
    return re.sub(r"(?<![\w.~:/)-])/(?:[^\s/'\"`,\[\]{}<>]+/)+", "", scrub(text))


def beside(folder: Path, name: str) -> Path | None:
    """What a run left in the folder of the model or the one above."""
    return next((path for path in (folder / name, folder.resolve().parent / name) if path.is_file()), None)


def read_run(folder: Path) -> dict | None:
    path = beside(folder, "run.json")
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def put(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, and through no hard link of it."""
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_bytes(content)
    os.replace(partial_path, path)


def read_header(path: Path) -> dict[str, dict]:
    """Type, shape and place of each tensor of a safetensors file.

    Raises:
        ValueError: the file ends before its tensors do, or is git-lfs's pointer to them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 8 + length <= size else None
    if header is not None:
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if header is None or size != end:
        raise ValueError(f"{path.name} is no whole safetensors file ({size:,} bytes). Save or copy it again")
    return header


def secret() -> str | None:
    try:
        return get_token()
    except Exception:  # whatever kept it from being read is no news while another failure is told
        return None


def scrub(text: str) -> str:
    """`text` without the token, which a proxy or server may have repeated in its answer."""
    if token := secret():
        text = text.replace(token, "***")
    return re.sub(r"\bhf_(oauth_|jwt_)?[A-Za-z0-9]{20,}[\w.-]*|(?<=Bearer )\S+", "***", text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.model_card", description=__doc__.split("\n")[2].strip())
    parser.add_argument("--root", type=Path, default=Path("."), help="Folder with README.md and data/results.json.")
    for path in write_own(parser.parse_args(argv).root):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
