# /// script
# requires-python = ">=3.10"
# dependencies = ["minivlm", "trl>=1.16,<2"]
# ///
"""Fine-tune with TRL on pictures and conversations, with rows packed one after another instead of padded.

    python examples/sft_trl_packed.py --data data/train.parquet --max_steps 200 --output_dir runs/sft_trl_packed

TRL 1.16 packs text only. With pictures `packing=True` stops with "Packing is not supported for vision datasets.", and
`padding_free=True` with "Padding-free training is yet not supported for vision datasets." So here MiniVLM reads,
encodes and packs the rows, and a collator hands the packs over. TRL does the rest: its loop, its loss in tiles, the
average over the answers of all micro-batches and devices, its metrics, and what saves and resumes.

A row of TRL's data set is a pack: a list of row numbers. `--batch_size` counts packs, and all packs of a batch stand
in one row (1, T) without padding. `position_ids` restart where a row begins, which keeps rows apart. On a CPU each row
attends by itself (`sdpa_packed`); elsewhere transformers builds a mask. Each row is in one pack, and TRL shuffles the
packs anew every epoch. Rows that are too long or cannot be used are counted and left out.

The result is a folder like `--model`. The code in the folder `--model` is executed, so name a folder that you trust.
"""

import argparse
import random
from collections import Counter

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from minivlm.data.bad_rows import BadRow, describe_bad_rows, kind_of
from minivlm.data.collators import PackingCollator
from minivlm.data.dataset import TrainingRows
from minivlm.data.encoder import IGNORE, Encoder
from minivlm.data.plans import PackBudget, pack
from minivlm.data.rows import Rows, load_rows
from minivlm.model.packed_attention import use_packed_attention


def parse_args(argv=None):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="Folder or Hub id to start from. Default: this repository.")
    parser.add_argument("--data", nargs="+", default=["data/train.parquet"], help="Files in any layout of MiniVLM.")
    parser.add_argument("--output_dir", default="runs/sft_trl_packed", help="Where model and processor are written.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps. Default: 200. -1: one epoch.")
    parser.add_argument("--batch_size", type=int, default=1, help="Packs per step and device. Default: 1.")
    parser.add_argument("--pack_tokens", type=int, default=4096, help="Most tokens in a pack. Default: 4096.")
    parser.add_argument("--pack_pictures", type=int, default=64, help="Most pictures in a pack. Default: 64.")
    parser.add_argument("--max_length", type=int, default=1024, help="Longer rows are left out. Default: 1024 tokens.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Falls to 0 linearly. Default: 1e-4.")
    parser.add_argument("--seed", type=int, default=0, help="Order of the rows. Default: 0.")
    return parser.parse_args(argv)


def plan_packs(rows: Rows, encoder: Encoder, budget: PackBudget, seed: int) -> tuple[list[list[int]], Counter]:
    """Return the packs, each the numbers of its rows, and how many rows are left out for which reason."""
    sizes, left_out = [], Counter()
    for index, sample in enumerate(rows.samples()):
        try:
            if isinstance(sample, BadRow):
                raise sample
            sizes.append((index, *encoder.size(sample)))  # (number, tokens, pictures); no picture is decoded
        except BadRow as error:
            left_out[kind_of(error)] += 1
    if not sizes:
        raise ValueError(f"None of {len(rows)} rows can be used:\n{describe_bad_rows(left_out)}")
    random.Random(seed).shuffle(sizes)
    return list(pack(sizes, budget)), left_out


class PackCollator:
    """Turn packs into the tensors of a batch: `input_ids`, `position_ids`, `labels` (1, T), and `pixel_values`."""

    def __init__(self, rows: Rows, encoder: Encoder):
        self.rows = TrainingRows(rows, encoder, packed=True)
        self.join = PackingCollator(encoder.blank())  # a black picture joins a batch that has none

    def __call__(self, packs: list[dict]) -> dict[str, torch.Tensor]:
        """Encode and join `[{"rows": [3, 17, 5]}, ...]`."""
        batch = self.join([self.rows[0, tuple(pack["rows"])] for pack in packs])
        for place, reason in batch["bad_rows"]:
            print(f"Left out: {place}: {reason}.")
        # Our model takes the targets of the answers alone, TRL a label for every token, which it shifts itself.
        labels = torch.full_like(batch["input_ids"], IGNORE)
        labels[:, 1:].masked_scatter_(batch["logits_to_keep"][:, :-1], batch["shift_labels"])
        return {"labels": labels, **{key: batch[key] for key in ("input_ids", "position_ids", "pixel_values")}}


def make_config(args) -> SFTConfig:
    """Return TRL's options."""
    return SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        num_train_epochs=1,  # for `--max_steps -1`
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        dataset_kwargs={"skip_prepare_dataset": True},  # the collator tokenizes
        remove_unused_columns=False,  # the model has no argument named `rows`
        max_length=None,  # `--max_length` was applied before
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # TRL's default saves memory that a model of this size does not need
        logging_steps=10,
        save_strategy="no",  # the last weights only
        report_to="none",
        seed=args.seed,
    )


def main(argv=None) -> SFTTrainer:
    """Train, save the model to `--output_dir`, and return the trainer."""
    args = parse_args(argv)
    print(f"Running the model code of {args.model!r} (trust_remote_code).")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    # Weights in fp32, the computation in bf16 where a GPU can: small updates are lost on bf16 weights.
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32)
    rows, encoder = load_rows(args.data), Encoder(processor, args.max_length)
    packs, left_out = plan_packs(rows, encoder, PackBudget(args.pack_tokens, args.pack_pictures), args.seed)
    print(f"{len(rows) - left_out.total():,} of {len(rows):,} rows in {len(packs):,} packs. Left out:")
    print(describe_bad_rows(left_out) or "  none")
    config = make_config(args)
    if config.device.type == "cpu":
        use_packed_attention(model.model.language_model)
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_dict({"rows": packs}),
        data_collator=PackCollator(rows, encoder),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()  # weights, processor and the three files of code
    print(f"Saved to {args.output_dir}.")
    return trainer


if __name__ == "__main__":
    main()
