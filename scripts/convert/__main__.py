"""Move models in and out of this repository.

    python -m scripts.convert build --vision_model TOWER --text_model DECODER --out runs/new
    python -m scripts.convert from_minimind out/sft_vlm_768.pth --tokenizer model --vision_model TOWER --out runs/mine
    python -m scripts.convert to_llava runs/mine --out runs/llava --verify

Nothing is half-written: --out is complete once it is there. CONVERTING.md has an example of each command, and
`python -m scripts.convert COMMAND --help` its options.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from backbones_minivlm import build, check_sources
from options_minivlm import TrainArgs
from scripts.convert.files import check_free, new_folder
from scripts.convert.from_minimind import from_minimind
from scripts.convert.llava import to_causal_lm, to_llava
from scripts.convert.to_minimind import to_minimind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUMMARIES = {
    "build": "Join a trained tower and a trained decoder into a new model, ready to train.",
    "from_minimind": "Read MiniMind-V's or MiniMind's weights (.pth, .bin, .safetensors, or a transformers folder).",
    "to_minimind": "Write what MiniMind-V's own code loads: the reverse, bit for bit.",
    "to_llava": "Write a LlavaForConditionalGeneration: every engine serves it without remote code.",
    "to_causal_lm": "Write the decoder alone, ours as Qwen3ForCausalLM; llama.cpp's converter starts from there.",
    "to_onnx": "Write ONNX graphs (tower and projector, embeddings, decoder with cache) for onnxruntime.",
}


def mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no mapping. Write it as {{"pixel_shuffle_factor": 2}}.')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers = {name: commands.add_parser(name, help=text, description=text) for name, text in SUMMARIES.items()}
    tower = "Folder or Hub id of the vision tower."
    for name, sub in subparsers.items():
        if name == "build":
            sub.add_argument("--vision_model", required=True, help=tower)
            sub.add_argument("--text_model", required=True, help="Folder or Hub id of a causal language model.")
            sub.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer. Default: that of text_model.")
            sub.add_argument(
                "--model_config", type=mapping, default={}, help="Other fields of MiniVLMConfig, as JSON."
            )
            sub.add_argument("--seed", type=int, default=0, help="Seed of the projector's weights. Default: 0.")
        else:
            sub.add_argument(
                "source", help="File or folder to read." if name == "from_minimind" else "Folder or Hub id."
            )
            sub.add_argument(
                "--verify", action="store_true", help="Also compare logits, and keep nothing if they differ."
            )
        if name == "from_minimind":
            sub.add_argument("--tokenizer", help="Folder of MiniMind's tokenizer, if the source is a file.")
            sub.add_argument("--vision_model", help=f"{tower} MiniMind-V's files leave it out.")
            sub.add_argument("--dtype", choices=DTYPES, help="Type of the result's numbers. Default: the source's.")
        sub.add_argument("--out", type=Path, required=True, help="Folder to make.")
    return parser.parse_args(argv)


def join(args: argparse.Namespace) -> list[str]:
    """`build`: the same model that train_accelerate.py would make of these options, on disk."""
    options = {name: getattr(args, name) for name in ("vision_model", "text_model", "tokenizer", "model_config")}
    options = TrainArgs(**options)
    check_sources(options)
    set_seed(args.seed)
    model, processor = build(options)
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    parts = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    parts |= {"decoder": model.model.language_model}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items()]
    return [f"parameters: {', '.join(sizes)}", f"{model.config.image_seq_length} image tokens per picture"]


def convert(args: argparse.Namespace) -> list[str]:
    check_free(args.out)  # before anything is loaded
    if args.command == "build":
        return join(args)
    if args.command == "from_minimind":
        options = {"tokenizer": args.tokenizer, "vision_model": args.vision_model, "dtype": DTYPES.get(args.dtype)}
        return from_minimind(args.source, args.out, **options, verify=args.verify)
    check_sources(TrainArgs(model=args.source))
    if args.command == "to_onnx":
        from scripts.convert.to_onnx import to_onnx  # needs the extra `onnx`

        return to_onnx(args.source, args.out, args.verify)
    function = {"to_minimind": to_minimind, "to_llava": to_llava, "to_causal_lm": to_causal_lm}
    return function[args.command](args.source, args.out, args.verify)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        lines = convert(args)
    except StrictDataclassError as error:  # of a configuration; its cause has the value and the remedy
        sys.exit(f"python -m scripts.convert {args.command}: {error.__cause__ or error}")
    except (ValueError, OSError) as error:
        sys.exit(f"python -m scripts.convert {args.command}: {error}")
    print("\n".join([*lines, f"written to {args.out}"]))


if __name__ == "__main__":
    main()
