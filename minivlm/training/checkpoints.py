"""Write complete checkpoints, go on from the newest one, and turn a signal into a stop that saves first."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from minivlm.training.options import TrainArgs
from minivlm.training.state import ORDER, State, order_options

STOPPED = 75  # exit status of a run that a signal stopped after it saved: EX_TEMPFAIL of sysexits.h, "try again"


def resume(accelerator: Accelerator, args: TrainArgs, state: State) -> None:
    """Load the checkpoint that `args.resume` asks for into model, optimizers and `state`; print what differs now.

    Raises:
        ValueError: no complete checkpoint, or one with other data options: its position in the data is not valid then.
    """
    processes, order = accelerator.num_processes, order_options(args)
    checkpoint = None
    if args.resume == "auto":
        checkpoint = newest_checkpoint(args.output_dir)
    elif args.resume != "never":
        checkpoint = Path(args.resume)
        if not (checkpoint / "COMPLETE").is_file():
            raise ValueError(f"--resume {checkpoint}: no complete checkpoint. Use auto, never, or another folder.")
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        was, now = json.loads(state.order), json.loads(order)
        changed = [f"{name} {was.get(name)} -> {now[name]}" for name in ORDER if was.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{checkpoint} was made with other options, so its place in the data means nothing: "
                f"{'; '.join(changed)}. Take them back, or start anew with --resume never or another --output_dir."
            )
        accelerator.print(f"continuing from {checkpoint}, step {state.step}")
        if state.processes != processes:
            accelerator.print(f"{state.processes} -> {processes} process(es): the steps hold the same rows as before")
    state.processes, state.order = processes, order
    if accelerator.is_main_process:
        for name in ("log.jsonl", "eval.jsonl"):
            trim_log(Path(args.output_dir) / name, state.step)


def trim_log(path: Path, step: int) -> None:
    """Drop the lines of a log after `step`: the run repeats these steps."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, state: State) -> bool:
    """Write a checkpoint beside the old one, rename it, mark it complete, and only then delete the old one.

    If it cannot be written (a full disk), print why, keep the old checkpoint and return False.
    """
    final = Path(output_dir) / f"checkpoint-{state.step:07d}"
    partial, problem = final.with_suffix(".partial"), None
    if accelerator.is_main_process:
        for old in Path(output_dir).glob("checkpoint-*.partial"):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial), safe_serialization=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors wrap the system's error
        problem = str(error).split("\n")[0]
    failed = accelerator.reduce(torch.tensor(int(problem is not None), device=accelerator.device)).item()
    if accelerator.is_main_process:
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(output_dir).free
            print(
                f"warning: no checkpoint at step {state.step}, {final} could not be written "
                f"({problem or 'on another rank'}; {free / 2**20:,.0f} MiB free). Make room; it is tried again later."
            )
        else:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            (final / "COMPLETE").touch()
            for old in Path(output_dir).glob("checkpoint-*"):
                if old != final:
                    shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return not failed


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    complete = [marker.parent for marker in Path(output_dir).glob("checkpoint-*/COMPLETE")]
    return max(complete, default=None)


def check_disk(model: torch.nn.Module, output_dir: str | Path) -> None:
    """Raise ValueError before training if the disk has no room for a model and two checkpoints."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed, free = 2 * (weights + 2 * trainable) + weights, shutil.disk_usage(output_dir).free
    if free < needed:
        raise ValueError(
            f"{output_dir}: {free / 2**30:.2f} GiB free, but checkpoints and the finished model take up to "
            f"{needed / 2**30:.2f} GiB. Make room, or choose another --output_dir."
        )


class StopSignal:
    """Note SIGTERM (Slurm, spot instances), SIGUSR1 (Slurm, ahead of time) or Ctrl-C: the loop then saves and stops.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows lacks the last
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame) -> None:
        """Remember the signal; raise KeyboardInterrupt for a second Ctrl-C."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
