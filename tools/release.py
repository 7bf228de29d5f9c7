"""Make a release from the folder of a run: cast the weights, measure them, copy them here, write the results.

    python -m tools.release runs/X                       # all four steps
    python -m tools.release runs/X --evaluate --write    # these steps only
    python -m tools.release runs/X --dtype float16

Each step can be repeated. Without a step all four run in this order:
    --cast      runs/X/release: the model with its weights as bfloat16 or float16
    --evaluate  runs/X/results: a JSON file and a file of answers for each evaluation file, on the cast weights;
                a file that was measured with the same weights is not measured again
    --copy      weights and configurations to the root
    --write     data/results.json, the tables of README.md and README_zh.md, model-index, .eval_results
Afterwards: python -m tools.docs runs/X, then minivlm publish . --check --repo_id jinv2/minivlm.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from minivlm.cli import Parser, positive, run_command
from minivlm.hub.card import put
from minivlm.model.loading import load_processor, load_trained, save_model
from minivlm.resources import digest
from tools.card import write_own
from tools.report.measure import FILES, combine, measure
from tools.report.tables import put_table, short_table

STEPS = {
    "cast": "Write the model with smaller weights to runs/X/release.",
    "evaluate": "Answer the evaluation files, into runs/X/results.",
    "copy": "Copy the cast model to the root.",
    "write": "Write the results into data/, README.md, README_zh.md and .eval_results/.",
}
COPIED = ("model.safetensors", "config.json", "generation_config.json", "processor_config.json")


def model_folder(run: Path) -> Path:
    """Return the folder of the model: `run` itself, or final/ in it.

    Raises:
        ValueError: neither holds a model.
    """
    for folder in (run, run / "final"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{run}: no config.json there or in final/. Give the output_dir of a training run.")


def cast(run: Path, dtype: str) -> Path:
    """Save the run's model in runs/X/release with weights of this type; return that folder.

    Raises:
        ValueError: a weight does not fit into the type.
    """
    model, processor = load_trained(model_folder(run))
    model.to(getattr(torch, dtype))
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ValueError(f"{', '.join(broken[:3])}: not finite as {dtype}. Use --dtype bfloat16, or look at the run.")
    folder = run / "release"
    save_model(model, processor, folder)
    # AutoModel computes in the type that config.json names, not in that of the weights. A model this small is fast
    # enough in fp32 everywhere, and nine times as fast as in bf16 on a processor without the instructions.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    put(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    size = (folder / "model.safetensors").stat().st_size
    print(f"cast: {folder}, {model.num_parameters() / 1e6:.1f} M parameters, {size / 1e6:.1f} MB as {dtype}")
    return folder


def copy_model(release: Path, root: Path) -> None:
    """Copy weights and configurations to the root.

    Raises:
        ValueError: the model has another tokenizer or chat template than the root. It is not copied by this command.
    """
    ours, other = load_processor(root), load_processor(release)
    same = ours.tokenizer.get_vocab() == other.tokenizer.get_vocab() and ours.chat_template == other.chat_template
    if not same:
        raise ValueError(
            f"{release}: its tokenizer or chat template is not that of {root}. Copy these files to minivlm/assets and "
            "to the root first, see CONTRIBUTING.md, Assets."
        )
    for name in COPIED:
        shutil.copyfile(release / name, root / name)
        print(f"copied: {root / name}")


def write_results(results: Path, root: Path) -> None:
    """Write data/results.json and everything that shows it: both README files, model-index, .eval_results.

    Raises:
        ValueError: the results are not complete, or not of the weights in the root.
    """
    combined = combine(results)
    if combined["weights_sha256"] != digest(root / "model.safetensors"):
        raise ValueError(f"{results}: measured with other weights than those of {root}. Run the step --copy first.")
    put(root / "data" / "results.json", (json.dumps(combined, indent=1, ensure_ascii=False) + "\n").encode())
    for name, chinese in (("README.md", False), ("README_zh.md", True)):
        text = (root / name).read_text(encoding="utf-8")
        put(root / name, put_table(text, short_table(combined, chinese)).encode())
    for path in (root / "data" / "results.json", root / "README_zh.md", *write_own(root)):
        print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    """Run the chosen steps, in the order of the list."""
    parser = Parser(__doc__, prog="python -m tools.release")
    parser.add_argument("run", type=Path, help="Folder of a training run (output_dir), with final/ in it.")
    for name, text in STEPS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="Type of the weights.")
    parser.add_argument(
        "--files", nargs="+", choices=list(FILES), default=list(FILES), help="What --evaluate answers."
    )
    parser.add_argument("--limit", type=positive, help="Answer only the first rows of each file, for a trial.")
    parser.add_argument("--root", type=Path, default=Path("."), help="Checkout to read data from and to write to.")
    args = parser.parse_args(argv)
    chosen = [name for name in STEPS if getattr(args, name)] or list(STEPS)
    release, results = args.run / "release", args.run / "results"
    if "cast" in chosen:
        cast(args.run, args.dtype)
    elif not (release / "model.safetensors").is_file() and {"evaluate", "copy"} & set(chosen):
        raise ValueError(f"{release}: no model yet. Run the step --cast first.")
    if "evaluate" in chosen:
        measure(release, results, args.root, args.files, args.limit)
    if "copy" in chosen:
        copy_model(release, args.root)
    if "write" in chosen:
        write_results(results, args.root)


if __name__ == "__main__":
    sys.exit(run_command(main))
