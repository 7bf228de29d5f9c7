"""Average the weights of two models of one shape: the point between two runs often answers better than either.

    python -m tools.average runs/first/final runs/second/final --share 0.55 --out runs/average

The second run must have begun where the first one ended, or both at the same weights (arXiv 2203.05482): the average
of unrelated runs answers nothing. Configuration and processor are those of the second. Choose the share by a dev set.
"""

import sys
from pathlib import Path

import torch

from minivlm.cli import Parser, run_command
from minivlm.convert.files import check_free
from minivlm.model.loading import load_trained, save_model


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"--share {text} must be from 0 (only the first model) to 1 (only the second).")
    return value


@torch.no_grad()
def average(first, second, part: float) -> None:
    """Move the weights of `second` to (1 - part) of those of `first` and `part` of its own.

    Raises:
        ValueError: the models have other parameters.
    """
    ours, theirs = tensors(second), tensors(first)
    shapes = [{name: value.shape for name, value in found.items()} for found in (theirs, ours)]
    if shapes[0] != shapes[1]:
        name = next(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"{name} has another shape in the other model, or is not there. Average runs of one shape.")
    for name, value in ours.items():
        if value.is_floating_point():
            value.copy_(torch.lerp(theirs[name].float(), value.float(), part))


def tensors(model) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, each once: a state_dict names a shared tensor twice."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def main(argv=None) -> None:
    """Write the average of two models."""
    parser = Parser(__doc__, prog="python -m tools.average")
    add = parser.add_argument
    add("first", help="folder of a model")
    add("second", help="folder of a model that was trained further")
    add("--share", default="0.5", help="share of the second, from 0 to 1 (default: 0.5)")
    add("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args(argv)
    part = share(args.share)
    check_free(args.out)
    (first, _), (second, processor) = load_trained(args.first), load_trained(args.second)
    average(first, second, part)
    save_model(second, processor, args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
