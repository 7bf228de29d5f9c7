"""Train eyes to name the drawings: a teacher from labels alone, or a pupil from labels and a teacher's outputs.

    python -m tools.emoji.eyes_train --tower resnet --width 20 --minutes 30 --output runs/teacher
    python -m tools.emoji.eyes_train --tower clip --width 192 --teacher runs/teacher --minutes 60 --output runs/vit

Minutes are CPU minutes, so a run on a busy machine gets the same result as on an idle one, only later. A run that is
started again with the same --output continues from its last checkpoint. All random choices depend only on --seed
and the step.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minivlm.cli import Parser, run_command
from minivlm.training.optimizers import schedule, step_all
from minivlm.training.precision import autocast
from tools.emoji.augment import compose, on_white
from tools.emoji.drawings import Drawings
from tools.emoji.eyes import (
    SIZE,
    TAUGHT,
    Eyes,
    Learner,
    build_optimizers,
    build_tower,
    cell_weights,
    load,
    means,
    save,
    threads,
)
from tools.emoji.eyes_measure import measure, measure_small, read_pictures
from tools.emoji.sources import DEV_STYLE, TRAIN_STYLES


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.emoji.eyes_train")
    add = parser.add_argument
    add("--drawings", type=Path, default=Path("runs/drawings.npz"), help="file of tools.emoji.drawings, or "
        "drawings.parquet of the data set together with --dev (default: runs/drawings.npz)")  # fmt: skip
    add("--dev", type=Path, help="file such as data/dev.parquet; its pictures of the task `name` are used to measure "
        "(default: the dev style of --drawings, on white)")  # fmt: skip
    add("--output", type=Path, required=True, help="folder for the tower, the checkpoint and the log")
    add("--tower", choices=("resnet", "clip"), required=True, help="class of the tower")
    add("--width", type=int, required=True, help="channels of the ResNet's stem, or width of the ViT")
    add("--depth", type=int, default=6, help="blocks of the ViT (default: 6)")
    add("--teacher", type=Path, help="output folder of an earlier run to learn from")
    add("--minutes", type=float, default=25, help="CPU minutes of training (default: 25)")
    add("--batch", type=int, default=128, help="pictures per step (default: 128)")
    add("--scenes", type=float, default=0.5, help="share of the pictures that show four small drawings, half of them "
        "in a grid of 2 x 2 and half in a grid of 3 x 3 (default: 0.5)")  # fmt: skip
    add("--trace_weight", type=float, default=1.0, help="weight of the loss on which parts of a picture a drawing "
        "covers (default: 1)")  # fmt: skip
    add("--paint_weight", type=float, default=5.0, help="weight of the squared error to the colours of the picture "
        "(default: 5)")  # fmt: skip
    add("--lr", type=float, default=4e-3, help="highest learning rate of AdamW (default: 4e-3)")
    add("--muon_lr", type=float, default=0.03, help="highest learning rate of Muon (default: 0.03)")
    add("--warmup", type=float, default=0.02, help="share of the run in which the learning rates rise (default: 0.02)")
    add("--mild", type=float, default=0.5, help="share of the run in which the augmentation strength rises from a "
        "quarter to full (default: 0.5)")  # fmt: skip
    add("--feature_weight", type=float, default=10.0, help="weight of the squared error to the teacher's features")
    add("--names_from", type=float, default=0.0, help="share of the run without the loss on names; its weight "
        "then rises to full over a tenth of the run (default: 0, full from the first step)")  # fmt: skip
    add("--patches", type=int, default=64, help="patches, of 64, that a ViT gets before --whole_from (default: 64)")
    add("--whole_from", type=float, default=0.8, help="share of the run after which a ViT gets all patches")
    add("--measure_every", type=float, default=4, help="CPU minutes between measurements and checkpoints (default: 4)")
    add("--stop_after", type=float, help="stop after this many CPU minutes of this call; the same command continues")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation (default: 0)")
    return parser.parse_args(argv)


class Batch(NamedTuple):
    """Hold B pictures that show up to n drawings each, and what is to be learned from them."""

    pixels: torch.Tensor  # (B, 3, 128, 128) in [0, 1]
    covered: torch.Tensor  # (B, 64, 16), the share of each sixteenth of a place that a drawing covers
    colours: torch.Tensor  # (B, 64, 12), red, green and blue of each quarter of a place
    weights: torch.Tensor  # (B, n, 64), the places of each drawing
    labels: torch.Tensor  # (B, n) numbers of the concepts; -100 where a picture shows fewer drawings

    def only(self, places) -> "Batch":
        """Return the batch for a tower that sees only some of the places."""
        weights = self.weights[..., places]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return self._replace(covered=self.covered[:, places], colours=self.colours[:, places], weights=weights)

    def mean(self, losses) -> torch.Tensor:
        """Return the mean over pictures of the mean over the drawings of a picture; `losses` is (B * n,)."""
        losses, shown = losses.view_as(self.labels), self.labels >= 0
        return ((losses * shown).sum(1) / shown.sum(1)).mean()


class PictureSource:
    """Compose the pictures of each step: a drawing each, or four small ones in a grid of 2 x 2 or 3 x 3."""

    def __init__(self, drawings: Drawings, batch: int, scenes: float, seed: int):
        self.batch_size, self.seed = batch, seed
        self.per_grid = round(batch * scenes / 2)  # pictures with a grid of 2 x 2, and as many with 3 x 3
        if len(drawings.styles) < (needed := batch + 6 * self.per_grid):
            found = len(drawings.styles)
            raise ValueError(f"{found} training drawings are fewer than the {needed} of one step. Lower --batch.")
        self.concepts = sorted(set(drawings.concepts.tolist()))
        self.pixels, self.mono = torch.from_numpy(drawings.pixels), torch.from_numpy(drawings.mono)
        self.labels = torch.from_numpy(np.searchsorted(self.concepts, drawings.concepts))

    def drawings(self, step: int, number: int) -> torch.Tensor:
        """Return the indices of the `number` drawings of a step; each epoch takes all in another random order."""
        per_epoch = len(self.pixels) // number
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(self.pixels), generator=generator(self.seed, epoch, 1))
        return order[i * number : (i + 1) * number]

    def batch(self, step: int, strength: float, rng: torch.Generator) -> Batch:
        """Compose the pictures of a step, augmented with a strength from 0 to 1."""
        groups = [(1, self.batch_size - 2 * self.per_grid), (2, self.per_grid), (3, self.per_grid)]
        groups = [(grid, pictures, min(4, grid * grid)) for grid, pictures in groups if pictures]
        rows = self.drawings(step, sum(pictures * n for _, pictures, n in groups))
        parts, start = [], 0
        for grid, pictures, n in groups:
            cells = torch.rand(pictures, grid * grid, generator=rng).argsort(1)[:, :n]
            chosen = rows[start : (start := start + pictures * n)]
            x, coverage = compose(self.pixels[chosen], self.mono[chosen], cells, grid, SIZE, strength, rng)
            weights = F.pad(cell_weights(grid)[cells], (0, 0, 0, groups[-1][2] - n))
            labels = F.pad(self.labels[chosen].view(pictures, n), (0, groups[-1][2] - n), value=-100)
            parts.append(Batch(x, means(coverage[:, None], 4), means(x, 2), weights, labels))
        return Batch(*map(torch.cat, zip(*parts)))


class Run:
    """Hold the model, the optimizers and the clock of one training run.

    `save_state` and `load_state` make the run resumable.
    """

    def __init__(self, args):
        self.args, self.step, self.seconds = args, 0, 0.0
        drawings = Drawings.load(args.drawings)
        train = drawings.of(TRAIN_STYLES)
        self.source = PictureSource(train, args.batch, args.scenes, args.seed)
        self.concepts = self.source.concepts
        self.dev = read_pictures(args.dev) if args.dev else white_pictures(drawings.of([DEV_STYLE]))
        torch.manual_seed(args.seed)
        eyes = Eyes(build_tower(args.tower, args.width, args.depth), len(self.concepts))
        self.teacher = None
        if args.teacher:
            self.teacher, concepts = load(args.teacher)
            if concepts != self.concepts:
                raise ValueError(f"{args.teacher} was trained on other concepts ({len(concepts)}, not "
                                 f"{len(self.concepts)}). Train it on {args.drawings}.")  # fmt: skip
            self.teacher.eval().requires_grad_(False)
        self.model = Learner(eyes, self.teacher.width if self.teacher else 1).train()
        self.eyes = self.model.eyes
        if args.tower == "resnet":
            eyes.to(memory_format=torch.channels_last)
        self.optimizers = build_optimizers(self.model, args.lr, args.muon_lr)

    @property
    def done(self) -> float:
        """Return the finished share of the run, 0 to 1."""
        return self.seconds / (60 * self.args.minutes)

    def batch(self, rng) -> Batch:
        """Compose the pictures of this step."""
        return self.source.batch(self.step, min(1.0, 0.25 + 0.75 * self.done / self.args.mild), rng)

    def train_step(self) -> dict[str, float]:
        """Train on one batch; return its loss and the share of drawings named right."""
        args, rng = self.args, generator(self.args.seed, self.step, 2)
        batch, places = self.batch(rng), None
        if args.tower == "clip" and args.patches < 64 and self.done < args.whole_from:
            places = torch.randperm(64, generator=rng)[: args.patches].sort().values
            batch = batch.only(places)
        with autocast("cpu"):
            features = self.eyes.look(batch.pixels, places)
            logits = self.eyes.name(features, batch.weights).float()
            loss = batch.mean(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1,
                                              reduction="none"))  # fmt: skip
            if self.teacher is not None:
                loss = self.loss_to_teacher(batch, features, logits, loss, places)
            covered = self.model.trace(features).float()
            loss = loss + args.trace_weight * F.binary_cross_entropy_with_logits(covered, batch.covered)
            loss = loss + args.paint_weight * F.mse_loss(self.model.paint(features).float(), batch.colours)
        loss.backward()
        step_all(self.optimizers, schedule(self.done, args.warmup))
        self.step += 1
        right = (logits.argmax(-1) == batch.labels)[batch.labels >= 0]
        return {"loss": loss.item(), "right": right.float().mean().item()}

    def loss_to_teacher(self, batch, features, logits, label_loss, places) -> torch.Tensor:
        """Return the loss of a pupil.

        It is 1 - `TAUGHT` of the loss to the labels, plus `TAUGHT` of the loss to the teacher's probabilities, plus
        the weighted squared error to the teacher's features at each place.
        """
        with torch.no_grad():
            seen = self.teacher.look(batch.pixels)
            seen = seen if places is None else seen[:, places]
            said = self.teacher.name(seen, batch.weights).float().softmax(-1)
            seen = F.layer_norm(seen.float(), seen.shape[-1:])
        error = F.mse_loss(self.model.translate(features).float(), seen)
        names = (1 - TAUGHT) * label_loss + TAUGHT * batch.mean(-(said * logits.log_softmax(-1)).sum(-1).flatten())
        share = min(1.0, max(0.0, (self.done - self.args.names_from) / 0.1)) if self.args.names_from else 1.0
        return share * names + self.args.feature_weight * error

    def measure(self) -> dict[str, float]:
        """Return the share of the pictures of the dev style that are named right, whole and four in a picture."""
        with autocast("cpu"):
            found = measure(self.eyes, self.concepts, *self.dev)["right"]
            small = measure_small(self.eyes, self.concepts, *self.dev)
        self.model.train()
        return {"dev": round(found, 4), "dev_small": round(small, 4)}

    def save_state(self) -> None:
        """Write the checkpoint state.pt; an interruption leaves the old file whole."""
        state = {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        new = self.args.output / "state.new"
        torch.save(state, new)
        new.replace(self.args.output / "state.pt")

    def load_state(self) -> None:
        """Read the checkpoint state.pt into the model, the optimizers and the clock."""
        state = torch.load(self.args.output / "state.pt", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, found in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(found)


def white_pictures(drawings: Drawings) -> tuple[torch.Tensor, list[str]]:
    """Return the drawings on white, (N, 3, 128, 128) in [0, 1], and their concepts."""
    if len(drawings.styles) == 0:
        raise ValueError(
            f"The drawings have none in the style {DEV_STYLE} to measure on. Give --dev data/dev.parquet."
        )
    return on_white(torch.from_numpy(drawings.pixels), SIZE), drawings.concepts.tolist()


def generator(*numbers: int) -> torch.Generator:
    """Return a generator of random numbers whose seed depends only on `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def train(args) -> None:
    """Train until --minutes are over; log, measure and save at the times that the options give."""
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if (args.output / "state.pt").is_file():
        run.load_state()
    (args.output / "args.json").write_text(json.dumps(vars(args), default=str, indent=1))
    start, began, right = time.time(), run.seconds, 0.0
    due = run.seconds + 60 * args.measure_every
    while run.done < 1:
        clock = time.process_time()
        values = run.train_step()
        run.seconds += time.process_time() - clock
        right = 0.98 * right + 0.02 * values["right"]
        stop = args.stop_after and run.seconds - began > 60 * args.stop_after
        if run.seconds >= due or run.done >= 1 or stop:
            due += 60 * args.measure_every
            entry = {"step": run.step, "pictures": run.step * args.batch, "minutes": round(run.seconds / 60, 2),
                     "loss": round(values["loss"], 3), "train": round(right, 4), **run.measure(),
                     "wall": round((time.time() - start) / 60, 1)}  # fmt: skip
            print(json.dumps(entry), flush=True)
            with (args.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            run.save_state()
            if stop:
                return
    save(run.eyes, run.concepts, args.output)


def main(argv=None) -> None:
    """Train on one thread."""
    args = parse_args(argv)
    with threads(1):
        train(args)


if __name__ == "__main__":
    sys.exit(run_command(main))
