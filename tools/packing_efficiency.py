"""Measure how many tokens of a batch are real: padded rows and packs, on the lengths of captions and instructions.

    python -m tools.packing_efficiency
    python -m tools.packing_efficiency --rows 20000 --budgets 2048 4096

Half of the rows are captions of 40 to 250 tokens, half instructions of 100 to 500, each with 64 more for a picture.
"""

import random
import sys
import time

import numpy as np

from minivlm.cli import Parser, run_command
from minivlm.data.plans import PackBudget, PaddedPlan, pack

PICTURE = 64  # tokens


def lengths(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the tokens and the pictures of `count` rows."""
    rng = random.Random(seed)
    return [PICTURE + rng.randint(*rng.choice(((40, 250), (100, 500)))) for _ in range(count)], [1] * count


def padded(tokens: list[int], groups: list[list[int]]) -> float:
    """Return the share of real tokens when each group is padded to its longest row."""
    return sum(tokens) / sum(len(group) * max(tokens[i] for i in group) for group in groups)


def main(argv: list[str] | None = None) -> None:
    """Print the share of real tokens for padded batches and for packs, and how fast packs are planned."""
    parser = Parser(__doc__, prog="python -m tools.packing_efficiency")
    parser.add_argument("--rows", type=int, default=100_000, help="Rows to pack.")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="Tokens.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows of a padded batch.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the lengths.")
    args = parser.parse_args(argv)
    tokens, pictures = lengths(args.rows, args.seed)
    size, count = args.batch_size, args.rows // args.batch_size * args.batch_size
    tokens, pictures = tokens[:count], pictures[:count]
    print(f"{count:,} rows of {np.mean(tokens):.0f} tokens on average\n")
    print(f"{'batches':<44}{'real tokens':>12}{'rows/s planned':>16}")
    in_order = [list(range(i, i + size)) for i in range(0, count, size)]
    print(f"{f'padded, {size} rows at random':<44}{padded(tokens, in_order):>12.1%}")
    batches = PaddedPlan([(i,) for i in range(count)], tokens, size, args.seed).batches(0)
    similar = [[index for unit in batch for index in unit] for batch in batches]
    print(f"{f'padded, {size} rows of similar length':<44}{padded(tokens, similar):>12.1%}")
    for budget in args.budgets:
        start = time.perf_counter()
        packs = list(pack(zip(range(count), tokens, pictures), PackBudget(budget, budget)))
        rate = count / (time.perf_counter() - start)
        print(f"{f'packs of {budget:,}':<44}{sum(tokens) / (budget * len(packs)):>12.1%}{rate:>16,.0f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
