"""Make the released weights from nothing but the embedded data: `make release-weights`.

    python -m tools.release_weights
    python -m tools.release_weights --eyes 10 --align 6400 --decoder 10 --output runs/short

Five steps, each of which is left out if it is finished. An interrupted tower or run goes on from its checkpoint; the
alignment begins anew.
1. eyes: a ResNet learns to name 12,865 drawings (tools.emoji.eyes_train, CPU minutes of one core);
2. align: the projector learns to write their names with the tokens of the decoder (tools.emoji.align, about
   six minutes);
3. decoder: projector and decoder learn to answer questions (recipes/emoji.yaml, minutes on all cores);
4. scenes-1, scenes-2: all parts learn from more pictures, in two runs from there (recipes/emoji_scenes.yaml);
5. average: of both runs and of where they began (tools.average).
The result is OUTPUT/average; `python -m tools.release` measures it and copies it to the root.
"""

import argparse
import sys
from pathlib import Path

import torch

import train_accelerate
from minivlm.cli import Parser, run_command
from tools import average
from tools.emoji import align, eyes_train

SHARE = "0.8"  # of the mean of both runs in the result; chosen by data/dev.parquet


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.release_weights")
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/emoji"), help="folder for all results (default: runs/emoji)")
    add("--eyes", type=float, default=80, help="CPU minutes of the tower (default: 80)")
    add("--align", type=int, default=38_400, help="pictures of the alignment (default: 38400)")
    add("--decoder", type=float, help="minutes of the decoder (default: those of the recipe)")
    add("--scenes", type=float, help="minutes of each run of step 4 (default: those of its recipe)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    return parser.parse_args(argv)


def main(argv=None) -> Path:
    """Take the steps that are not finished; return the folder of the model."""
    args = parse_args(argv)
    eyes, aligned = args.output / "eyes", args.output / "aligned"
    seed = ["--seed", str(args.seed)]
    if not is_model(eyes):
        print(f"1/5  The tower learns to name drawings, {args.eyes:g} CPU minutes.", flush=True)
        drawings = ["--drawings", "data/drawings.parquet", "--dev", "data/dev.parquet"]
        options = ["--tower", "resnet", "--width", "32", "--minutes", str(args.eyes), "--output", str(eyes)]
        eyes_train.main([*drawings, *options, *seed])
    if not is_model(aligned):
        print(f"2/5  The projector learns the words of the names, {args.align:,} pictures.", flush=True)
        options = ["--vision_model", str(eyes), "--pictures", str(args.align), "--output", str(aligned)]
        align.main(["--recipe", "emoji", "--threads", str(torch.get_num_threads()), *options, *seed])
    decoder = train("3/5  The decoder learns to answer questions.", "emoji", aligned, args.output / "decoder",
                    args.decoder, args.seed)  # fmt: skip
    runs = [
        train(f"4/5  All parts learn from more pictures, run {number} of 2.", "emoji_scenes", decoder,
              args.output / f"scenes-{number}", args.scenes, args.seed + number)
        for number in (1, 2)
    ]  # fmt: skip
    print("5/5  The average of both runs and of where they began.", flush=True)
    result, both = args.output / "average", args.output / "scenes"
    if not is_model(result):
        if not is_model(both):
            average.main([*map(str, runs), "--share", "0.5", "--out", str(both)])
        average.main([str(decoder), str(both), "--share", SHARE, "--out", str(result)])
    return result


def is_model(folder: Path) -> bool:
    """Return whether a folder holds a finished model."""
    return (folder / "config.json").is_file()


def train(line: str, recipe: str, model: Path, output: Path, minutes: float | None, seed: int) -> Path:
    """Print a line and train by a recipe, unless this is done; return the folder of the finished model."""
    print(line, flush=True)
    if is_model(output / "final"):
        return output / "final"
    options = ["--recipe", recipe, "--model", str(model), "--output_dir", str(output), "--seed", str(seed)]
    return train_accelerate.main([*options, *(["--max_minutes", str(minutes)] if minutes else [])])


if __name__ == "__main__":
    sys.exit(run_command(main))
