"""Answer the questions of a data set and count the right answers.

    minivlm evaluate --data data/test.parquet
    minivlm evaluate runs/train/final --data my_questions.jsonl --json scores.json --answers answers.jsonl
    minivlm evaluate --data data/test_photos.parquet --among name
    minivlm evaluate runs/train/final --tasks mmstar pope --json benchmarks.json

An answer is right if it equals the reference after trimming, case folding and dropping a closing full stop. Where the
data has a column `box` (left, top, right, bottom in per cent of the picture), two tasks have a rule of their own:
`point` is right inside the box, `box` is right if its overlap (IoU) with the true box is at least 0.5.

Captions stay out of the overall share. A table shows the mean F1 of their content words, which data/README.md defines.

Where the data has a column `options`, they are also ranked: right if the reference is the one of them that the model
finds the likeliest answer. Benchmarks of several choices are usually scored so; a blind guess among four gets a
quarter. `--among name` ranks all answers to the task `name` in this way, those of each language for themselves.

Every figure comes with its count and a 95 % confidence interval, per task and language: Wilson's (1927) for shares,
the normal approximation for content words.

`--tasks` runs public benchmarks instead, by lmms-eval with its prompts and metrics: mmstar, mme, pope, textvqa (val),
scienceqa (test, questions with a picture), mmbench_en, mmbench_cn (dev), ocrbench, coco_captions (2017 val, CIDEr and
others; needs Java). lmms-eval downloads their data sets from the Hub, from about 0.1 GB (ocrbench) to several GB
(textvqa, coco_captions), and asks the Hub with your token: `hf auth login` once. No judge is asked and no other key is
needed: an answer to MMBench that names no choice is wrong, where the official score lets a GPT guess the choice. A
prompt that is too long for the model gets an empty answer; their number is printed.
"""

import json
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.evaluation.public import BENCHMARKS, check_tasks, print_results, run_benchmarks
from minivlm.resources import digest


def parse_args(argv: list[str] | None):
    """Return the options of the command."""
    parser = Parser(__doc__, prog="minivlm evaluate")
    parser.add_argument("model", nargs="?", default=".", help="Folder or Hub id of a model. Default: this folder.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", nargs="+", default=["data/test.parquet"], help="Files, folders or globs, as for training."
    )
    source.add_argument("--tasks", nargs="+", metavar="NAME", help=f"Public benchmarks: {', '.join(BENCHMARKS)}.")
    parser.add_argument("--limit", type=positive, help="Answer only the first rows (of each task). Default: all.")
    parser.add_argument("--batch_size", type=positive, default=64, help="Rows answered at once. Default: 64.")
    parser.add_argument(
        "--among", nargs="+", default=[], metavar="TASK",
        help="Tasks whose rows also rank all answers that the answered rows have for this task and language.",
    )  # fmt: skip
    parser.add_argument("--device", help="Where to compute. Default: cuda if there is one, else cpu.")
    parser.add_argument("--json", type=Path, help="Also write the metrics to this file.")
    parser.add_argument("--answers", type=Path, help="Also write every reference and answer to this JSON-lines file.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Print the table of scores; return the metrics."""
    args = parse_args(argv)
    if args.tasks and args.among:
        raise ValueError(f"--among {' '.join(args.among)}: ranks rows of --data. Leave it out with --tasks.")
    from minivlm.model.loading import check_device, check_name

    args.device = check_device(args.device)
    check_name("", args.model)
    metrics = score_benchmarks(args) if args.tasks else score_data(args)
    answers = metrics.pop("answers")
    if args.json:
        weights = Path(args.model) / "model.safetensors"
        source = {"tasks": args.tasks} if args.tasks else {"data": args.data}
        record = {"model": args.model, **source, "limit": args.limit, "device": args.device}
        if args.among:
            record["among"] = args.among
        if weights.is_file():
            record["weights_sha256"] = digest(weights)
        args.json.write_text(json.dumps(record | metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.answers:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers]
        args.answers.write_text("".join(lines), encoding="utf-8")
    return metrics


def score_data(args) -> dict:
    """Print the table of scores on `--data`; return the metrics."""
    from minivlm.data.rows import load_rows
    from minivlm.evaluation.scoring import evaluate, print_table
    from minivlm.model.loading import load_trained, place

    rows = load_rows(args.data)  # before the model: a wrong path should not cost a download
    model, processor = load_trained(args.model)
    metrics = evaluate(place(model, args.device), processor, rows, args.limit, args.batch_size, args.among)
    print_table(metrics)
    return metrics


def score_benchmarks(args) -> dict:
    """Print the table of the benchmarks `--tasks`; return their results."""
    names = list(dict.fromkeys(args.tasks))
    check_tasks(names, args.limit)
    from minivlm.evaluation.lmms_adapter import MiniVLM  # needs lmms-eval, which is an extra

    found = run_benchmarks(MiniVLM(args.model, args.batch_size, args.device), names, args.limit)
    print_results(found)
    return found
