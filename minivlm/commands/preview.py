"""Show what training would see of a data set: a table, and a page of rows with the tokens that carry loss marked.

    minivlm preview data/dev.parquet
    minivlm preview hub:HuggingFaceM4/the_cauldron:vqav2 --rows 200
    minivlm preview data/train.parquet --filter '{"task": ["caption"]}' --max_length 512 --too_long cut

Options that train_accelerate.py has, too, mean the same here. A row that training would leave out is counted with its
reason. The page is one file; a browser opens it.
"""

import random
from argparse import Namespace
from functools import partial
from pathlib import Path

from minivlm.cli import Parser, positive
from minivlm.data.encoder import Encoder
from minivlm.data.loader import choose_rows
from minivlm.data.options import DataArgs
from minivlm.data.plans import PackBudget
from minivlm.data.preview import describe, scan
from minivlm.data.preview_page import render_page
from minivlm.model.loading import load_processor
from minivlm.pages import write_page
from minivlm.training.options import read_mapping, read_pairs


def parse_args(argv: list[str] | None) -> Namespace:
    """Return the options, with `filter` and `min_rating` as mappings."""
    parser = Parser(__doc__, prog="minivlm preview")
    parser.add_argument("data", nargs="+", metavar="SOURCE", help="Named as for train_accelerate.py --data.")
    parser.add_argument("--model", default=".", help="Folder or Hub id of the processor that encodes the rows.")
    parser.add_argument(
        "--rows", type=partial(positive, least=0), default=1000, help="Rows to look at, drawn at random; 0: all."
    )
    parser.add_argument("--shown", type=partial(positive, least=0), default=50, help="Rows on the page.")
    parser.add_argument("--output", type=Path, default=Path("runs/preview.html"), help="File of the page.")
    parser.add_argument("--filter", metavar="JSON", help="Rows to look at: a mapping from column to values.")
    parser.add_argument("--min_rating", nargs="*", default=[], metavar="NAME=N", help="Lowest rating of a turn.")
    parser.add_argument("--max_length", type=int, default=1024, help="Longest row in tokens.")
    parser.add_argument("--too_long", choices=("drop", "cut"), default="drop", help="What becomes of a longer row.")
    parser.add_argument("--pack_tokens", type=int, default=4096, help="Most tokens in a pack.")
    parser.add_argument("--pack_pictures", type=int, default=64, help="Most pictures in a pack.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw.")
    args = parser.parse_args(argv)
    args.filter = read_mapping("filter", args.filter) if args.filter else None
    args.min_rating = read_pairs("min_rating", args.min_rating, "relevance=3")
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the table and write the page."""
    args = parse_args(argv)
    encoder = Encoder(load_processor(args.model), args.max_length, args.too_long)
    rows = choose_rows(DataArgs(data=args.data, filter=args.filter, min_rating=args.min_rating))
    indices = list(range(len(rows)))
    if 0 < args.rows < len(rows):
        indices = random.Random(args.seed).sample(indices, args.rows)
    found, examples = scan(rows, encoder, indices, args.shown)
    table = describe(found, len(rows), PackBudget(args.pack_tokens, args.pack_pictures))
    print(table)
    write_page(args.output, render_page(", ".join(args.data), table, examples, encoder))
    print(f"\n{len(examples):,} rows as a page: {args.output}")
