"""Find the largest micro-batch that fits into the device's memory."""

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from minivlm.data.encoder import Encoder
from minivlm.training.losses import compute_loss
from minivlm.training.options import TrainArgs


def longest_row(encoder: Encoder, max_length: int) -> dict:
    """Return a row of `max_length` tokens with one picture, as the collators take it."""
    blank = encoder.blank()
    rest = torch.full((max(0, max_length - len(blank["input_ids"])),), encoder.processor.tokenizer.pad_token_id)
    ids = torch.cat([blank["input_ids"], rest])
    row = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(len(ids))}
    return {**blank, **row, "branch": torch.zeros_like(ids)}


def largest_micro_batch(model, encoder: Encoder, collate, args: TrainArgs, accelerator: Accelerator) -> int:
    """Return how many of the longest rows go forward and backward in this device's memory; the same on all ranks."""
    row = longest_row(encoder, args.max_length)
    length = len(row["input_ids"])
    model.to(accelerator.device).train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    @find_executable_batch_size(starting_batch_size=-(-args.batch_size // accelerator.num_processes))
    def attempt(count: int) -> int:
        held = torch.empty(2 * trainable, device=accelerator.device)  # room for the optimizer's two moments
        batch = collate([[row] * max(1, args.pack_tokens // length)] * count if args.packing else [row] * count)
        tensors = {k: v.to(accelerator.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        answers = torch.ones((), device=accelerator.device)
        compute_loss(model, tensors, answers, args, accelerator)[0].backward()
        del held
        return count

    found = torch.tensor(attempt(), device=accelerator.device)
    model.zero_grad(set_to_none=True)
    least = int(accelerator.gather(found).min())
    accelerator.print(f"micro-batches of {least}: the most rows of {length} tokens that fit into memory")
    return least
