"""What a person sees of a run: the table at its start, the progress bar, the log, trackers, pictures, the record."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import accelerate
import datasets
import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from checkpoints_minivlm import State
from data_minivlm import decode_image
from optimization_minivlm import PARTS, part_of
from options_minivlm import TrainArgs
from scripts.evaluate import normalise
from scripts.pages import FONT

# Dense bf16 and fp16 FLOP/s by the makers' data sheets; MFU (arXiv 2204.02311, appendix B) is a share of them.
PEAK = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
PEAK |= {"4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}


class Work:
    """FLOPs of a step's products with weights, forward and backward; the attention scores are left out, as in 6 N.

    A weight costs 2 FLOPs per token it meets, 2 more if its own gradient is wanted, and 2 more if something before it
    learns, to which a gradient must pass through it.
    """

    def __init__(self, model: torch.nn.Module):
        self.cost, passed = dict.fromkeys(("picture", "answer", "token"), 0), False
        embedding, tower = model.get_input_embeddings().weight, model.model.vision_tower
        patches = model.config.patch_grid[0] * model.config.patch_grid[1]
        embeddings = {id(p) for name, p in tower.named_parameters() if "embedding" in name}
        for name, parameter in model.named_parameters():
            part = part_of(name)
            flops = 2 * parameter.numel() * (1 + passed + parameter.requires_grad)
            passed = passed or parameter.requires_grad
            if parameter.ndim < 2 or parameter is embedding or id(parameter) in embeddings:
                continue
            if part == "vision":
                self.cost["picture"] += flops * patches
            elif part == "projector":
                self.cost["picture"] += flops * model.config.image_seq_length
            else:
                self.cost["answer" if part == "lm_head" else "token"] += flops
        if (
            model.get_output_embeddings().weight is embedding
        ):  # shared: counted once among the parameters, skipped above
            self.cost["answer"] += 2 * embedding.numel() * (1 + passed + embedding.requires_grad)

    def __call__(self, tokens: int, pictures: int, answers: int) -> int:
        return self.cost["token"] * tokens + self.cost["picture"] * pictures + self.cost["answer"] * answers


class Reporter:
    """Progress bar, log and trackers of the main process; the other processes hold one that says nothing."""

    def __init__(self, accelerator: Accelerator, args: TrainArgs, state: State, max_steps: int, model):
        self.accelerator, self.args, self.state, self.max_steps = accelerator, args, state, max_steps
        self.main, self.work, self.output = accelerator.is_main_process, Work(model), Path(args.output_dir)
        total = None if max_steps == sys.maxsize else max_steps
        self.bar = tqdm(total=total, initial=state.step, unit="step", disable=not self.main, dynamic_ncols=True)
        self.window = {"start": time.perf_counter(), "tokens": state.tokens, "rows": state.rows, "flops": 0}
        if args.trackers:
            options = {k: v for k, v in asdict(args).items() if isinstance(v, (bool, int, float, str))}
            names = {"wandb": {"name": run_name(args)}, "trackio": {"name": run_name(args)}}
            names["swanlab"] = {"experiment_name": run_name(args)}
            accelerator.init_trackers("minivlm", options, {key: names[key] for key in args.trackers if key in names})

    def step(self, epoch: int, totals: dict[str, int], figures: dict[str, float]) -> None:
        """Note a step; every `log_every` steps and at the last write what it was."""
        self.bar.update(1)
        self.window["flops"] += self.work(totals["tokens"], totals["pictures"], totals["answers"])
        if not (self.main and (self.state.step % self.args.log_every == 0 or self.state.step == self.max_steps)):
            return
        now, state, window = time.perf_counter(), self.state, self.window
        seconds = now - window["start"]
        entry = {"step": state.step, "epoch": epoch, **figures, "rows": totals["digest"]}
        entry["tokens_per_second"] = round((state.tokens - window["tokens"]) / seconds)
        entry["samples_per_second"] = round((state.rows - window["rows"]) / seconds, 1)
        entry["tflops"] = round(window["flops"] / seconds / 1e12, 3)
        if peak := self.peak():
            entry["mfu"] = round(window["flops"] / seconds / peak, 4)
        entry["memory_gib"] = round(self.memory() / 2**30, 2)
        self.window = {"start": now, "tokens": state.tokens, "rows": state.rows, "flops": 0}
        left = minutes_left(state, self.max_steps, self.args.max_minutes)
        use = f"MFU {entry['mfu']:.1%}" if "mfu" in entry else f"{entry['tflops']:.2f} TFLOP/s"
        self.bar.set_postfix_str(
            f"loss {figures['loss']:.3f}, {entry['tokens_per_second']:,} tokens/s, "
            f"{entry['samples_per_second']:,} rows/s, {use}, {entry['memory_gib']:.1f} GiB"
            + (f", {left:.1f} min left" if left is not None else "")
        )
        self.bar.write(f"[Train Epoch {epoch}] step: {state.step}, loss: {figures['loss']:.4f}")
        self.append("log.jsonl", entry)
        numbers = {f"train/{key}": value for key, value in entry.items() if key not in ("step", "rows")}
        self.accelerator.log(numbers, step=state.step)

    def evaluation(self, metrics: dict, sheet: Image.Image | None) -> None:
        """Write the scores of an evaluation, and the pictures with their answers."""
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
        with open(self.output / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def peak(self) -> float | None:
        """FLOP/s of all devices by their data sheet; None where it is not known."""
        if self.accelerator.device.type != "cuda" or self.accelerator.mixed_precision not in ("bf16", "fp16"):
            return None
        name = torch.cuda.get_device_name(self.accelerator.device)
        return next((flops * self.accelerator.num_processes for key, flops in PEAK.items() if key in name), None)

    def memory(self) -> int:
        """Bytes held: the most so far of the GPU, or what this process holds now."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.accelerator.device)
        return psutil.Process().memory_info().rss

    def close(self) -> None:
        self.bar.close()


