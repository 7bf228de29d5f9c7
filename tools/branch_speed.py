"""Time attention over rows that share a picture, forward and backward: under a dense mask and by blocks.

    OMP_NUM_THREADS=1 python -m tools.branch_speed
    OMP_NUM_THREADS=1 python -m tools.branch_speed --rows 2 --lengths 200 200

The sides take turns. With one thread the clock counts CPU seconds.
"""

import sys

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax

from minivlm.benchmark.measure import alternate, machine, milliseconds
from minivlm.cli import Parser, run_command
from minivlm.model.branch_attention import branch_attention

HEADS, WIDTH = 3, 64  # those of recipes/emoji.yaml
BRANCHES = 8


def make_batch(rows: int, prefix: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `position_ids` (B, T) and the dense mask (B, 1, T, T) of rows with eight branches of random lengths."""
    torch.manual_seed(0)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (rows, BRANCHES)).tolist()
    T = prefix + max(map(sum, sizes))
    positions, branch = [], []
    for size in sizes:
        size[-1] += T - prefix - sum(size)  # padding behind the last branch
        positions.append(torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in size)]))
        branch.append(torch.repeat_interleave(torch.arange(BRANCHES + 1), torch.tensor([prefix, *size])))
    branch = torch.stack(branch)
    query, key = branch[:, :, None], branch[:, None, :]
    seen = ((query == key) | (key == 0)).tril()
    return torch.stack(positions), torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def eager(query, key, value, mask):
    """Attend as the model does with `eager`."""
    return softmax(query @ key.transpose(2, 3) * WIDTH**-0.5 + mask, dim=-1) @ value


def main(argv: list[str] | None = None) -> None:
    """Print milliseconds of each side."""
    parser = Parser(__doc__, prog="python -m tools.branch_speed")
    parser.add_argument("--rows", type=int, default=16, help="Pictures, with eight branches each.")
    parser.add_argument("--prefix", type=int, default=64, help="Tokens that the branches share.")
    parser.add_argument("--lengths", type=int, nargs=2, default=[15, 40], help="Shortest and longest branch.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each side.")
    args = parser.parse_args(argv)
    positions, mask = make_batch(args.rows, args.prefix, args.lengths)
    B, T = positions.shape
    inputs = [torch.randn(B, T, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3)]
    up, compiled = torch.randn(B, HEADS, T, WIDTH), torch.compile(eager)
    sides = {
        "eager": lambda: eager(*inputs, mask),
        "eager, compiled": lambda: compiled(*inputs, mask),
        "sdpa": lambda: scaled_dot_product_attention(*inputs, attn_mask=mask),
        "sdpa_branches": lambda: branch_attention(*inputs, positions)[0],
    }
    work = {name: lambda side=side: torch.autograd.grad(side(), inputs, up) for name, side in sides.items()}
    seconds = alternate(work, args.rounds)
    print(f"fp32, {B} rows of {T} tokens, {HEADS} heads. {machine()}")
    print("\n".join(milliseconds(seconds, "eager")))


if __name__ == "__main__":
    sys.exit(run_command(main))
