"""Write docs/ from a trained model: results, contact sheets, confusions, accuracy, the loss and maps of attention.

    python -m tools.docs runs/X
    python -m tools.docs runs/X --output runs/X/docs --limit 200

It takes the answers in runs/X/results, which `python -m tools.release runs/X` left there. What is missing, or of other
weights, is measured first. The model is runs/X/release if it is there, else runs/X/final. All files together have at
most 3 MB. Drawing needs matplotlib (pip install matplotlib).
"""

import json
import sys
from pathlib import Path

from minivlm.cli import Parser, positive, run_command
from minivlm.hub.card import put
from minivlm.model.loading import load_trained
from minivlm.training.plotting import plot
from tools.release import model_folder
from tools.report import plots
from tools.report.answers import add_categories, attention_of, contact_sheets, read_rows
from tools.report.measure import FILES, measure, merge, read
from tools.report.tables import cost, full_page

MOST = 3 * 10**6  # bytes of all files
PLOTS = {  # file -> how it is drawn, and its title on the page
    "confusions.png": (plots.plot_confusions, "What is taken for what"),
    "by_style.png": (plots.plot_styles, "By drawing style"),
    "by_category.png": (plots.plot_categories, "By category of the thing, test style"),
}


def draw(run: Path, model_path: Path, root: Path, output: Path, names: list[str]) -> dict[str, str]:
    """Draw all pictures into `output`; return file name and title of each."""
    model, processor = load_trained(model_path)
    model.float()
    tables, answers = read_rows(run / "results", root, names)
    add_categories(answers, root)
    drawn = {}
    for name, (function, title) in PLOTS.items():
        if function(answers, output / name):
            drawn[name] = title
    if (run / "log.jsonl").is_file():
        plot([run], output / "loss.png")
        drawn["loss.png"] = "Loss while training"
    else:
        print(f"{run}: no log.jsonl, so no curve of the loss.")
    if sheet := attention_of(tables, answers, model, processor):
        sheet.save(output / "attention.png", optimize=True)
        drawn["attention.png"] = "Where the decoder looks before it writes a name: more red, more attention"
    for task, sheet in contact_sheets(tables, answers, processor, 8).items():
        name = f"contact_sheet_{task}.png"
        sheet.save(output / name, optimize=True)
        drawn[name] = f"First questions of the task {task}"
    return drawn


def write(run: Path, root: Path, output: Path, limit: int | None) -> list[Path]:
    """Measure what is missing, write all files of the folder, and return their paths.

    Raises:
        ValueError: the files are larger than 3 MB together.
    """
    release = run / "release"
    model_path = release if (release / "config.json").is_file() else model_folder(run)
    names = [name for name in FILES if (root / "data" / f"{name}.parquet").is_file()]
    records = {path.stem: read(path) for path in measure(model_path, run / "results", root, names, limit)}
    output.mkdir(parents=True, exist_ok=True)
    for old in [output / "attention.png", output / "loss.png", *output.glob("contact_sheet_*.png")]:
        old.unlink(missing_ok=True)  # of another model, whose tasks may have been others
    drawn = draw(run, model_path, root, output, names)
    pictures = "\n\n".join(f"### {title}\n\n![{title}]({name})" for name, title in drawn.items())
    record = run / "run.json"
    parts = [cost(json.loads(record.read_text(encoding="utf-8")))] if record.is_file() else []
    page = "\n\n".join([full_page(merge(records)).rstrip(), *parts, "## Pictures", pictures])
    put(output / "results.md", f"{page}\n".encode())
    paths = [output / "results.md", *(output / name for name in drawn)]
    total = sum(path.stat().st_size for path in paths)
    if total > MOST:
        raise ValueError(
            f"{output}: {total / 1e6:.1f} MB, at most {MOST / 1e6:.0f}. Lower COLORS in tools/report/answers.py."
        )
    return paths


def main(argv: list[str] | None = None) -> None:
    """Write the folder and print its files."""
    parser = Parser(__doc__, prog="python -m tools.docs")
    parser.add_argument("run", type=Path, help="Folder of a training run (output_dir), with final/ in it.")
    parser.add_argument("--output", type=Path, help="Folder to write. Default: docs/ of the checkout.")
    parser.add_argument("--limit", type=positive, help="Answer only the first rows of each file, for a trial.")
    parser.add_argument("--root", type=Path, default=Path("."), help="Checkout to read data from.")
    args = parser.parse_args(argv)
    for path in write(args.run, args.root, args.output or args.root / "docs", args.limit):
        print(f"written: {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    sys.exit(run_command(main))
