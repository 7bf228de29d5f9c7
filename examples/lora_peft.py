# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.19,<6", "trl>=1.16,<2", "peft>=0.17", "datasets>=4.0", "pillow>=10.1"]
# ///
"""Train a LoRA adapter (arXiv 2106.09685) of the decoder with PEFT; all other weights stay fixed.

    python examples/lora_peft.py --data data/train.parquet --max_steps 200 --output_dir runs/lora_peft --merge

`--output_dir` holds the adapter, less than 1 MB. With `--merge` its folder `merged` holds a whole model that loads
without PEFT. The code in the folder `--model` is executed, so name a folder that you trust.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Image, List, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

# The decoder only: `q_proj` alone would also match the attention of most vision towers.
DECODER = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="Folder or Hub id to start from. Default: this repository.")
    parser.add_argument("--data", nargs="+", default=["data/train.parquet"], help="Parquet, MiniMind-V's columns.")
    parser.add_argument("--output_dir", default="runs/lora_peft", help="Where the adapter is written.")
    parser.add_argument("--merge", action="store_true", help="Also write OUTPUT_DIR/merged, which needs no PEFT.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps. Default: 200.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows per step and device. Default: 16.")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Falls to 0 linearly. Default: 1e-3.")
    parser.add_argument("--rank", type=int, default=8, help="Width of the adapter. Default: 8.")
    parser.add_argument("--seed", type=int, default=0, help="Order of the rows. Default: 0.")
    return parser.parse_args(argv)


def to_trl(row: dict) -> dict:
    """Return a row as TRL reads it: the pictures, and the messages in parts, one of them for each `<image>` marker."""
    messages = []
    for turn in json.loads(row["conversations"]):
        parts = []
        for i, text in enumerate(turn["content"].split("<image>")):
            parts += [{"type": "image", "text": None}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": turn["role"], "content": parts})
    pictures = row["image_bytes"] if "<image>" in row["conversations"] else []  # text-only rows carry a blank one
    return {"messages": messages, "images": pictures if isinstance(pictures, list) else [pictures]}


def main(argv=None) -> SFTTrainer:
    """Train, save the adapter to `--output_dir`, and return the trainer."""
    args = parse_args(argv)
    rows = load_dataset("parquet", data_files=args.data, split="train")
    rows = rows.map(to_trl, remove_columns=rows.column_names).cast_column("images", List(Image()))
    print(f"Running the model code of {args.model!r} (trust_remote_code).")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    config = SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        assistant_only_loss=True,  # by the `{% generation %}` block of the chat template
        max_length=None,  # TRL's 1,024 would cut a row of many pictures in the middle of one
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # TRL's default saves memory that a model of this size does not need
        logging_steps=min(10, args.max_steps),
        save_strategy="no",  # the last weights only
        report_to="none",
        seed=args.seed,
    )
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=DECODER)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=processor, peft_config=lora)
    trainer.train()
    trainer.save_model()  # the adapter and the processor
    print(f"Saved to {args.output_dir}.")
    if args.merge:
        base = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
        merged = Path(args.output_dir, "merged")
        PeftModel.from_pretrained(base, args.output_dir).merge_and_unload().save_pretrained(merged)
        processor.save_pretrained(merged)
        print(f"Merged into {merged}.")
    return trainer


if __name__ == "__main__":
    main()
