"""Measure how fast the model trains and answers, and its memory, beside its peers and the machine's floor.

    minivlm benchmark training
    minivlm benchmark training answers --shape . --threads 2 --json speed.json
    minivlm benchmark --minimind_v FOLDER     (a checkout of its repository)

All sides have random weights, the same sizes and the same rows, and take turns; figures are medians over rounds, with
the lowest and the highest. The floor is the time of the matrix products alone, at the same sizes and precision. Memory
is what torch holds at most in a training step, gradients included, beside the weights.
"""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from minivlm.benchmark.answering import DTYPES, time_answers
from minivlm.benchmark.floors import training_floor
from minivlm.benchmark.graphs import export_graphs
from minivlm.benchmark.measure import alternate, machine, summarise
from minivlm.benchmark.memory import peak_bytes
from minivlm.benchmark.rows import Rows, draw_lengths, make_rows
from minivlm.benchmark.shapes import SHAPES, Shape, make_ours, read_shape
from minivlm.benchmark.training import training_sides
from minivlm.cli import Parser, positive
from minivlm.training.precision import supports_bf16

TOPICS = ("training", "memory", "answers")


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm benchmark")
    add = parser.add_argument
    add("topics", nargs="*", metavar="TOPIC", help="training, memory, answers. Default: all.")
    add("--shape", default="minimind-3v", help=f"{', '.join(SHAPES)}, or a model's folder. Default: minimind-3v.")
    add("--rows", type=positive, nargs="+", default=[4, 12], help="Rows of a training step. Default: 4 12.")
    add("--tokens", type=positive, help="Tokens of each row. Default: captions and instructions of many lengths.")
    add("--batch", type=positive, nargs="+", default=[1, 8], help="Answers at once. Default: 1 8.")
    add("--rounds", type=positive, default=5, help="Rounds that count. Default: 5.")
    add("--threads", type=positive, default=1, help="Threads of torch. Default: 1.")
    add("--dtype", choices=("float32", "bfloat16"), help="Of training. Default: bfloat16 where "
        "the processor has instructions for it, else float32.")  # fmt: skip
    add("--minimind_v", metavar="FOLDER", help="A checkout of MiniMind-V to compare with.")
    add("--json", metavar="FILE", help="Also write all times to this file.")
    args = parser.parse_args(argv)
    if unknown := set(args.topics) - set(TOPICS):
        parser.error(f"{sorted(unknown)[0]} is no topic. Topics are {', '.join(TOPICS)}.")
    args.bf16 = supports_bf16(torch.device("cpu"))
    args.dtype = args.dtype or ("bfloat16" if args.bf16 else "float32")
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


def choose_rows(shape: Shape, args: Namespace) -> list[Rows]:
    """Return the rows of each training step that is measured."""
    return [
        make_rows(shape, [args.tokens] * count if args.tokens else draw_lengths(shape, count)) for count in args.rows
    ]


def benchmark_training(shape: Shape, args: Namespace) -> list[dict]:
    """Time training steps of each number of rows; return the tables."""
    tables, dtype = [], getattr(torch, args.dtype)
    for rows in choose_rows(shape, args):
        sides = training_sides(shape, rows, dtype, args.minimind_v)
        sides["floor: the matrix products alone"] = training_floor(shape, rows, dtype)
        seconds = alternate(sides, args.rounds)
        rates = summarise(seconds, len(rows.samples), next(iter(sides)))
        table = show(f"training step, {rows.sizes}, {args.dtype}", "rows/s", rates)
        tables.append(table | {"seconds": seconds})
    return tables


def benchmark_memory(shape: Shape, args: Namespace) -> list[dict]:
    """Measure the most memory that a training step of each number of rows holds; return the tables."""
    tables, dtype, weights = [], getattr(torch, args.dtype), 4 * make_ours(shape).num_parameters()
    for rows in choose_rows(shape, args):
        peaks = {}
        for name, step in training_sides(shape, rows, dtype, args.minimind_v).items():
            step()  # compiles
            peaks[name] = peak_bytes(step)
        base = next(iter(peaks.values()))
        title = f"memory of a training step beside {weights / 2**20:,.0f} MiB of weights, {rows.sizes}, {args.dtype}"
        say(f"\n**{title}**\n\n| side | MiB | ratio |\n|---|---|---|")
        for name, peak in peaks.items():
            say(f"| {name} | {peak / 2**20:,.0f} | {peak / base:.2f} |")
        tables.append({"title": title, "unit": "bytes", "sides": peaks})
    return tables


def benchmark_answers(shape: Shape, args: Namespace) -> list[dict]:
    """Time answers of each number at once; return the tables."""
    tables = []
    with tempfile.TemporaryDirectory() as place:
        graphs = export_graphs(shape, Path(place))
        words = [word for word in DTYPES if args.bf16 or word != "bf16"]
        for batch in args.batch:
            first, further = time_answers(shape, batch, args.rounds, args.minimind_v, graphs, words)
            base = next(iter(first))
            for title, unit, seconds, amount in (
                (f"first token, {batch} at once", "per second", first, batch),
                (f"further tokens, {batch} at once", "tokens/s", further, batch * shape.answer),
            ):
                table = show(title, unit, summarise(seconds, amount, base))
                tables.append(table | {"seconds": seconds})
    return tables


def main(argv: list[str] | None = None) -> None:
    """Print the tables of the topics."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = read_shape(args.shape)
    about = machine() | {"shape": args.shape, "rounds": args.rounds}
    say("\n".join(f"{key}: {value}" for key, value in about.items()))
    if not shape.fits_llava:
        say("no LLaVA + Qwen 3: LLaVA takes no tower of this type")
    works = {"training": benchmark_training, "memory": benchmark_memory, "answers": benchmark_answers}
    tables = [table for topic in args.topics or TOPICS for table in works[topic](shape, args)]
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "tables": tables}, indent=1))
