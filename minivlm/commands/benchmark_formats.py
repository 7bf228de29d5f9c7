"""Measure a trained model in its formats: as it is, as ONNX graphs and as GGUF files.

    minivlm benchmark-formats runs/train/final --rows 300 --json runs/train/final/formats.json
    minivlm benchmark-formats runs/train/final --server vLLM=http://127.0.0.1:8000/v1

For each format the table has the size, the share of right answers, the answers like those of transformers, and the
speed. A server that speaks OpenAI's chat completions is asked the same. `minivlm publish` puts a record with the name
formats.json into the model's card.
"""

import json
import tempfile
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from minivlm.benchmark.formats import measure_formats
from minivlm.benchmark.measure import machine
from minivlm.benchmark.remote import Server
from minivlm.cli import Parser, positive
from minivlm.convert.formats import make_formats
from minivlm.data.rows import load_rows
from minivlm.hub.format_table import formats_notes, formats_table
from minivlm.hub.secrets import anonymous
from minivlm.resources import default_model, digest


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options."""
    parser = Parser(__doc__, prog="minivlm benchmark-formats")
    add = parser.add_argument
    add("model", nargs="?", help="Folder of a model. Default: this folder, or the checkout.")
    add("--data", default="data/test.parquet", help="Rows with questions. Default: data/test.parquet.")
    add("--rows", type=positive, default=300, help="How many of them, from the first on. Default: 300.")
    add("--threads", type=positive, default=1, help="Threads of each engine. Default: 1.")
    add(
        "--server", metavar="NAME=URL", action="append", type=named_url, default=[],
        help="Also ask this server, and call it NAME in the table. Its key, if it wants one: the environment variable "
        "OPENAI_API_KEY. Can be given several times.",
    )  # fmt: skip
    add("--json", metavar="FILE", help="Also write the record to this file.")
    return parser.parse_args(argv)


def named_url(text: str) -> tuple[str, str]:
    """Return the name and the URL of a server, as a type of `add_argument`."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise ArgumentTypeError(f"{text}: must be NAME=URL, as vLLM=http://127.0.0.1:8000/v1.")
    return name, url


def versions() -> dict[str, str]:
    """Return the versions of the engines that are installed."""
    found = {}
    for name in ("onnxruntime", "llama_cpp_python"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(argv: list[str] | None = None) -> None:
    """Make the formats of a model, measure them, print the table, and write the record."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    source = Path(args.model or default_model())
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json. Name the folder of a model, as runs/train/final.")
    servers = {name: Server(url) for name, url in args.server}
    rows = load_rows([args.data])
    rows = rows.select(range(min(args.rows, len(rows))))
    with tempfile.TemporaryDirectory() as place:
        made, refused = make_formats(source, Path(place))
        found = measure_formats(source, made, rows, args.threads, servers)
    weights = source / "model.safetensors"
    record = {
        "weights_sha256": digest(weights) if weights.is_file() else None,
        "data": anonymous(args.data),
        "rows": len(rows),
        "machine": machine() | versions(),
        "formats": found,
        "servers": list(servers),
        "refused": {name: anonymous(reason) for name, reason in refused.items()},
    }
    print(f"{formats_table(record)}\n\n{formats_notes(record)}")
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
