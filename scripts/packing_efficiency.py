"""How much of a batch is real tokens: padded rows against packs, on the lengths of captions and instructions.

    python -m scripts.packing_efficiency

Half of the rows are captions of 40 to 250 tokens, half instructions of 100 to 500, each with 64 more for a picture.
"""

import argparse
import random
import sys
import time

import numpy as np

from batching_minivlm import LikeLengths, pack

PICTURE = 64  # tokens


def lengths(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Tokens and pictures of `count` rows."""
    rng = random.Random(seed)
    return [PICTURE + rng.randint(*rng.choice(((40, 250), (100, 500)))) for _ in range(count)], [1] * count


def padded(tokens: list[int], groups: list[list[int]]) -> float:
    """Share of real tokens when each group is padded to its longest row."""
    return sum(tokens) / sum(len(group) * max(tokens[i] for i in group) for group in groups)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.packing_efficiency", description=__doc__.split("\n")[0])
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
    like = LikeLengths([(i,) for i in range(count)], tokens, size, args.seed).batches(0)
    print(f"{f'padded, {size} rows of like length':<44}{padded(tokens, [[u[0] for u in b] for b in like]):>12.1%}")
    for budget in args.budgets:
        start = time.perf_counter()
        packs = list(pack(zip(range(count), tokens, pictures), budget, budget))
        rate = count / (time.perf_counter() - start)
        print(f"{f'packs of {budget:,}':<44}{sum(tokens) / (budget * len(packs)):>12.1%}{rate:>16,.0f}")


if __name__ == "__main__":
    sys.exit(main())
