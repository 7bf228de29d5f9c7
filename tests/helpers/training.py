"""Train the tiny model by the training script, and read the losses that it logged."""

import json

import train_accelerate
from helpers.models import ROOT, TEXT, VISION

CONFIG = json.dumps({"vision_config": VISION, "text_config": TEXT | {"vocab_size": 6400}, "vision_feature_layer": -1})
# Options of the training script for a model of the size above, on one process.
TINY = [
    "--model_config",
    CONFIG,
    "--tokenizer",
    str(ROOT),
    "--mixed_precision",
    "no",
    "--workers",
    "0",
    "--log_every",
    "1",
]


def losses(folder, figure="loss"):
    """Return one number of each step in the log of a run: its loss, or another entry by name."""
    return [json.loads(line)[figure] for line in (folder / "log.jsonl").read_text().splitlines()]


def run(data, folder, *options):
    """Train a tiny model on the source `data`, with the results in `folder`; return the folder of the model."""
    return train_accelerate.main([*TINY, "--data", data, "--output_dir", str(folder), "--batch_size", "8", *options])
