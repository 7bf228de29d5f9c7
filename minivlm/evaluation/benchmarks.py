"""Measure how fast rows become batches: the time of each stage, and rows per second with MiniMind-V's for comparison.

A reader is a function: it takes the number of worker processes, reads all rows once, and returns how many they were.
"""

import importlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from minivlm.data.collators import PackingCollator
from minivlm.data.dataset import TrainingRows
from minivlm.data.encoder import Encoder
from minivlm.data.pictures import decode_image
from minivlm.data.plans import GlobalBatchSampler, PackBudget, PackedPlan, measure
from minivlm.data.rows import load_rows

BUDGET = PackBudget(tokens=4096, pictures=64)


def draw_rows(source: str, count: int, target: Path) -> int:
    """Write `count` random rows of a parquet file in MiniMind-V's schema to `target`; return how many there were."""
    load_rows([source])  # for its messages: no such file, no parquet, no known schema
    table = pq.read_table(source, columns=["conversations", "image_bytes"])
    count = min(count, len(table))
    pq.write_table(table.take(random.Random(0).sample(range(len(table)), count)), target)
    return count


def time_stages(source: str, encoder: Encoder, count: int) -> dict[str, float]:
    """Return the seconds of each stage for the first `count` rows, in one process."""
    rows, seconds = load_rows([source]), {}

    def timed(name: str, work: Callable) -> list:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    samples = timed("read", lambda: [rows.sample(i) for i in range(count)])
    timed("tokenize and label", lambda: [encoder.tokenize(sample) for sample in samples])
    pictures = timed("decode", lambda: [[decode_image(i) for i in sample["images"]] for sample in samples])
    timed("resize and normalise", lambda: [encoder.pixels(row) for row in pictures if row])
    process = partial(encoder.processor.image_processor, return_tensors="pt")
    timed("  by the processor", lambda: [process(row) for row in pictures if row])
    tokens, pictures = measure(rows.select(range(count)), encoder, quiet=True)
    timed("plan packs", lambda: PackedPlan(tokens, pictures, 1, BUDGET))
    return seconds


def packed_reader(source: str, encoder: Encoder) -> Callable[[int], int]:
    """Return a reader that makes packs as the trainer does."""
    rows = load_rows([source])
    plan = PackedPlan(*measure(rows, encoder, quiet=True), 1, BUDGET)
    packs = plan.packs(0)[: plan.steps(0)]

    def read(workers: int) -> int:
        dataset, order = TrainingRows(rows, encoder, packed=True), GlobalBatchSampler(plan, 1)
        loader = DataLoader(dataset, batch_sampler=order, collate_fn=PackingCollator(), num_workers=workers)
        for _ in islice(loader, len(packs)):
            pass
        return sum(map(len, packs))

    return read


def minimind_v_reader(folder: str, source: str, encoder: Encoder, batch_size: int) -> Callable[[int], int]:
    """Return a reader by `VLMDataset` of a MiniMind-V checkout, with the row length and padding of its own trainer."""
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


def compare_readers(
    readers: dict[str, Callable[[int], int]], workers: list[int], rounds: int
) -> Iterator[tuple[str, int, list[float]]]:
    """Yield name, number of workers and the rows per second of each round; the readers take turns in a round."""
    for count in workers:
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(rounds):
            for name, read in readers.items():
                start = time.perf_counter()
                rates[name].append(read(count) / (time.perf_counter() - start))
        for name, values in rates.items():
            yield name, count, values
