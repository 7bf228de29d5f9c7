# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.19,<6", "trl>=1.16,<2", "datasets>=4.0", "pillow>=10.1"]
# ///
"""Fine-tune with TRL on pictures and conversations; only the words of the assistant carry loss.

    python examples/sft_trl.py --data data/train.parquet --max_steps 200 --output_dir runs/sft_trl

The result is a folder like `--model`. The code in the folder `--model` is executed, so name a folder that you trust.
"""

import argparse
import json

import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="Folder or Hub id to start from. Default: this repository.")
    parser.add_argument("--data", nargs="+", default=["data/train.parquet"], help="Parquet, MiniMind-V's columns.")
    parser.add_argument("--output_dir", default="runs/sft_trl", help="Where the model and processor are written.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps. Default: 200.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows per step and device. Default: 16.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Falls to 0 linearly. Default: 1e-4.")
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
    """Train, save the model to `--output_dir`, and return the trainer."""
    args = parse_args(argv)
    rows = load_dataset("parquet", data_files=args.data, split="train")
    rows = rows.map(to_trl, remove_columns=rows.column_names).cast_column("images", List(Image()))
    print(f"Running the model code of {args.model!r} (trust_remote_code).")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    # Weights in fp32, the computation in bf16 where a GPU can: small updates are lost on bf16 weights.
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
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()  # weights, processor and the three files of code
    print(f"Saved to {args.output_dir}.")
    return trainer


if __name__ == "__main__":
    main()
