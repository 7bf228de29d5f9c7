"""Fit a classifier of the names on the tower of a model, which stays as it is.

    python -m tools.emoji.eyes_head --model . --output runs/emoji/eyes

`tools.emoji.eyes_train` leaves a classifier beside its tower. The released model holds the tower alone, so whoever
goes on from it makes the classifier with this: it is a linear layer on the mean feature of a thing's places. The
pictures are those on which the tower was trained. Its output is a folder as that of `tools.emoji.eyes_train`, which
`tools.emoji.align` and `tools.emoji.taught_composer` read.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from minivlm.cli import Parser, run_command
from minivlm.model.loading import load_trained
from minivlm.training.optimizers import schedule
from minivlm.training.precision import autocast
from tools.emoji.drawings import Drawings
from tools.emoji.eyes import Eyes, save, threads
from tools.emoji.eyes_measure import measure, measure_small, read_pictures
from tools.emoji.eyes_train import PictureSource, generator
from tools.emoji.sources import TRAIN_STYLES

BATCH = 128  # pictures that the tower sees at once
THINGS = 1024  # things of one step of the classifier
WARMUP = 0.02  # share of the steps in which the learning rate rises


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.emoji.eyes_head")
    add = parser.add_argument
    add("--model", default=".", help="folder of the model whose tower is used (default: this folder)")
    add("--output", type=Path, required=True, help="folder for the tower and its classifier")
    add("--drawings", type=Path, default=Path("data/drawings.parquet"), help="drawings of the data set")
    add("--dev", type=Path, default=Path("data/dev.parquet"), help="file whose pictures are used to measure")
    add("--pictures", type=int, default=64_000, help="pictures to compose (default: 64000)")
    add("--passes", type=int, default=20, help="how often each picture is used (default: 20)")
    add("--learning_rate", type=float, default=3e-3, help="highest learning rate (default: 3e-3)")
    add("--threads", type=int, default=2, help="threads of torch (default: 2)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    return parser.parse_args(argv)


@torch.no_grad()
def see(eyes: Eyes, source: PictureSource, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose the pictures; return the mean feature of each thing, (n, V), and the number of its concept, (n,)."""
    features, labels = [], []
    for number in trange(math.ceil(args.pictures / BATCH), desc="pictures", unit="batch"):
        batch = source.batch(number, 1.0, generator(args.seed, number, 5))
        with autocast("cpu"):
            pooled = batch.weights @ eyes.look(batch.pixels)
        shown = batch.labels >= 0
        features.append(pooled[shown].float())
        labels.append(batch.labels[shown])
    return torch.cat(features), torch.cat(labels)


def fit(eyes: Eyes, features: torch.Tensor, labels: torch.Tensor, args) -> None:
    """Train the linear layer of `eyes`; the standardized features are its input, which is undone in its weights."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    optimizer = torch.optim.AdamW(eyes.head.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.passes * (len(features) // THINGS)
    order = torch.empty(0, dtype=torch.long)
    for step in trange(steps, desc="classifier"):
        if len(order) < THINGS:
            order = torch.randperm(len(features), generator=generator(args.seed, step, 6))
        chosen, order = order[:THINGS], order[THINGS:]
        logits = eyes.head((features[chosen] - mean) / scale)
        F.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
        optimizer.param_groups[0]["lr"] = args.learning_rate * schedule(step / steps, WARMUP)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        eyes.head.weight.div_(scale)
        eyes.head.bias.sub_(eyes.head.weight @ mean)


def main(argv=None) -> None:
    """Let the tower look at the pictures, fit the classifier, measure it, save both."""
    args = parse_args(argv)
    with threads(args.threads):
        torch.manual_seed(args.seed)
        source = PictureSource(Drawings.load(args.drawings).of(TRAIN_STYLES), BATCH, 0.5, args.seed)
        eyes = Eyes(load_trained(args.model)[0].model.vision_tower.float(), len(source.concepts)).eval()
        eyes.tower.requires_grad_(False)
        fit(eyes, *see(eyes, source, args), args)
        with autocast("cpu"):
            dev = read_pictures(args.dev)
            found, small = measure(eyes, source.concepts, *dev), measure_small(eyes, source.concepts, *dev)
    save(eyes, source.concepts, args.output)
    print(f"{args.dev}: {found['right']:.1%} of {found['pictures']} pictures right, {small:.1%} at half their size")


if __name__ == "__main__":
    sys.exit(run_command(main))
