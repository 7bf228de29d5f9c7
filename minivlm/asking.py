"""Share between the commands that ask a model: their options, loading, and pictures that are given by name.

torch and transformers take seconds to import, so only the function that loads a model imports them.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from minivlm.cli import Parser, positive
from minivlm.data.pictures import decode_image
from minivlm.decoding import Decoding
from minivlm.onnx_engine.files import find_graphs, has_graphs
from minivlm.resources import default_model

if TYPE_CHECKING:
    from minivlm.inference import Assistant
    from minivlm.onnx_engine.assistant import OnnxAssistant

STDIN = "-"  # as the name of a picture: the bytes on standard input
MAX_BYTES = 300_000_000  # of a file; the largest picture that is decoded has fewer as plain RGB


def number(text: str) -> float:
    """Return a number, as a type of `add_argument`; `Decoding` checks its limits."""
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be a number.") from None


def add_model_options(parser: Parser, max_new_tokens: int) -> None:
    """Add the options that every command has which asks a model."""
    parser.add_argument(
        "--model", help="Folder or Hub id of a model. Default: this folder, that of the checkout, else the Hub's."
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, default=max_new_tokens, metavar="N",
        help=f"Longest answer in tokens. Default: {max_new_tokens}.",
    )  # fmt: skip
    parser.add_argument("--device", help="Where to compute. Default: cuda if there is one, else cpu.")


def add_sampling_options(parser: Parser) -> None:
    """Add the options that say how the tokens of an answer are chosen."""
    parser.add_argument(
        "--temperature", type=number, default=0.0, metavar="T",
        help="0: the likeliest answer; the higher, the more answers vary. Default: 0.",
    )  # fmt: skip
    parser.add_argument(
        "--top_p", type=number, default=1.0, metavar="P",
        help="Draw among the likeliest tokens that have this share of the probability. Default: 1, all.",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="Seed of what is drawn. Default: another one each time.")


def decoding_of(args: Namespace) -> Decoding:
    """Return how the options say that tokens are chosen.

    Raises:
        ValueError: an option is outside of its limits.
    """
    return Decoding(args.max_new_tokens, args.temperature, args.top_p)


def add_engine_option(parser: Parser) -> None:
    """Add the option that says what computes the answers."""
    parser.add_argument(
        "--engine", choices=("torch", "onnx"), default="torch",
        help="torch: the model itself. onnx: exported graphs, which start and answer faster. Default: torch.",
    )  # fmt: skip


def check_engine(args: Namespace) -> None:
    """Raise ValueError for an option that the engine does not have, or a folder that is for the other engine."""
    if args.engine == "torch":
        if args.model and has_graphs(Path(args.model)) and not any(Path(args.model).glob("*.safetensors")):
            raise ValueError(f"--model {args.model} holds ONNX graphs and no weights. Add --engine onnx.")
        return
    if getattr(args, "schema", None):
        raise ValueError("--engine onnx does not have --schema. Use --engine torch.")
    if args.device not in (None, "cpu"):
        raise ValueError(f"--engine onnx computes on the CPU, not on --device {args.device}. Use --engine torch.")


def open_engine(args: Namespace) -> "Assistant | OnnxAssistant":
    """Return what answers conversations by the engine that the options name."""
    if args.engine == "torch":
        return load_assistant(args)
    from minivlm.onnx_engine.assistant import OnnxAssistant

    return OnnxAssistant(find_graphs(args.model or default_model()), getattr(args, "seed", None))


def load_assistant(args: Namespace) -> "Assistant":
    """Load the model that the options name, by this checkout's code; draw from the seed that they give.

    Raises:
        ValueError: the device is not there, or no MiniVLM has that name.
    """
    import torch
    from transformers.utils import logging

    from minivlm.inference import Assistant
    from minivlm.model.loading import check_device, load_trained, place

    device = check_device(args.device)
    name = args.model or default_model()
    logging.disable_progress_bar()  # of the weights, which are there at once
    model, processor = load_trained(name, "--model" if args.model else "")
    if getattr(args, "seed", None) is not None:
        torch.manual_seed(args.seed)
    return Assistant(place(model, device), processor)


def read_picture(name: str) -> bytes:
    """Return the bytes of a file, or for "-" those on standard input.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it has more than `MAX_BYTES`.
    """
    if name == STDIN:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: more than {MAX_BYTES:,} bytes. Scale the picture down.")
    return data


def decode_named(name: str, data) -> Image.Image:
    """Return the picture that `decode_image` makes of `data`; an error names it.

    Raises:
        ValueError: it cannot be decoded or is too large.
    """
    try:
        return decode_image(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error


def question_about(pictures: list, question: str) -> dict:
    """Return the message of a user who shows pictures and asks about them."""
    shown = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
