# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.19,<6", "trl>=1.16,<2", "datasets>=4.0", "pillow>=10.1"]
# ///
"""Train by direct preference optimization (arXiv 2305.18290) with TRL: prefer the right option to a wrong one.

    python examples/dpo_trl.py --data data/train.parquet --max_steps 100 --output_dir runs/dpo_trl

Rows need a column `options` with all answers that the question names. Rows without options are left out and counted.
The code in the folder `--model` is executed, so name a folder that you trust.
"""

import argparse
import json
import random

import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="Folder or Hub id to start from. Default: this repository.")
    parser.add_argument("--data", nargs="+", default=["data/train.parquet"], help="Parquet, MiniMind-V's columns.")
    parser.add_argument("--output_dir", default="runs/dpo_trl", help="Where the model and processor are written.")
    parser.add_argument("--max_steps", type=int, default=100, help="Optimizer steps. Default: 100.")
    parser.add_argument("--batch_size", type=int, default=16, help="Pairs per step and device. Default: 16.")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="Falls to 0 linearly. Default: 1e-5.")
    parser.add_argument("--beta", type=float, default=0.1, help="Pull towards the start. Default: 0.1.")
    parser.add_argument("--seed", type=int, default=0, help="Order of rows, choice of wrong answers. Default: 0.")
    return parser.parse_args(argv)


def to_pair(row: dict, index: int, processor, seed: int) -> dict:
    """Return prompt, chosen and rejected answer as text, and the pictures.

    With messages TRL would add the newline after <|im_end|> to both answers. The model is never trained to write this
    newline, so its probability is arbitrary. DPO could then widen the margin by the newline instead of by the answer.
    """
    *question, answer = json.loads(row["conversations"].replace("<image>", processor.image_token))
    wrong = [option for option in row["options"] if option != answer["content"]]
    end = processor.tokenizer.eos_token
    pictures = row["image_bytes"] if "<image>" in row["conversations"] else []  # text-only rows carry a blank one
    return {
        "prompt": processor.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
        "chosen": answer["content"] + end,
        "rejected": random.Random(f"{seed} {index}").choice(wrong) + end,
        "images": pictures if isinstance(pictures, list) else [pictures],
    }


def main(argv=None) -> DPOTrainer:
    """Train, save the model to `--output_dir`, and return the trainer."""
    args = parse_args(argv)
    rows = load_dataset("parquet", data_files=args.data, split="train")
    choices = rows.filter(lambda row: len(set(row["options"] or [])) > 1)
    print(f"{len(choices)} of {len(rows)} rows have options.")
    if not choices:
        raise ValueError(f"No row of {args.data} names two different `options`. Use rows of the task `choice`.")
    print(f"Running the model code of {args.model!r} (trust_remote_code).")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    # Weights in fp32, the computation in bf16 where a GPU can: small updates are lost on bf16 weights.
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    pairs = choices.map(
        to_pair,
        with_indices=True,
        fn_kwargs={"processor": processor, "seed": args.seed},
        remove_columns=choices.column_names,
    ).cast_column("images", List(Image()))
    config = DPOConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        beta=args.beta,
        max_length=None,  # TRL's 1,024 would cut a row of many pictures in the middle of one
        trust_remote_code=True,  # TRL loads the reference model itself, from the same folder
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # TRL's default saves memory that a model of this size does not need
        logging_steps=min(10, args.max_steps),
        save_strategy="no",  # the last weights only
        report_to="none",
        seed=args.seed,
    )
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=processor)
    trainer.train()
    trainer.save_model()  # weights, processor and the three files of code
    print(f"Saved to {args.output_dir}.")
    return trainer


if __name__ == "__main__":
    main()
