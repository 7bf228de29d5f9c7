"""Compute what training costs at other sizes: FLOPs, memory, communication, a plan for 1 to 64 GPUs, time and price.

    python -m tools.scale --out docs/scale
    python -m tools.scale --out runs/scale --peak 312 --nvlink 600 --mfu 0.4 --price 1.5

It writes README.md with the tables, and plots, which need matplotlib (pip install matplotlib). Nothing is measured.
"""

import argparse
import sys
from pathlib import Path

from minivlm.cli import HelpFormatter, Parser, positive, run_command
from minivlm.hub.card import put
from tools.scale.communication import Cluster
from tools.scale.flops import Rows
from tools.scale.report import page

NUMBERS = {  # option -> default and help
    "peak": (989.0, "TFLOP/s of a GPU in bf16."),
    "mfu": (0.3, "Share of the peak that is used while no rank waits."),
    "memory": (80.0, "GB of a GPU."),
    "reserve": (0.1, "Share of the memory that stays free."),
    "nvlink": (900.0, "GB/s between the GPUs of a node, both directions together."),
    "network": (50.0, "GB/s of a network card, one direction."),
    "price": (3.0, "Dollars a GPU costs for an hour."),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options.

    Raises:
        SystemExit: a number is not positive, or a share is above 1.
    """
    parser = Parser(__doc__, prog="python -m tools.scale", formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/scale"), help="Folder to write.")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    parser.add_argument("--cards", type=positive, default=8, help="Network cards of a node.")
    parser.add_argument("--ddp_bytes", type=int, choices=(2, 4), default=4, help="Bytes of a gradient that DDP sends.")
    parser.add_argument("--tokens", type=positive, default=364, help="Tokens of a row, 64 of them for its picture.")
    parser.add_argument("--step_rows", type=positive, default=768, help="Rows of a step, over all ranks.")
    parser.add_argument("--rows", type=positive, default=2_900_000, help="Rows of the run whose time is computed.")
    args = parser.parse_args(argv)
    for name in NUMBERS:
        value, share = getattr(args, name), name in ("mfu", "reserve")
        if not (0 < value <= 1 if share else value > 0):
            parser.error(f"--{name} {value:g}: must be above 0{' and at most 1' if share else ''}.")
    return args


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Return what the options assume about GPUs and network."""
    return Cluster(
        peak=args.peak * 1e12, mfu=args.mfu, memory=args.memory * 1e9, reserve=args.reserve, nvlink=args.nvlink * 1e9,
        network=args.network * 1e9, cards=args.cards, gradient=args.ddp_bytes,
    )  # fmt: skip


def text_of(args: argparse.Namespace) -> str:
    """Return the page for the options."""
    return page(cluster_of(args), Rows(args.step_rows, args.tokens), args.rows, args.price)


def main(argv: list[str] | None = None) -> None:
    """Write the page and its plots, and print their paths."""
    args = parse_args(argv)
    from tools.scale.plots import DRAWN

    args.out.mkdir(parents=True, exist_ok=True)
    put(args.out / "README.md", text_of(args).encode())
    for name, draw in DRAWN.items():
        draw(args.out / name, cluster_of(args), Rows(args.step_rows, args.tokens))
    for path in [args.out / "README.md", *(args.out / name for name in DRAWN)]:
        print(f"written: {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    sys.exit(run_command(main))
