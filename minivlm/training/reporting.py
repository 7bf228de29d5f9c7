"""Show a run while it goes on: progress bar, log, trackers, pictures."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from minivlm.training.checkpoints import State
from minivlm.training.flops import PEAK, FlopCounter
from minivlm.training.heap import TRIM_EVERY, trim_heap
from minivlm.training.options import TrainArgs
from minivlm.training.record import run_name


class Reporter:
    """Write progress bar, log and trackers in the main process, and nothing in the others."""

    def __init__(self, accelerator: Accelerator, args: TrainArgs, state: State, max_steps: int, model):
        self.accelerator, self.args, self.state, self.max_steps = accelerator, args, state, max_steps
        self.main, self.flops, self.output = accelerator.is_main_process, FlopCounter(model), Path(args.output_dir)
        total = None if max_steps == sys.maxsize else max_steps
        self.bar = tqdm(total=total, initial=state.step, unit="step", disable=not self.main, dynamic_ncols=True)
        self.window = self.new_window()
        if args.trackers:
            self.start_trackers()

    def new_window(self) -> dict[str, float]:
        """Return what is counted since the last line of the log."""
        now = {"start": time.perf_counter(), "tokens": self.state.tokens, "rows": self.state.rows}
        return now | {"flops": 0, "padding": 0}

    def start_trackers(self) -> None:
        """Tell the trackers the options and the name of the run."""
        args, name = self.args, run_name(self.args)
        options = {k: v for k, v in asdict(args).items() if isinstance(v, (bool, int, float, str))}
        names = {"wandb": {"name": name}, "trackio": {"name": name}, "swanlab": {"experiment_name": name}}
        chosen = {key: names[key] for key in args.trackers if key in names}
        self.accelerator.init_trackers("minivlm", options, chosen)

    def step(self, epoch: int, totals: dict[str, int], metrics: dict[str, float]) -> None:
        """Count a step; write a line of the log every `log_every` steps and at the last one."""
        self.bar.update(1)
        if self.accelerator.device.type == "cpu" and self.state.step % TRIM_EVERY == 0:
            trim_heap()
        self.window["flops"] += self.flops(totals["tokens"], totals["pictures"], totals["answers"])
        self.window["padding"] += totals["padding"]
        if not (self.main and (self.state.step % self.args.log_every == 0 or self.state.step == self.max_steps)):
            return
        speed = self.measure_speed()
        entry = {"step": self.state.step, "epoch": epoch, **metrics, "row_checksum": totals["row_checksum"], **speed}
        left = minutes_left(self.state, self.max_steps, self.args.max_minutes)
        use = f"MFU {entry['mfu']:.1%}" if "mfu" in entry else f"{entry['tflops']:.2f} TFLOP/s"
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {entry['tokens_per_second']:,} tokens/s "
            f"(and {entry['padding']:.0%} padding), "
            f"{entry['samples_per_second']:,} rows/s, {use}, {entry['memory_gib']:.1f} GiB"
            + (f", {left:.1f} min left" if left is not None else "")
        )
        self.bar.write(f"[Train Epoch {epoch}] step: {self.state.step}, loss: {metrics['loss']:.4f}")
        self.append("log.jsonl", entry)
        numbers = {f"train/{key}": value for key, value in entry.items() if key not in ("step", "row_checksum")}
        self.accelerator.log(numbers, step=self.state.step)

    def measure_speed(self) -> dict[str, float]:
        """Return tokens/s, rows/s, TFLOP/s and memory since the last line of the log, and start to count anew.

        Tokens and FLOPs are those of the rows; `padding` is its share of all tokens that were computed.
        """
        state, window = self.state, self.window
        seconds, tokens = time.perf_counter() - window["start"], state.tokens - window["tokens"]
        speed = {"tokens_per_second": round(tokens / seconds)}
        speed["padding"] = round(window["padding"] / max(1, tokens + window["padding"]), 4)
        speed["samples_per_second"] = round((state.rows - window["rows"]) / seconds, 1)
        speed["tflops"] = round(window["flops"] / seconds / 1e12, 3)
        if peak := self.peak():
            speed["mfu"] = round(window["flops"] / seconds / peak, 4)
        speed["memory_gib"] = round(self.memory() / 2**30, 2)
        self.window = self.new_window()
        return speed

    def evaluation(self, metrics: dict, sheet: Image.Image | None) -> None:
        """Write the scores of an evaluation, and the sheet of pictures with their answers."""
        if not self.main:
            return
        scores, step = metrics["scores"], self.state.step
        self.bar.write(f"[Eval] step: {step}, " + ", ".join(f"{name}: {value:.4f}" for name, value in scores.items()))
        tasks = {
            f"{t}/{lang}": c["match"] for t, languages in metrics["tasks"].items() for lang, c in languages.items()
        }
        entry = {"step": step, "seconds": round(self.state.seconds, 2), **scores, "tasks": tasks}
        self.append("eval.jsonl", entry)
        self.accelerator.log({f"eval/{name}": value for name, value in (scores | tasks).items()}, step=step)
        if sheet is None:
            return
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [sheet]}, step=step)

    def append(self, name: str, entry: dict) -> None:
        """Add a line to a log in the folder of the run."""
        with open(self.output / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def peak(self) -> float | None:
        """Return the FLOP/s of all devices by their data sheet; None where it is not known."""
        if self.accelerator.device.type != "cuda" or self.accelerator.mixed_precision not in ("bf16", "fp16"):
            return None
        name = torch.cuda.get_device_name(self.accelerator.device)
        return next((flops * self.accelerator.num_processes for key, flops in PEAK.items() if key in name), None)

    def memory(self) -> int:
        """Return the bytes held: the most so far of the GPU, or what this process holds now."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.accelerator.device)
        return psutil.Process().memory_info().rss

    def close(self) -> None:
        """End the progress bar."""
        self.bar.close()


def minutes_left(state: State, max_steps: int, max_minutes: float | None) -> float | None:
    """Return how long training goes on; None until it can be known: the first step also compiles."""
    left = [] if max_minutes is None else [max(0.0, max_minutes - state.seconds / 60)]
    if max_steps < sys.maxsize and state.step > 1:
        left.append(state.seconds / 60 * (max_steps - state.step) / state.step)
    return min(left, default=None)