def minutes_left(state: State, max_steps: int, max_minutes: float | None) -> float | None:
    """How long training goes on; None while nothing tells how long a step takes: the first one also compiles."""
    left = [] if max_minutes is None else [max(0.0, max_minutes - state.seconds / 60)]
    if max_steps < sys.maxsize and state.step > 1:
        left.append(state.seconds / 60 * (max_steps - state.step) / state.step)
    return min(left, default=None)


def run_name(args: TrainArgs) -> str:
    return args.run_name or Path(args.output_dir).name


def describe(accelerator: Accelerator, model, args: TrainArgs, rows, max_steps: int, accumulation: int) -> None:
    """Print what runs where, and what learns."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    precision = "tf32" if args.mixed_precision == "tf32" else accelerator.mixed_precision
    print(f"device {device} ({name}), {accelerator.num_processes} process(es), precision {precision}")
    if device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        print(f"warning: CUDA_VISIBLE_DEVICES={value!r} is set and no GPU is visible; unset it to use one.")
    length = f"{args.max_minutes:g} min" if args.max_minutes else f"{max_steps:,} steps"
    amount = f"{len(rows):,} sources, streamed" if args.streaming else f"{len(rows):,} rows"
    unit = "packs" if args.packing else "groups of rows" if args.share_pictures > 1 else "rows"
    print(f"{amount}, {args.batch_size} {unit} per step in {accumulation} micro-batch(es) per process, {length}")
    print(f"{'part':<12}{'parameters':>14}{'learning':>14}{'learning rate':>16}")
    for part in PARTS:
        parameters = [p for name, p in model.named_parameters() if part_of(name) == part]
        if not parameters:
            shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            print(f"{part:<12}{'shared with text' if part == 'lm_head' and shared else 'not in use':>28}")
            continue
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        rate = f"{args.learning_rates.get(part, args.learning_rate):g}" if learning else "-"
        print(f"{part:<12}{sum(p.numel() for p in parameters):>14,}{learning:>14,}{rate:>16}")


def commit() -> str | None:
    """The commit of the code that runs, if it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run(args: TrainArgs, accelerator: Accelerator, state: State, metrics: dict, finished: bool) -> dict:
    """Write run.json, at start and end: what was asked for, with what, and what came out."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, datasets)}
    run = {
        "name": run_name(args),
        "finished": finished,
        "options": asdict(args),
        "versions": versions | {"python": platform.python_version()},
        "commit": commit(),
        "device": f"{device} ({name})",
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


# ---------------------------------------------------------------------------------------------------- pictures


INSTALLED = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc", "DroidSansFallbackFull.ttf")
# Where a line may break: at spaces, and beside each Chinese character, but not before a closing mark.
PIECES = re.compile(r"\s|[“‘（《「]*(?:[^\s\u2e80-\uffef]+|[\u2e80-\uffef])[，。、？！：；）》」”’]*")


@cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Our own font, which has the characters of the embedded data, then those of the system with Chinese in them."""
    found = []
    for name in (FONT, *INSTALLED):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found or [ImageFont.load_default(size)]


def has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has all characters of a text: what it lacks is drawn as a noncharacter is."""
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(character)) != missing for character in set(text))


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first of `fonts` that has all of a text; if none has, the first."""
    return next((font for font in fonts(size) if has(font, text)), fonts(size)[0])


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels; "…" stands for what does not fit."""
    lines = [""]
    for piece in PIECES.findall(" ".join(text.split())):
        for part in [piece] if font.getlength(piece) <= width else piece:  # a long word breaks anywhere
            if font.getlength(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part if lines[-1] else part.lstrip()
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


def contact_sheet(
    items: list[dict], outputs: list[str], columns: int = 4, cell: tuple[int, int] = (260, 288)
) -> Image.Image:
    """Pictures with question, truth and answer below each; a right answer in green with a tick, a wrong one in red."""
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (item, output) in enumerate(zip(items, outputs)):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        picture = decode_image(item["images"][0])
        picture.thumbnail((cell[0] - 16, 128))
        sheet.paste(picture, (x, y))
        right = normalise(output) == normalise(item["answer"])
        said, color = (f"✓ model: {output}", "#0a7d20") if right else (f"× model: {output}", "#c01818")
        y += 132
        texts = (item["question"], 3, "black"), (f"truth: {item['answer']}", 2, "black"), (said, 2, color)
        for text, most, fill in texts:
            font = font_for(text, 14)
            for line in wrap(text, font, cell[0] - 16, most):
                draw.text((x, y), line, fill=fill, font=font)
                y += 20
    return sheet
