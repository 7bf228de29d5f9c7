"""Measure which share of pictures a network of `tools.emoji.eyes_train` names right.

    python -m tools.emoji.eyes_measure runs/teacher                          # the dev style
    python -m tools.emoji.eyes_measure runs/teacher --data data/test.parquet data/test_photos.parquet

Measure on the test style only at the end: no choice may depend on it.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from minivlm.cli import Parser, run_command
from processing_minivlm import to_rgb
from tools.emoji.augment import lay_out
from tools.emoji.eyes import SIZE, Eyes, cell_weights, load


def read_pictures(path: Path) -> tuple[torch.Tensor, list[str]]:
    """Read the pictures of the task `name`; return (N, 3, 128, 128) in [0, 1] and their concepts.

    A picture that stands in several rows is returned once.
    """
    table = pq.read_table(path, columns=["image_bytes", "task", "concept"])
    found = {}
    for data, task, concept in zip(*(table[name].to_pylist() for name in table.column_names)):
        if task == "name":
            found[data] = concept
    pixels = []
    for data in found:
        picture = np.asarray(to_rgb(Image.open(io.BytesIO(data))))
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
        pixels.append(F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(pixels), list(found.values())


@torch.no_grad()
def measure(eyes: Eyes, known: list[str], pixels: torch.Tensor, concepts: list[str], among=None) -> dict[str, float]:
    """Return the number of pictures, the share named right, and the share with the right name in the first five.

    Args:
        known: the concepts in the order of the classifier.
        among: the concepts that are allowed as answers; None: all.
    """
    eyes.eval()
    logits = torch.cat([eyes(part).float() for part in pixels.split(64)])
    if among is not None:
        allowed = torch.tensor([concept in among for concept in known])
        logits = logits.masked_fill(~allowed, -torch.inf)
    labels = torch.tensor([known.index(concept) for concept in concepts])
    hits = logits.topk(5).indices == labels[:, None]
    right, in_five = hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()
    return {"pictures": len(labels), "right": right, "in_five": in_five}


@torch.no_grad()
def measure_small(eyes: Eyes, known: list[str], pixels: torch.Tensor, concepts: list[str]) -> float:
    """Return the share of pictures named right when four of them, at half their size, stand in one picture."""
    eyes.eval()
    small = F.interpolate(pixels, size=(SIZE // 2, SIZE // 2), mode="bilinear", antialias=True, align_corners=False)
    labels = torch.tensor([known.index(concept) for concept in concepts])
    full = len(small) // 4 * 4  # up to three pictures are left out, because four stand in each
    cells = torch.arange(4).expand(full // 4, 4)
    weights = cell_weights(2).expand(full // 4, 4, 64)
    parts = zip(lay_out(small[:full], cells, 2).split(64), weights.split(64))
    logits = torch.cat([eyes.name(eyes.look(x), w).float() for x, w in parts])
    return (logits.flatten(0, 1).argmax(1) == labels[:full]).float().mean().item()


def main(argv=None) -> None:
    """Measure each file and print one line about it."""
    parser = Parser(__doc__, prog="python -m tools.emoji.eyes_measure")
    parser.add_argument("folder", type=Path, help="output folder of tools.emoji.eyes_train")
    parser.add_argument("--data", type=Path, nargs="+", default=[Path("data/dev.parquet")], help="files with pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    eyes, known = load(args.folder)
    for path in args.data:
        pixels, concepts = read_pictures(path)
        # Photographs differ so much from drawings that a choice among all 1,358 names would say little.
        photos = "photos" in path.name
        among = set(concepts) if photos else None
        found = measure(eyes, known, pixels, concepts, among)
        print(f"{path}: {found['right']:.1%} right, {found['in_five']:.1%} among the five likeliest, of "
              f"{found['pictures']} pictures and {len(among or known)} names")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
