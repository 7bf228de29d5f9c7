"""Join trained parts to a new model, or move a model in and out of MiniVLM.

    minivlm convert build --vision_model TOWER --text_model DECODER --out runs/new
    minivlm convert from_minimind out/sft_vlm_768.pth --tokenizer model --vision_model TOWER --out runs/mine
    minivlm convert to_llava runs/mine --out runs/llava --verify

--out names a new folder: it is complete once it is there, and absent if anything failed. CONVERTING.md explains each
command; `minivlm convert COMMAND --help` shows its options and an example.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

from minivlm.cli import Parser
from minivlm.convert.quantize import DTYPES as WEIGHTS
from minivlm.convert.quantize import FOR_BROWSERS

DTYPES = ("float32", "bfloat16", "float16")
FILE_TYPES = ("f32", "f16", "q8_0")  # those of `minivlm/convert/to_gguf.py`
BUILD = """Join a trained vision tower and a trained decoder into a new model, ready to train.

    minivlm convert build --vision_model google/siglip2-base-patch32-256 \\
        --text_model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/new

The projector between them gets random weights: train it first, by `minivlm train --model runs/new --train projector`.
"""
FROM_MINIMIND = """Read MiniMind-V's or MiniMind's weights: .pth, .bin, .safetensors, or a folder of transformers.

    minivlm convert from_minimind out/sft_vlm_768.pth --tokenizer model \\
        --vision_model google/siglip2-base-patch32-256 --out runs/minimind_3v --verify
    minivlm convert from_minimind out/full_sft_768.pth --tokenizer model --out runs/minimind_3

MiniMind-V becomes a MiniVLM. MiniMind becomes a decoder of transformers' own class.
"""
TO_WEB = """Write a page that asks the model in the browser, without a server: any static server or Space can show it.

    minivlm convert to_web runs/train/final --out runs/page

For a page that loads nothing from other hosts, fetch two archives from npm first; CONVERTING.md has the command.

    minivlm convert to_web runs/train/final --out runs/page --library runs/library
"""
TO_GGUF = """Write GGUF files for llama.cpp, Ollama and LM Studio: the decoder, and tower with projector beside it.

    minivlm convert to_gguf runs/train/final --out runs/gguf
    llama-server -m runs/gguf/model-F16.gguf --mmproj runs/gguf/mmproj-F16.gguf

Pictures need a SigLIP tower and the default projector. --text_only writes the decoder of any model.
"""
TO_ONNX = """Write ONNX graphs: tower with projector, embeddings, decoder with cache.

    minivlm convert to_onnx runs/train/final --out runs/onnx --verify
    minivlm convert to_onnx runs/train/final --out runs/onnx-int8 --dtype int8

onnxruntime and transformers.js read them. int8 and int4 compute with matrices of so many bits, by onnxruntime alone;
they are the fastest for one answer at a time.
"""
EXPORTS = {  # command -> its module in minivlm/convert, with function(source, out, verify), and its help
    "to_minimind": (
        "to_minimind",
        """Write the files that MiniMind-V's own code loads. It reverses from_minimind, bit for bit.

    minivlm convert to_minimind runs/minimind_3v/final --out runs/there --verify
""",
    ),
    "to_llava": (
        "llava",
        """Write a LlavaForConditionalGeneration, which other engines load without remote code.

    minivlm convert to_llava runs/train/final --out runs/llava --verify
""",
    ),
    "to_causal_lm": (
        "llava",
        """Write the decoder alone, ours as Qwen3ForCausalLM.

    minivlm convert to_causal_lm runs/train/final --out runs/decoder --verify
