"""Options of the data: where rows come from, how they are read, and how many make a batch."""

from argparse import Namespace
from dataclasses import dataclass

from minivlm.cli import option
from minivlm.data.schemas import SCHEMAS

COMPOSE = "compose:"  # before the name of a module that composes the rows, see minivlm.data.composed
DATA_HELP = (
    "Data to train on, schemas mixed at will: parquet, jsonl, json or webdataset tar files, folders or globs of them, "
    "or hub:owner/name[:config[:split]]. The schema is told from the columns; FILE::SCHEMA forces one of "
    f"{', '.join(schema.__name__ for schema in SCHEMAS)}. Pictures given by name lie in the folder of their file. "
    "compose:MODULE, alone: rows that open_composer(seed) of a Python module composes during training."
)


@dataclass
class DataArgs:
    """Choose the rows and how they become batches."""

    _argument_group_name = "data"

    data: list[str] = option(["data/train.parquet"], DATA_HELP)
    filter: str | None = option(None, "Rows to train on: a mapping from column to values in a recipe, or JSON.")
    min_rating: list[str] = option(
        [], "FineVision: lowest rating of a turn, as relevance=3; rows without a turn left are not used."
    )
    max_rows: int | None = option(None, "Train on the first so many rows only.")
    max_length: int = option(1024, "Longest row in tokens, pictures included.")
    too_long: str = option("drop", "A longer row: drop counts it as a bad one, cut leaves out its last turns.")
    max_bad_rows: float = option(0.001, "Share of rows that may be unusable before training stops.")
    share_pictures: int = option(1, "Most rows about the same picture that share its tokens.")
    streaming: bool = option(False, "Read the data in order instead of holding it; needs max_steps or max_minutes.")
    mix: list[float] = option([], "How often each source is drawn, relative to others; streamed, until its end.")
    packing: bool = option(False, "Fill packs with rows instead of padding them; batch sizes then count packs.")
    pack_tokens: int = option(4096, "Most tokens in a pack.")
    pack_pictures: int = option(64, "Most pictures in a pack.")
    augment: str = option("none", "mild: shift, scale, tilt, tint pictures. strong: also new colours. Or none.")
    feature_cache: str | None = option(None, "Folder to keep a frozen tower's features in, computed once per picture.")
    workers: int = option(1, "Processes that read and encode rows, per rank. 0: in the training process.")
    batch_size: int = option(64, "Rows (groups with share_pictures, packs with packing) per step, over all ranks.")
    micro_batch_size: int = option(
        64, "Rows, groups or packs that one rank puts through the model at once. 0: as many as fit into GPU memory."
    )
    seed: int = option(0, "Seed of weights, order and augmentation.")


def check_data(args: DataArgs | Namespace) -> None:
    """Raise ValueError for options of data that exclude each other or cannot work."""
    if args.batch_size < 1 or args.micro_batch_size < 0:
        raise ValueError(
            f"--batch_size {args.batch_size} must be 1 or more, --micro_batch_size {args.micro_batch_size} 0 or more."
        )
    if args.streaming and (args.share_pictures > 1 or args.max_rows):
        raise ValueError("--streaming does not go with --share_pictures or --max_rows. Leave them out.")
    if is_composed(args.data):
        for name in ("filter", "min_rating", "max_rows", "streaming", "mix", "packing"):
            if getattr(args, name):
                raise ValueError(f"--{name} does not go with --data {args.data[0]}. Leave it out.")
        if args.augment != "none":
            raise ValueError(
                f"--augment {args.augment} does not go with --data {args.data[0]}, which draws as it likes."
            )
    if args.mix and (min(args.mix) <= 0 or len(args.mix) != len(args.data)):
        raise ValueError(f"--mix {args.mix}: give a positive number for each of {len(args.data)} --data sources.")
    if args.packing and args.share_pictures > 1:
        raise ValueError("--packing and --share_pictures exclude each other. Choose one.")
    if args.packing and args.pack_tokens < args.max_length:
        raise ValueError(
            f"--pack_tokens {args.pack_tokens} is less than --max_length {args.max_length}: the longest rows "
            "would fit into no pack. Raise --pack_tokens or lower --max_length."
        )


def is_composed(sources: list[str]) -> bool:
    """Return whether the rows are composed.

    Raises:
        ValueError: composed rows are named beside other ones.
    """
    composed = [source.startswith(COMPOSE) for source in sources]
    if any(composed) and len(sources) > 1:
        raise ValueError(f"--data {' '.join(sources)}: {COMPOSE}MODULE cannot be mixed with others. Name it alone.")
    return all(composed)
