"""Time a step of Muon: torch's, which computes in bf16, ours in fp32 and bf16, and products of as many FLOPs.

    OMP_NUM_THREADS=1 python -m tools.muon_speed --shape .
    OMP_NUM_THREADS=1 python -m tools.muon_speed --layers 1 --rounds 2

The sides take turns. With one thread the clock counts CPU seconds. A processor without instructions for bf16 emulates
them; there torch's side takes minutes for all layers of the default shape.
"""

import sys
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from minivlm.benchmark.measure import alternate, machine, milliseconds
from minivlm.benchmark.shapes import make_ours, read_shape
from minivlm.cli import Parser, positive, run_command
from minivlm.model.parts import BLOCK
from minivlm.training.muon import Muon

SIDE = 1024  # of the square matrices of the floor


def main(argv: list[str] | None = None) -> None:
    """Print milliseconds of each side."""
    parser = Parser(__doc__, prog="python -m tools.muon_speed")
    parser.add_argument("--shape", default="minimind-3v", help="As of minivlm benchmark. Default: minimind-3v.")
    parser.add_argument("--layers", type=positive, help="Blocks of the decoder. Default: those of the shape.")
    parser.add_argument("--rounds", type=positive, default=5, help="Turns of each side. Default: 5.")
    args = parser.parse_args(argv)
    shape = read_shape(args.shape)
    layers = args.layers or shape.text["num_hidden_layers"]
    decoder = make_ours(replace(shape, text=shape.text | {"num_hidden_layers": layers})).model.language_model
    matrices = [p for name, p in decoder.named_parameters() if p.ndim == 2 and BLOCK.search(f".{name}")]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    sides = {
        "torch.optim.Muon, bf16": torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw").step,
        "ours, bf16": Muon(matrices, dtype=torch.bfloat16).step,
        "ours, fp32": Muon(matrices, dtype=torch.float32).step,
    }
    with FlopCounterMode(display=False) as counter:
        sides["ours, fp32"]()
    flops = counter.get_total_flops()
    square, count = torch.randn(SIDE, SIDE), round(flops / (2 * SIDE**3))
    sides["floor: as many FLOPs in large products, fp32"] = lambda: [square @ square for _ in range(count)]
    seconds = alternate(sides, args.rounds)
    print(f"{len(matrices)} matrices of {layers} blocks, {flops / 1e9:.1f} GFLOP a step. {machine()}")
    print("\n".join(milliseconds(seconds, next(iter(sides)))))


if __name__ == "__main__":
    sys.exit(run_command(main))
