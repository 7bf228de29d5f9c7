"""Measure what each part of the recipe is worth: one change at a time, three seeds, one table.

    python -m tools.ablations --output runs/ablations
    python -m tools.ablations --output runs/ablations --only base blind --seeds 0

Each run is the demo (recipes/demo.yaml: released tower, new projector and decoder, 96 things) with a fixed number of
steps instead of a time, so that a busy machine does not change the result. What is finished is not run again, so the
command can be interrupted. The table has the mean over the seeds, and the 95 % confidence interval of the share of
right answers over all of them (Wilson 1927). It is printed and written to OUTPUT/ablations.md.
"""

import argparse
import json
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import train_accelerate
from minivlm.cli import Parser, positive, run_command
from minivlm.commands.evaluate import main as evaluate
from minivlm.evaluation.scoring import wilson
from tools.demo import RECIPE, TEST_DATA, align_to_the_released_tower

COLUMNS = {  # title of the column -> key of the metrics and task
    "name": ("tasks", "name"), "choice": ("tasks", "choice"), "likeliest": ("ranked", "choice"),
    "yes/no": ("tasks", "yes_no"), "category": ("tasks", "category"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Describe one change to the demo.

    Args:
        title: name of the row of the table.
        config: values that replace those of config.json; those of `text_config` are merged.
        data: module of the composer.
        aligned: False leaves out the alignment.
        options: options of training that replace those of the recipe.
    """

    title: str
    config: dict = field(default_factory=dict)
    data: str = "tools.emoji.demo_composer"
    aligned: bool = True
    options: dict = field(default_factory=dict)


VARIANTS = {
    "base": Variant("the demo"),
    "blind": Variant("blind: every picture is grey", data="tools.ablations.blind"),
    "five_styles": Variant("five training styles instead of eleven", data="tools.ablations.five_styles"),
    "not_redrawn": Variant("drawings are not changed", data="tools.ablations.not_redrawn"),
    "no_scenes": Variant("no scenes", data="tools.ablations.no_scenes"),
    "not_grounded": Variant("without the grounding loss", options={"grounding_loss": 0.0}),
    "not_aligned": Variant("without the alignment", aligned=False),
    "tokens_16": Variant("16 image tokens instead of 64", {"pixel_shuffle_factor": 2}),
    "linear": Variant("projector: one matrix", {"projector_type": "linear"}),
    "no_norm": Variant("projector: no layer norm", {"projector_layer_norm": False}),
    "layers_4": Variant("4 blocks instead of 8", {"text_config": {"num_hidden_layers": 4}}),
    "heads_1": Variant("one key-value head instead of three", {"text_config": {"num_key_value_heads": 1}}),
    "tower_trains": Variant("the tower trains, too", options={"train": ["vision", "projector", "text"]}),
}  # fmt: skip


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.ablations")
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/ablations"), help="folder for all runs (default: runs/ablations)")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"variants to run, of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    add("--steps", type=positive, default=400, help="optimizer steps of each run (default: 400)")
    return parser.parse_args(argv)


def architecture(variant: Variant) -> dict:
    """Return the configuration of the released model with the changes of a variant."""
    config = json.loads(Path("config.json").read_text(encoding="utf-8"))
    changes = deepcopy(variant.config)
    config["text_config"] |= changes.pop("text_config", {})
    return config | changes


def run(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and evaluate a variant with a seed; return its metrics. A finished run is read."""
    variant, folder = VARIANTS[name], args.output / name / str(seed)
    results = folder / "results.json"
    if results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(architecture(variant), indent=1), encoding="utf-8")
    options = [] if variant.aligned else ["--pictures", "64", "--passes", "0"]
    start = align_to_the_released_tower(folder, str(config), ["--seed", str(seed), *options])
    recipe = yaml.safe_load(Path(RECIPE).read_text(encoding="utf-8"))
    del recipe["max_minutes"]
    recipe |= {"model": str(start), "data": [f"compose:{variant.data}"], "seed": seed, "max_steps": args.steps}
    recipe |= {"output_dir": str(folder / "run")} | variant.options
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    final = train_accelerate.main(["--recipe", str(path)])
    return evaluate([str(final), "--data", TEST_DATA, "--json", str(results)])


def cells(metrics: list[dict]) -> list[str]:
    """Return the mean share of right answers and its interval for each column, over the runs of a variant."""
    found = []
    for key, task in COLUMNS.values():
        parts = [cell for m in metrics for cell in m[key].get(task, {}).values()]
        hits, count = sum(part["hits"] for part in parts), sum(part["count"] for part in parts)
        low, high = wilson(hits, count)
        found.append(f"{hits / count:.1%} ({low:.0%} - {high:.0%})" if count else "")
    return found


def main(argv=None) -> None:
    """Run what is not finished, print the table and write it."""
    args = parse_args(argv)
    lines = [f"| {' | '.join(['change', 'seeds', *COLUMNS])} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in args.only:
        metrics = [run(name, seed, args) for seed in args.seeds]
        lines.append(f"| {VARIANTS[name].title} | {len(metrics)} | {' | '.join(cells(metrics))} |")
    table = "\n".join(lines)
    (args.output / "ablations.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    sys.exit(run_command(main))
