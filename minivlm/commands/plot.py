"""Draw the loss of one or more training runs, and the scores of their evaluations.

minivlm plot runs/emoji
minivlm plot runs/a runs/b --output both.png
"""

from pathlib import Path

from minivlm.cli import Parser
from minivlm.training.plotting import plot


def main(argv: list[str] | None = None) -> Path:
    """Write the picture; return its path."""
    parser = Parser(__doc__, prog="minivlm plot")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folders that training wrote (output_dir).")
    parser.add_argument("--output", type=Path, help="Picture to write. Default: loss.png in the first folder.")
    args = parser.parse_args(argv)
    try:
        path = plot(args.runs, args.output or args.runs[0] / "loss.png")
    except ImportError:
        parser.error("drawing needs matplotlib. Install it: pip install matplotlib")
    print(f"drawn: {path}")
    return path
