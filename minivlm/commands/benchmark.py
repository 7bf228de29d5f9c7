"""Measure how fast the model trains and answers, beside its peers and the machine's floor.

    minivlm benchmark training
    minivlm benchmark training answers --shape . --threads 2 --json speed.json
    minivlm benchmark --minimind_v FOLDER     (a checkout of its repository)
    minivlm benchmark formats --model runs/X/final --rows 300 --json runs/X/final/formats.json

formats measures a trained model as it is, as ONNX graphs and as GGUF files: size, right answers, answers like those of
transformers, speed. The other two topics train and ask random weights.

There all sides have the same sizes and the same rows, and take turns; figures are medians over rounds, with
the lowest and the highest. The floor is the time of the matrix products alone, at the same sizes and precision.
"""

import json
import tempfile
from argparse import Namespace
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from minivlm.benchmark.answering import time_answers
from minivlm.benchmark.formats import measure_formats
from minivlm.benchmark.measure import alternate, machine, summarise
from minivlm.benchmark.rows import draw_lengths, make_rows
from minivlm.benchmark.shapes import SHAPES, Shape, read_shape
from minivlm.benchmark.training import training_sides
from minivlm.cli import Parser, positive
from minivlm.convert.formats import make_formats
from minivlm.data.rows import load_rows
from minivlm.hub.format_table import formats_notes, formats_table
from minivlm.hub.secrets import anonymous
from minivlm.resources import default_model, digest

TOPICS = ("training", "answers", "formats")
STEPS, QUESTIONS = [4, 12], 300  # defaults of --rows


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm benchmark")
    add = parser.add_argument
    add("topics", nargs="*", metavar="TOPIC", help="training, answers; or formats alone. Default: training answers.")
    add("--shape", default="minimind-3v", help=f"{', '.join(SHAPES)}, or a model's folder. Default: minimind-3v.")
    add("--model", help="Folder of the model of formats. Default: this folder, or the checkout.")
    add("--data", default="data/test.parquet", help="Questions for formats. Default: data/test.parquet.")
    add("--rows", type=positive, nargs="+", help="Rows of a training step, 4 12; or of --data, the first 300.")
    add("--tokens", type=positive, help="Tokens of each row. Default: captions and instructions of many lengths.")
    add("--batch", type=positive, nargs="+", default=[1, 8], help="Answers at once. Default: 1 8.")
    add("--rounds", type=positive, default=5, help="Rounds that count. Default: 5.")
    add("--threads", type=positive, default=1, help="Threads of torch. Default: 1.")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="Of training. Default: bfloat16.")
    add("--minimind_v", metavar="FOLDER", help="A checkout of MiniMind-V to compare with.")
    add("--json", metavar="FILE", help="Also write all times to this file.")
    args = parser.parse_args(argv)
    if unknown := set(args.topics) - set(TOPICS):
        parser.error(f"{sorted(unknown)[0]} is no topic. Topics are {', '.join(TOPICS)}.")
    if "formats" in args.topics and (len(args.topics) > 1 or len(args.rows or [1]) > 1):
        parser.error("formats stands alone, with one number of --rows: it measures a trained model.")
    args.rows = args.rows or ([QUESTIONS] if "formats" in args.topics else STEPS)
    return args


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def show(title: str, unit: str, rows: list[dict]) -> dict:
    """Print a table of the sides, as Markdown; return it with its title."""
    say(f"\n**{title}**\n\n| side | {unit} | lowest to highest | ratio |\n|---|---|---|---|")
    for row in rows:
        figures = [
            f"{row[key]:,.3g}" if row[key] < 100 else f"{row[key]:,.0f}" for key in ("rate", "lowest", "highest")
        ]
        say(f"| {row['side']} | {figures[0]} | {figures[1]} to {figures[2]} | {row['ratio']:.2f} |")
    return {"title": title, "unit": unit, "sides": rows}


def benchmark_training(shape: Shape, args: Namespace) -> list[dict]:
    """Time training steps of each number of rows; return the tables."""
    tables, dtype = [], getattr(torch, args.dtype)
    for count in args.rows:
        rows = make_rows(shape, [args.tokens] * count if args.tokens else draw_lengths(shape, count))
        sides = training_sides(shape, rows, dtype, args.minimind_v)
        seconds = alternate(sides, args.rounds)
        lengths = [len(sample["input_ids"]) for sample in rows.samples]
        sizes = f"{count} rows of {min(lengths)} to {max(lengths)} tokens, {rows.tokens:,} in all"
        title = f"training step, {sizes}, {args.dtype}"
        table = show(title, "rows/s", summarise(seconds, count, next(iter(sides))))
        tables.append(table | {"seconds": seconds})
    return tables


def benchmark_answers(shape: Shape, args: Namespace) -> list[dict]:
    """Time answers of each number at once; return the tables."""
    tables = []
    for batch in args.batch:
        first, further = time_answers(shape, batch, args.rounds, args.minimind_v)
        base = next(iter(first))
        for title, unit, seconds, amount in (
            (f"first token, {batch} at once", "per second", first, batch),
            (f"further tokens, {batch} at once", "tokens/s", further, batch * shape.answer),
        ):
            table = show(title, unit, summarise(seconds, amount, base))
            tables.append(table | {"seconds": seconds})
    return tables


def benchmark_formats(args: Namespace) -> None:
    """Make the formats of a model, measure them, print the table, and write the record."""
    source = Path(args.model or default_model())
    if not (source / "config.json").is_file():
        raise ValueError(f"--model {source}: no config.json. Name the folder of a model, as runs/train/final.")
    rows = load_rows([args.data])
    rows = rows.select(range(min(args.rows[0], len(rows))))
    with tempfile.TemporaryDirectory() as place:
        made, refused = make_formats(source, Path(place))
        found = measure_formats(source, made, rows, args.threads)
    weights = source / "model.safetensors"
    record = {
        "weights_sha256": digest(weights) if weights.is_file() else None,
        "data": anonymous(args.data),
        "rows": len(rows),
        "machine": machine() | versions(),
        "formats": found,
        "refused": {name: anonymous(reason) for name, reason in refused.items()},
    }
    say(f"{formats_table(record)}\n\n{formats_notes(record)}")
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the engines that are installed."""
    found = {}
    for name in ("onnxruntime", "llama_cpp_python"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the tables of the topics."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.topics == ["formats"]:
        benchmark_formats(args)
        return
    shape = read_shape(args.shape)
    about = machine() | {"shape": args.shape, "rounds": args.rounds}
    say("\n".join(f"{key}: {value}" for key, value in about.items()))
    works = {"training": benchmark_training, "answers": benchmark_answers}
    tables = [table for topic in args.topics or works for table in works[topic](shape, args)]
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "tables": tables}, indent=1))