""",
    ),
}


def add_command(commands, name: str, doc: str) -> Parser:
    """Add the parser of a command, with the option that all of them have; the first line of `doc` is its summary."""
    parser = commands.add_parser(name, doc=doc, help=doc.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="New folder for the result.")
    return parser


def add_verify(parser: Parser) -> None:
    """Add the option of all commands that can compare the result with its source."""
    parser.add_argument("--verify", action="store_true", help="Also compare logits; keep nothing if they differ.")


def add_build(commands) -> None:
    """Add the options of `build`."""
    parser = add_command(commands, "build", BUILD)
    parser.add_argument("--vision_model", required=True, help="Folder or Hub id of the vision tower.")
    parser.add_argument("--text_model", required=True, help="Folder or Hub id of a causal language model.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer. Default: that of text_model.")
    parser.add_argument(
        "--model_config", type=read_mapping, default={}, metavar="JSON", help="Other fields of MiniVLMConfig."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the projector's weights. Default: 0.")


def add_from_minimind(commands) -> None:
    """Add the options of `from_minimind`."""
    parser = add_command(commands, "from_minimind", FROM_MINIMIND)
    parser.add_argument("source", help="File or folder to read.")
    parser.add_argument("--tokenizer", help="Folder of MiniMind's tokenizer, if the source is a file.")
    parser.add_argument(
        "--vision_model", help="Folder or Hub id of the vision tower, which MiniMind-V's files do not hold."
    )
    parser.add_argument("--dtype", choices=DTYPES, help="Data type of the result. Default: that of the source.")
    add_verify(parser)


def add_export(commands, name: str, doc: str) -> None:
    """Add the options of a command that reads a MiniVLM."""
    parser = add_command(commands, name, doc)
    parser.add_argument("source", help="Folder or Hub id of a MiniVLM.")
    add_verify(parser)


def add_to_onnx(commands) -> None:
    """Add the options of `to_onnx`."""
    add_export(commands, "to_onnx", TO_ONNX)
    commands.choices["to_onnx"].add_argument(
        "--dtype", choices=WEIGHTS, default="fp32", help="How to store weights, and to compute. Default: fp32."
    )


def add_to_web(commands) -> None:
    """Add the options of `to_web`."""
    add_export(commands, "to_web", TO_WEB)
    parser = commands.choices["to_web"]
    parser.add_argument(
        "--dtype",
        choices=FOR_BROWSERS,
        default="q8",
        help="How to store weights; q8: 8 bits, 16 for the tower. Default: q8.",
    )
    parser.add_argument(
        "--library", type=Path, metavar="DIR", help="Folder with npm's archives of transformers.js, to copy its files."
    )


def add_to_gguf(commands) -> None:
    """Add the options of `to_gguf`."""
    parser = add_command(commands, "to_gguf", TO_GGUF)
    parser.add_argument("source", help="Folder or Hub id of a MiniVLM.")
    parser.add_argument(
        "--outtype", choices=FILE_TYPES, default="f16", help="Data type of the matrices. Default: f16."
    )
    parser.add_argument("--text_only", action="store_true", help="Write the decoder alone, without pictures.")
    parser.add_argument(
        "--force", action="store_true", help="Also write a tower with a class token, which llama.cpp gets wrong."
    )


def read_mapping(text: str) -> dict:
    """Return a JSON object of the command line as a dictionary."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a mapping. Write it as {{"pixel_shuffle_factor": 2}}.')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return `command`, the name of the conversion, and its options."""
    parser = Parser(__doc__, prog="minivlm convert")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_build(commands)
    add_from_minimind(commands)
    for name, (_, doc) in EXPORTS.items():
        add_export(commands, name, doc)
    add_to_onnx(commands)
    add_to_web(commands)
    add_to_gguf(commands)
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> list[str]:
    """Run the conversion; return lines about what was done. Only its own module is imported."""
    if args.command == "build":
        from minivlm.convert.join import join
        from minivlm.model.options import ModelArgs

        parts = {name: getattr(args, name) for name in ("vision_model", "text_model", "tokenizer", "model_config")}
        return join(ModelArgs(**parts), args.out, args.seed)
    if args.command == "from_minimind":
        import torch

        from minivlm.convert.from_minimind import from_minimind

        dtype = getattr(torch, args.dtype) if args.dtype else None
        options = {"tokenizer": args.tokenizer, "vision_model": args.vision_model, "dtype": dtype}
        return from_minimind(args.source, args.out, **options, verify=args.verify)
    if args.command == "to_onnx":
        from minivlm.convert.to_onnx import to_onnx

        return to_onnx(args.source, args.out, args.verify, args.dtype)
    if args.command == "to_web":
        from minivlm.convert.to_web import to_web

        return to_web(args.source, args.out, args.dtype, args.library, args.verify)
    if args.command == "to_gguf":
        from minivlm.convert.to_gguf import to_gguf

        options = {name: getattr(args, name) for name in ("outtype", "text_only", "force")}
        return to_gguf(args.source, args.out, **options)
    module = import_module(f"minivlm.convert.{EXPORTS[args.command][0]}")
    return getattr(module, args.command)(args.source, args.out, args.verify)


def main(argv: list[str] | None = None) -> None:
    """Convert a model, and print what was done."""
    args = parse_args(argv)
    from minivlm.convert.files import check_free

    check_free(args.out)  # before anything is loaded
    print("\n".join([*convert(args), f"written to {args.out}"]))
