"""Make the released weights from nothing but the embedded data: `make release-weights`.

    python -m tools.release_weights
    python -m tools.release_weights --eyes 10 --align 6400 --decoder 10 --output runs/short

Three steps, each of which is left out if it is finished. An interrupted tower or decoder goes on from its checkpoint;
the alignment begins anew.
1. eyes: a ResNet learns to name 12,865 drawings (tools.emoji.eyes_train, CPU minutes of one core);
2. align: the projector learns to write their names with the tokens of the decoder (tools.emoji.align, about
   six minutes);
3. decoder: projector and decoder learn to answer questions (recipes/emoji.yaml, minutes on all cores).
The result is OUTPUT/decoder/final; `python -m tools.release` measures it and copies it to the root.
"""

import argparse
import sys
from pathlib import Path

import torch

import train_accelerate
from minivlm.cli import Parser, run_command
from tools.emoji import align, eyes_train


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(__doc__, prog="python -m tools.release_weights")
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/emoji"), help="folder for all results (default: runs/emoji)")
    add("--eyes", type=float, default=80, help="CPU minutes of the tower (default: 80)")
    add("--align", type=int, default=38_400, help="pictures of the alignment (default: 38400)")
    add("--decoder", type=float, help="minutes of the decoder (default: those of the recipe)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    return parser.parse_args(argv)


def main(argv=None) -> Path:
    """Take the steps that are not finished; return the folder of the model."""
    args = parse_args(argv)
    eyes, aligned, decoder = (args.output / name for name in ("eyes", "aligned", "decoder"))
    seed = ["--seed", str(args.seed)]
    if not (eyes / "config.json").is_file():
        print(f"1/3  The tower learns to name drawings, {args.eyes:g} CPU minutes.", flush=True)
        drawings = ["--drawings", "data/drawings.parquet", "--dev", "data/dev.parquet"]
        options = ["--tower", "resnet", "--width", "32", "--minutes", str(args.eyes), "--output", str(eyes)]
        eyes_train.main([*drawings, *options, *seed])
    if not (aligned / "config.json").is_file():
        print(f"2/3  The projector learns the words of the names, {args.align:,} pictures.", flush=True)
        options = ["--vision_model", str(eyes), "--pictures", str(args.align), "--output", str(aligned)]
        align.main(["--recipe", "emoji", "--threads", str(torch.get_num_threads()), *options, *seed])
    print("3/3  The decoder learns to answer questions.", flush=True)
    options = ["--recipe", "emoji", "--model", str(aligned), "--output_dir", str(decoder), *seed]
    options += ["--max_minutes", str(args.decoder)] if args.decoder else []
    return train_accelerate.main(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
