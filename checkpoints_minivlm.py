"""What a run needs to go on as if nothing had happened: its state, whole checkpoints, and a stop that saves first."""

import json
import shutil
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from options_minivlm import TrainArgs

STOPPED = 75  # exit status of a run that a signal stopped after it saved: EX_TEMPFAIL of sysexits.h, "try again"
# Options that decide which rows a step holds: a run cannot go on with other ones.
ORDER = ("data", "keep", "min_rating", "max_rows", "max_length", "too_long", "share_pictures", "streaming", "weights")
ORDER += ("packing", "pack_tokens", "pack_pictures", "augment", "batch_size", "seed")


@dataclass
class State:
    """What a checkpoint must restore beyond weights and optimizer; the data order follows from `step`."""

    step: int = 0
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    bad_rows: Counter = field(default_factory=Counter)
    bad_sources: Counter = field(default_factory=Counter)
    best: float | None = None  # of keep_best
    worse: int = 0  # evaluations since then
    processes: int = 1
    order: str = ""  # the options of ORDER, as JSON

    def state_dict(self) -> dict:
        return {**asdict(self), "bad_rows": dict(self.bad_rows), "bad_sources": dict(self.bad_sources)}

    def load_state_dict(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)


def order_options(args: TrainArgs) -> str:
    return json.dumps({name: getattr(args, name) for name in ORDER}, sort_keys=True)


def resume(accelerator: Accelerator, args: TrainArgs, state: State) -> None:
    """Go on from a checkpoint, if there is one to go on from, and say what is different now."""
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
    """Drop what was logged after `step`: the run is about to do it again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, state: State) -> bool:
    """Write the state beside the old one, rename it, mark it complete, and only then delete the old one.

    If it cannot be written (a full disk), say so and return False: the old checkpoint is still there.
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
            partial.rename(final)
            (final / "COMPLETE").touch()
            for old in Path(output_dir).glob("checkpoint-*"):
                if old != final:
                    shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return not failed


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    complete = [marker.parent for marker in Path(output_dir).glob("checkpoint-*/COMPLETE")]
    return max(complete, default=None)


def check_disk(model: torch.nn.Module, output_dir: str | Path) -> None:
    """Stop before training if the disk has no room for a model and two checkpoints, one replacing the other."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    learning = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed, free = 2 * (weights + 2 * learning) + weights, shutil.disk_usage(output_dir).free
    if free < needed:
        raise ValueError(
            f"{output_dir}: {free / 2**30:.2f} GiB free, but checkpoints and the finished model take up to "
            f"{needed / 2**30:.2f} GiB. Make room, or choose another --output_dir."
        )


def save_model(model, processor, folder: Path, state_dict: dict | None = None) -> None:
    """Model, processor and their code in `folder`, which is replaced as a whole once the new one is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state_dict)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class StopSignal:
    """Notes SIGTERM (Slurm, spot instances), SIGUSR1 (Slurm, ahead of time) or Ctrl-C, for the loop to save and stop.

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
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
