"""How fast rows become batches, where the time goes, and how that compares with MiniMind-V's data set class.

    python -m scripts.benchmark_data
    python -m scripts.benchmark_data --minimind_v FOLDER     # a checkout of its repository

Both sides read the same rows, use the same tokenizer and image processor, and take turns round by round.
"""

import argparse
import importlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from batching_minivlm import GlobalBatchSampler, PackingCollator, Packs, measure
from data_minivlm import Encoder, TrainingRows, decode_image
from processing_minivlm import MiniVLMProcessor
from scripts.evaluate import register_config
from sources_minivlm import load_rows


def stages(source: str, encoder: Encoder, count: int) -> dict[str, float]:
    """Seconds of each stage for the first `count` rows, in one process."""
    rows, seconds = load_rows([source]), {}

    def timed(name: str, work: Callable) -> list:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    samples = timed("read and adapt", lambda: [rows.adapt(i) for i in range(count)])
    timed("tokenise and label", lambda: [encoder.words(sample) for sample in samples])
    pictures = timed("decode", lambda: [[decode_image(i) for i in sample["images"]] for sample in samples])
    timed("resize and normalise", lambda: [encoder.pixels(row) for row in pictures if row])
    process = partial(encoder.processor.image_processor, return_tensors="pt")
    timed("  by the processor", lambda: [process(row) for row in pictures if row])
    tokens, pictures = measure(rows.select(range(count)), encoder, quiet=True)
    timed("plan packs", lambda: Packs(tokens, pictures, 1, 4096, 64))
    return seconds


def packed(source: str, encoder: Encoder) -> Callable[[int], int]:
    """Our side: packs of 4,096 tokens, by the classes that the trainer uses."""
    rows = load_rows([source])
    plan = Packs(*measure(rows, encoder, quiet=True), 1, 4096, 64)
    packs = plan.packs(0)[: plan.steps(0)]

    def read(workers: int) -> int:
        dataset, order = TrainingRows(rows, encoder, packed=True), GlobalBatchSampler(plan, 1)
        loader = DataLoader(dataset, batch_sampler=order, collate_fn=PackingCollator(), num_workers=workers)
        for _ in islice(loader, len(packs)):
            pass
        return sum(map(len, packs))

    return read


def minimind_v(folder: str, source: str, encoder: Encoder, batch_size: int) -> Callable[[int], int]:
    """Their side: `VLMDataset` of a checkout, with the length, padding and batches of its own trainer's defaults."""
    sys.path.insert(0, folder)
    processor, module = encoder.processor, importlib.import_module("dataset.lm_dataset")
    dataset = module.VLMDataset(
        source, processor.tokenizer, processor.image_processor, image_token_len=processor.image_seq_length
    )

    def read(workers: int) -> int:
        for _ in DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers):
            pass
        return len(dataset)

    return read


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_data", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/train.parquet", help="A parquet file with MiniMind-V's columns.")
    parser.add_argument("--model", default=".", help="Folder or Hub id of the processor.")
    parser.add_argument("--rows", type=int, default=2000, help="Rows to read in a round, drawn at random.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, each side once in each.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="Numbers of worker processes.")
    parser.add_argument("--minimind_v", metavar="FOLDER", help="A checkout of MiniMind-V to compare with.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows of a batch of MiniMind-V's.")
    args = parser.parse_args(argv)
    register_config()
    encoder = Encoder(MiniVLMProcessor.from_pretrained(args.model))
    with tempfile.TemporaryDirectory() as folder:
        table = pq.read_table(args.data, columns=["conversations", "image_bytes"])
        count = min(args.rows, len(table))
        source = str(Path(folder) / "rows.parquet")
        pq.write_table(table.take(random.Random(0).sample(range(len(table)), count)), source)
        for name, seconds in stages(source, encoder, count).items():
            print(f"{name:<24}{1e6 * seconds / count:>10,.0f} us a row")
        sides = {"MiniVLM, packs of 4,096": packed(source, encoder)}
        if args.minimind_v:
            sides["MiniMind-V, padded to 512"] = minimind_v(args.minimind_v, source, encoder, args.batch_size)
        for workers in args.workers:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, read in sides.items():
                    start = time.perf_counter()
                    rates[name].append(read(workers) / (time.perf_counter() - start))
            for name, values in rates.items():
                low, middle, high = min(values), statistics.median(values), max(values)
                print(f"{name:<28}{workers} workers{middle:>10,.0f} rows/s  ({low:,.0f} to {high:,.0f})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
