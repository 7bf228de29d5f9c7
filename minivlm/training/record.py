"""Write what a run was: the table at its start, and run.json."""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
from accelerate import Accelerator

from minivlm.model.parts import PARTS, part_of
from minivlm.training.options import TrainArgs
from minivlm.training.state import State


def run_name(args: TrainArgs) -> str:
    """Return the name of the run: the option, or the name of its folder."""
    return args.run_name or Path(args.output_dir).name


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def print_start(accelerator: Accelerator, model, args: TrainArgs, sources, steps: tuple[int, int]) -> None:
    """Print what runs where, and which parts train.

    Args:
        sources: the rows, or the streams.
        steps: optimizer steps of the run, and micro-batches per step and process.
    """
    device = accelerator.device
    precision = "tf32" if args.mixed_precision == "tf32" else accelerator.mixed_precision
    print(f"device {device} ({device_name(device)}), {accelerator.num_processes} process(es), precision {precision}")
    if device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        print(f"warning: CUDA_VISIBLE_DEVICES={value!r} is set and no GPU is visible; unset it to use one.")
    length = f"{args.max_minutes:g} min" if args.max_minutes else f"{steps[0]:,} steps"
    amount = f"{len(sources):,} sources, streamed" if args.streaming else f"{len(sources):,} rows"
    unit = "packs" if args.packing else "groups of rows" if args.share_pictures > 1 else "rows"
    print(f"{amount}, {args.batch_size} {unit} per step in {steps[1]} micro-batch(es) per process, {length}")
    print(f"{'part':<12}{'parameters':>14}{'trainable':>14}{'learning rate':>16}")
    for part in PARTS:
        print(describe_part(model, part, args))


def describe_part(model, part: str, args: TrainArgs) -> str:
    """Return the line of a part: its parameters, how many train, and their learning rate."""
    parameters = [p for name, p in model.named_parameters() if part_of(name) == part]
    if not parameters:
        shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return f"{part:<12}{'shared with text' if part == 'lm_head' and shared else 'not in use':>28}"
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    rate = f"{args.learning_rates.get(part, args.learning_rate):g}" if trainable else "-"
    return f"{part:<12}{sum(p.numel() for p in parameters):>14,}{trainable:>14,}{rate:>16}"


def commit() -> str | None:
    """Return the commit of the code that runs; None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run(args: TrainArgs, accelerator: Accelerator, state: State, metrics: dict, finished: bool) -> dict:
    """Write run.json with options, versions, device and results, and return its content."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, datasets)}
    run = {
        "name": run_name(args),
        "finished": finished,
        "options": asdict(args),
        "versions": versions | {"python": platform.python_version()},
        "commit": commit(),
        "device": f"{accelerator.device} ({device_name(accelerator.device)})",
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "precision": "tf32" if args.mixed_precision == "tf32" else accelerator.mixed_precision,
        "metrics": {k: v for k, v in metrics.items() if k != "answers"},
        "best": state.best,
        "steps": state.step,
        "tokens": state.tokens,
        "rows": state.rows,
        "seconds": round(state.seconds, 1),
        "bad_rows": dict(state.bad_rows),
    }
    text = json.dumps(run, indent=2, ensure_ascii=False)
    (Path(args.output_dir) / "run.json").write_text(text + "\n", encoding="utf-8")
    return run


def keep_recipe(args: TrainArgs) -> None:
    """Copy the recipe into the folder of the run."""
    copy = Path(args.output_dir) / "recipe.yaml"
    if args.recipe and Path(args.recipe).resolve() != copy.resolve():
        shutil.copyfile(args.recipe, copy)
