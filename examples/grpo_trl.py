# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.19,<6", "trl>=1.16,<2", "datasets>=4.0", "pillow>=10.1"]
# ///
"""Train by group relative policy optimization (arXiv 2402.03300) with TRL: sample answers and reward the right ones.

    python examples/grpo_trl.py --data data/train.parquet --max_steps 100 --output_dir runs/grpo_trl

A question teaches something only if some of its sampled answers are right and others are wrong. Start from a model
that can answer. The code in the folder `--model` is executed, so name a folder that you trust.
"""

import argparse
import json
import unicodedata

import torch
from datasets import Image, List, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="Folder or Hub id to start from. Default: this repository.")
    parser.add_argument("--data", nargs="+", default=["data/train.parquet"], help="Parquet, MiniMind-V's columns.")
    parser.add_argument("--tasks", nargs="*", default=["choice"], help="Rows of these tasks; none named: all rows.")
    parser.add_argument("--output_dir", default="runs/grpo_trl", help="Where the model and processor are written.")
    parser.add_argument("--max_steps", type=int, default=100, help="Optimizer steps. Default: 100.")
    parser.add_argument("--batch_size", type=int, default=16, help="Answers per step and device. Default: 16.")
    parser.add_argument("--num_generations", type=int, default=4, help="Answers per question. Default: 4.")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="Tokens of an answer. Default: 32.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Temperature of the sampling. Default: 1.")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="Falls to 0 linearly. Default: 1e-5.")
    parser.add_argument("--seed", type=int, default=0, help="Order of the rows and sampling. Default: 0.")
    return parser.parse_args(argv)


def to_prompt(row: dict) -> dict:
    """Return the turns before the last one as the prompt, and the last turn as the `answer` of the reward."""
    *question, answer = json.loads(row["conversations"])
    prompt = []
    for turn in question:
        parts = []
        for i, text in enumerate(turn["content"].split("<image>")):
            parts += [{"type": "image", "text": None}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
        prompt.append({"role": turn["role"], "content": parts})
    pictures = row["image_bytes"] if "<image>" in row["conversations"] else []  # text-only rows carry a blank one
    images = pictures if isinstance(pictures, list) else [pictures]
    return {"prompt": prompt, "answer": answer["content"], "images": images}


def normalise(text: str) -> str:
    """Return the text as `minivlm.evaluation.scoring` compares it; copied from there so that this file runs alone."""
    return unicodedata.normalize("NFKC", text).strip().rstrip(".。").strip().casefold()


def exact_match(completions: list, answer: list[str], **kwargs) -> list[float]:
    """Return 1 for each right answer and 0 for any other. TRL passes the columns of the data by name."""
    said = [messages[-1]["content"] for messages in completions]
    return [float(normalise(text) == normalise(right)) for text, right in zip(said, answer)]


def main(argv=None) -> GRPOTrainer:
    """Train, save the model to `--output_dir`, and return the trainer."""
    args = parse_args(argv)
    rows = load_dataset("parquet", data_files=args.data, split="train")
    if args.tasks:
        rows = rows.filter(lambda task: task in args.tasks, input_columns="task")
    if not rows:
        raise ValueError(f"No row of {args.data} is of the tasks {args.tasks}. Name others with --tasks.")
    rows = rows.map(to_prompt, remove_columns=rows.column_names).cast_column("images", List(Image()))
    print(f"Running the model code of {args.model!r} (trust_remote_code).")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    # Weights in fp32, the computation in bf16 where a GPU can: small updates are lost on bf16 weights.
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    config = GRPOConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        num_generations=args.num_generations,
        max_completion_length=args.max_new_tokens,
        temperature=args.temperature,
        learning_rate=args.learning_rate,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # TRL's default saves memory that a model of this size does not need
        logging_steps=min(10, args.max_steps),
        save_strategy="no",  # the last weights only
        report_to="none",
        seed=args.seed,
    )
    trainer = GRPOTrainer(model, exact_match, args=config, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()  # weights, processor and the three files of code
    print(f"Saved to {args.output_dir}.")
    return trainer


if __name__ == "__main__":
    main()
