"""Train a vision tower to tell the concepts of labelled pictures apart.

    minivlm train-tower --recipe demo_from_scratch --minutes 15 --output_dir runs/tower
    minivlm train --recipe demo_from_scratch --vision_model runs/tower

A tower trains many times faster on a classifier's gradient than through a decoder that starts from random weights.
Published vision-language models start from a pretrained tower for this reason (LLaVA, arXiv 2304.08485, section 4.1).
"""

import dataclasses
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.data.rows import filter_rows, load_rows
from minivlm.training.options import parse_args as parse_train_args
from minivlm.training.tower import train_tower


def main(argv: list[str] | None = None) -> Path:
    """Train the tower of a recipe; return its folder, which `--vision_model` takes."""
    parser = Parser(__doc__, prog="minivlm train-tower")
    parser.add_argument("--recipe", required=True, help="Recipe whose model_config describes the tower.")
    parser.add_argument(
        "--data",
        nargs="+",
        default=["data/train.parquet"],
        help="Files, folders or globs with a column concept.",
    )
    parser.add_argument("--minutes", type=float, default=15, help="Training time. Default: 15.")
    parser.add_argument("--batch_size", type=positive, default=64, help="Pictures per step. Default: 64.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Learning rate after warm-up, of Muon.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tower"), help="Folder for the tower.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, order and augmentation.")
    args = parser.parse_args(argv)
    recipe = dataclasses.replace(
        parse_train_args(["--recipe", args.recipe]),
        optimizer="muon",
        learning_rate=args.learning_rate,
        max_minutes=args.minutes,
        batch_size=args.batch_size,
        seed=args.seed,
        vision_model=None,  # the recipe may name the tower that this command makes
    )
    if not recipe.model_config:
        raise ValueError(
            f"--recipe {args.recipe}: it has no model_config, which describes the tower. Name one that has."
        )
    rows = filter_rows(load_rows(args.data), recipe.filter or {})
    if "concept" not in rows.column_names:
        raise ValueError(
            f"{' '.join(args.data)}: no column 'concept' to learn from. Its columns: {', '.join(rows.column_names)}."
        )
    train_tower(recipe, rows, args.output_dir)
    return args.output_dir
