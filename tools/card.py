"""Write the results of the released weights into the model card of this repository.

    python -m tools.card

It reads data/results.json, which `minivlm evaluate --json` writes, and writes the results twice: as `model-index` into
the header of README.md, and as .eval_results/minivlm.yaml, which the Hub reads today.
"""

import json
import sys
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from minivlm.cli import Parser, run_command
from minivlm.hub.card import put
from minivlm.hub.results import KINDS, cells, evidence
from minivlm.resources import HUB_MODEL


def own_results(metrics: dict) -> list[EvalResult]:
    """Return the model-index of the released weights, on the data that lies beside them."""
    return [
        EvalResult(
            "image-text-to-text", dataset_type=HUB_MODEL, dataset_name="MiniVLM emoji", dataset_config="default",
            dataset_split="test", metric_type=metric, metric_value=cell["match"],
            metric_name=f"{title}, {part or 'overall'} ({evidence(cell)})",
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip


def own_entries(metrics: dict) -> list[dict]:
    """Return the entries of `.eval_results/`; `-likeliest` and `-words` tell apart the kinds of scores of a task."""
    endings = {title: ending for _, _, title, ending in KINDS}
    return [
        {
            "dataset": {
                "id": HUB_MODEL,
                "task_id": (part or "overall") + endings.get(title, ""),
            },
            "value": cell["match"],
            "notes": f"{title}: {evidence(cell)}",
        }
        for _, title, part, cell in cells(metrics)
    ]


def write_own(root: Path) -> list[Path]:
    """Write data/results.json into the header of README.md, whose other keys stay, and .eval_results/minivlm.yaml."""
    metrics = json.loads((root / "data" / "results.json").read_text(encoding="utf-8"))
    readme, entries = root / "README.md", root / ".eval_results" / "minivlm.yaml"
    card = ModelCard(readme.read_text(encoding="utf-8"))
    card.data.datasets, card.data.model_name = [HUB_MODEL], HUB_MODEL.split("/")[1]
    card.data.eval_results = own_results(metrics)
    put(readme, str(card).encode())
    entries.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(own_entries(metrics), sort_keys=False, width=110)
    put(entries, text.encode())
    return [readme, entries]


def main(argv: list[str] | None = None) -> None:
    """Write both files and print their paths."""
    parser = Parser(__doc__, prog="python -m tools.card")
    parser.add_argument("--root", type=Path, default=Path("."), help="Folder with README.md and data/results.json.")
    for path in write_own(parser.parse_args(argv).root):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
