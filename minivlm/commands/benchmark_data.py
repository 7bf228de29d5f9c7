"""Measure how fast rows become batches, where the time goes, and how fast MiniMind-V's data set class is.

    minivlm benchmark-data
    minivlm benchmark-data --minimind_v FOLDER     (a checkout of its repository)

Both read the same rows with the same tokenizer and image processor, and take turns round by round.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.data.encoder import Encoder
from minivlm.evaluation.benchmarks import compare_readers, draw_rows, minimind_v_reader, packed_reader, time_stages
from minivlm.model.loading import load_processor


def main(argv: list[str] | None = None) -> None:
    """Print the time of each stage, then the rows per second of each reader."""
    parser = Parser(__doc__, prog="minivlm benchmark-data")
    parser.add_argument("--data", default="data/train.parquet", help="A parquet file with MiniMind-V's columns.")
    parser.add_argument("--model", default=".", help="Folder or Hub id of the processor.")
    parser.add_argument("--rows", type=positive, default=2000, help="Rows to read in a round, drawn at random.")
    parser.add_argument("--rounds", type=positive, default=5, help="Rounds; each reader reads once in each.")
    parser.add_argument(
        "--workers", type=partial(positive, least=0), nargs="+", default=[0, 1, 2], help="Numbers of worker processes."
    )
    parser.add_argument("--minimind_v", metavar="FOLDER", help="A checkout of MiniMind-V to compare with.")
    parser.add_argument("--batch_size", type=positive, default=16, help="Rows of a batch of MiniMind-V's.")
    args = parser.parse_args(argv)
    encoder = Encoder(load_processor(args.model))
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder) / "rows.parquet")
        count = draw_rows(args.data, args.rows, source)
        for name, seconds in time_stages(source, encoder, count).items():
            print(f"{name:<24}{1e6 * seconds / count:>10,.0f} us a row")
        readers = {"MiniVLM, packs of 4,096": packed_reader(source, encoder)}
        if args.minimind_v:
            reader = minimind_v_reader(args.minimind_v, source, encoder, args.batch_size)
            readers["MiniMind-V, padded to 512"] = reader
        for name, workers, rates in compare_readers(readers, args.workers, args.rounds):
            low, middle, high = min(rates), statistics.median(rates), max(rates)
            print(f"{name:<28}{workers} workers{middle:>10,.0f} rows/s  ({low:,.0f} to {high:,.0f})", flush=True)
