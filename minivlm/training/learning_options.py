"""Options of training: how long, by which optimizer, in which precision, on which device."""

from argparse import Namespace
from dataclasses import dataclass

import torch

from minivlm.cli import option
from minivlm.model.loading import check_device
from minivlm.model.parts import PARTS
from minivlm.training.optimizers import SCHEDULES


@dataclass
class TrainingArgs:
    """Choose how the model trains."""

    _argument_group_name = "training"

    epochs: float = option(1.0, "Passes over the data, if neither max_steps nor max_minutes is given.")
    max_steps: int | None = option(None, "Optimizer steps, whatever the number of ranks.")
    max_minutes: float | None = option(None, "Stop after so many minutes; the learning rate decays over them.")
    optimizer: str = option("adamw", "adamw, or muon (matrices of blocks by Muon, everything else by AdamW).")
    learning_rate: float = option(1e-3, "Learning rate after warm-up.")
    learning_rates: list[str] = option(
        [], "Learning rates of parts that have their own, as vision=1e-5 projector=1e-3."
    )
    schedule: str = option("linear", f"Course of the learning rate after warm-up: {', '.join(SCHEDULES)}.")
    final_learning_rate: float = option(0.0, "Learning rate at the end, as a share of the learning rate.")
    warmup: float = option(0.03, "Length of the rise of the learning rate: a share of the run, or from 1 up steps.")
    weight_decay: float = option(0.05, "Decoupled weight decay of matrices; norms, biases and embeddings have none.")
    adam_beta2: float = option(0.98, "Decay of AdamW's mean square gradient.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.")
    z_loss: float = option(0.0, "Weight of the squared log-partition added to the loss (arXiv 2204.02311, section 5).")
    grounding_loss: float = option(
        0.0, "Weight of a loss that lets words attend to what they name; needs compose: data with phrases."
    )
    ema: float = option(0.0, "Decay of an average of the weights that is evaluated and saved as the result. 0: none.")
    device: str = option("auto", "auto, cpu, or cuda: stop if there is no GPU.")
    mixed_precision: str = option(
        "auto", "bf16, fp16, fp8, tf32, no (fp32), or auto: bf16 where the device computes in it."
    )
    compile: bool = option(False, "Compile the blocks of tower and decoder (needs a C++ compiler on CPU).")


def check_training(args: TrainingArgs | Namespace) -> None:
    """Raise ValueError for a device or precision that this machine lacks, or a number out of range."""
    if args.device != "auto":
        check_device(args.device)
    if args.mixed_precision == "fp8" and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    ):
        raise ValueError("--mixed_precision fp8 needs a GPU of compute capability 8.9 (Ada, Hopper). Use bf16.")
    if args.mixed_precision == "fp16" and args.optimizer == "muon":
        # Accelerate's scaler steps once per optimizer, so the second would see gradients that are unscaled twice.
        raise ValueError("--mixed_precision fp16 goes with one optimizer. Use --optimizer adamw, or bf16.")
    for name in ("ema", "final_learning_rate"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 0 or more and less than 1.")
    if args.warmup < 0 or (args.warmup >= 1 and args.max_minutes):
        raise ValueError(
            f"--warmup {args.warmup}: with --max_minutes give a share of the run, 0 or more and less than 1."
        )
    for part in args.learning_rates:
        if part not in PARTS:
            raise ValueError(f"--learning_rates {part}: no such part. Parts are {', '.join(PARTS)}.")
