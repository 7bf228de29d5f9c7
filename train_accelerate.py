"""Train MiniVLM on one or more devices: `accelerate launch train_accelerate.py --recipe recipes/X.yaml`.

Options come from this file's defaults, then the recipe, then the command line. The result is a folder that
`from_pretrained` loads, with the options and versions of the run, its metrics and its checkpoints beside it.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil, HfArgumentParser

from batching_minivlm import (
    GlobalBatchSampler,
    LikeLengths,
    PackingCollator,
    Packs,
    PaddingCollator,
    by_weight,
    measure,
    rows_by_picture,
)
from configuration_minivlm import MiniVLMConfig
from data_minivlm import CUT, IGNORE, Encoder, TrainingRows, describe_bad_rows
from features_minivlm import CachedTower, FeatureCache
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor
from scripts.evaluate import evaluate, load_trained, print_table, register_config
from sources_minivlm import ADAPTERS, LOW_RATING, BadRow, Rows, keep_rated, keep_rows, load_rows, load_streams
from streaming_minivlm import StreamedBatches

BY_CHOICE = (CUT, LOW_RATING)  # kinds of rows that are counted, but are no fault of the data
PARTS = {"vision": "model.vision_tower.", "projector": "model.multi_modal_projector.", "text": ""}  # text: the rest


DATA_HELP = (
    "Data to train on, schemas mixed at will: parquet, jsonl, json or webdataset tar files, folders or globs of them, "
    "or hub:owner/name[:config[:split]]. The schema is told from the columns; FILE::ADAPTER forces one of "
    f"{', '.join(adapter.__name__ for adapter in ADAPTERS)}. Pictures given by name lie in the folder of their file."
)


def option(default, text, **kwargs):
    """A command-line option; its help text carries the unit."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **kwargs})
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class TrainArgs:
    model: str | None = option(None, "Folder or Hub id to start from. Left out: random weights from model_config.")
    model_config: str | None = option(None, "MiniVLMConfig of a model from scratch: a mapping in a recipe, or JSON.")
    vision_model: str | None = option(None, "Folder or Hub id of a trained vision tower for a model from scratch.")
    tokenizer: str = option(".", "Folder or Hub id of tokenizer and chat template for a model from scratch.")
    data: list[str] = option(["data/train.parquet"], DATA_HELP)
    keep: str | None = option(None, "Rows to train on: a mapping from column to values in a recipe, or JSON.")
    min_rating: list[str] = option(
        [], "FineVision: lowest rating of a turn, as relevance=3; rows left empty are left out."
    )
    max_rows: int | None = option(None, "Train on the first so many rows only.")
    eval_data: list[str] = option([], "Data to answer after training, named as for data; exact match is reported.")
    eval_limit: int = option(2000, "Rows of eval_data to answer.")
    output_dir: str = option("runs/train", "Folder for checkpoints, the log and the final model.")
    train: list[str] = option(["vision", "projector", "text"], "Parts that learn: vision, projector, text.")
    epochs: float = option(1.0, "Passes over the data, if neither max_steps nor max_minutes is given.")
    max_steps: int | None = option(None, "Optimizer steps, whatever the number of ranks.")
    max_minutes: float | None = option(None, "Stop after so many minutes; the learning rate decays over them.")
    batch_size: int = option(64, "Rows (groups with share_pictures, packs with packing) per step, over all ranks.")
    micro_batch_size: int = option(64, "Rows, groups or packs that one rank puts through the model at once.")
    max_length: int = option(1024, "Longest row in tokens, pictures included.")
    too_long: str = option("drop", "A longer row: drop counts it as a bad one, cut leaves out its last turns.")
    share_pictures: int = option(1, "Most rows about the same picture that share its tokens, blind to each other.")
    streaming: bool = option(False, "Read the data in order instead of holding it; needs max_steps or max_minutes.")
    weights: list[float] = option([], "How often each source is drawn, relative to others; streamed, until its end.")
    packing: bool = option(False, "Fill packs with rows instead of padding them; batch sizes then count packs.")
    pack_tokens: int = option(4096, "Most tokens in a pack.")
    pack_pictures: int = option(64, "Most pictures in a pack.")
    augment: str = option("none", "mild: shift, scale, tilt, tint pictures. strong: also new colours. Or none.")
    feature_cache: str | None = option(None, "Folder to keep a frozen tower's features in, computed once per picture.")
    optimizer: str = option("adamw", "adamw, or muon (matrices of blocks by Muon, everything else by AdamW).")
    learning_rate: float = option(1e-3, "Learning rate after warm-up; it decays linearly to zero.")
    warmup: float = option(0.03, "Share of the run over which the learning rate rises.")
    weight_decay: float = option(0.05, "Decoupled weight decay of matrices; norms, biases and embeddings have none.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.")
    mixed_precision: str = option("auto", "bf16, fp16, no, or auto: bf16 where the device computes in it.")
    attn_implementation: str = option("sdpa", "eager, sdpa, flex_attention or flash_attention_2.")
    compile: bool = option(False, "Compile the blocks of tower and decoder (needs a C++ compiler on CPU).")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    workers: int = option(1, "Processes that read and encode rows, per rank. 0: in the training process.")
    max_bad_rows: float = option(0.001, "Share of rows that may be unusable before training stops.")
    log_every: int = option(10, "Optimizer steps between lines of the log.")
    save_every: int = option(500, "Optimizer steps between checkpoints.")
    resume: bool = option(True, "Continue from the newest complete checkpoint in output_dir.")
    seed: int = option(0, "Seed of weights, order and augmentation.")


def parse_args(argv: list[str] | None = None) -> TrainArgs:
    """Defaults < recipe < command line. An unknown recipe key is an error that names the nearest option."""
    parser = HfArgumentParser(TrainArgs, description=__doc__)
    parser.add_argument("--recipe", help="YAML file whose keys are the options below.")
    path = parser.parse_known_args(argv)[0].recipe
    if path:
        if not Path(path).is_file():
            parser.error(f"{path}: no such recipe. Recipes are in recipes/: {', '.join(recipe_names())}.")
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        known = [f.name for f in fields(TrainArgs)]
        for key in values.keys() - set(known):
            near = get_close_matches(key, known, n=1)
            parser.error(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "."))
        parser.set_defaults(**values)  # argparse converts the string that YAML makes of `1e-5`
    options = vars(parser.parse_args(argv))
    options.pop("recipe")
    args = TrainArgs(**options)
    for name in ("model_config", "keep"):
        if isinstance(value := getattr(args, name), str):
            setattr(args, name, yaml.safe_load(value))
    try:
        args.min_rating = {name: float(value) for name, value in (text.split("=") for text in args.min_rating)}
    except ValueError:
        parser.error(f"--min_rating {' '.join(args.min_rating)}: write a name and a number, as relevance=3.")
    for part in args.train:
        if part not in PARTS:
            parser.error(f"--train {part}: no such part. Parts are {', '.join(PARTS)}.")
    if args.streaming:
        if not (args.max_steps or args.max_minutes):
            parser.error("--streaming: the data has no known length. Give --max_steps or --max_minutes.")
        if args.share_pictures > 1 or args.max_rows:
            parser.error("--streaming does not go with --share_pictures or --max_rows. Leave them out.")
    if args.weights and (min(args.weights) <= 0 or len(args.weights) != len(args.data)):
        parser.error(f"--weights {args.weights}: give a positive number for each of {len(args.data)} --data sources.")
    for name, known in (
        ("optimizer", ("adamw", "muon")),
        ("augment", ("none", "mild", "strong")),
        ("too_long", ("drop", "cut")),
    ):
        if getattr(args, name) not in known:
            parser.error(f"--{name} {getattr(args, name)}: not known. Use {', '.join(known[:-1])} or {known[-1]}.")
    if args.feature_cache and ("vision" in args.train or args.augment != "none" or args.streaming):
        parser.error(
            "--feature_cache keeps what a frozen tower makes of pictures that never change, of data that is held. "
            "Use it with --train projector text, --augment none and without --streaming."
        )
    if args.packing and args.share_pictures > 1:
        parser.error("--packing and --share_pictures exclude each other. Choose one.")
    if args.packing and args.pack_tokens < args.max_length:
        parser.error(
            f"--pack_tokens {args.pack_tokens} is less than --max_length {args.max_length}: the longest rows "
            "would fit into no pack. Raise the one or lower the other."
        )
    if args.batch_size < 1 or args.micro_batch_size < 1:
        parser.error(
            f"--batch_size {args.batch_size} and --micro_batch_size {args.micro_batch_size} must be 1 or more."
        )
    return args


def recipe_names() -> list[str]:
    return sorted(path.name for path in Path(__file__).with_name("recipes").glob("*.yaml"))


# ------------------------------------------------------------------------------------------------- building


def build(args: TrainArgs) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Make model and processor: from a checkpoint, or from scratch around the tokenizer's vocabulary."""
    if args.model:
        model, processor = load_trained(args.model)
        model.float().set_attn_implementation(args.attn_implementation)
        return model, processor
    config, tokenizer = model_from_scratch(args)
    tower = None
    if args.vision_model:
        tower = AutoModel.from_pretrained(args.vision_model)
        tower = getattr(tower, "vision_model", tower)  # of a model with a text encoder only the eyes
        config.vision_config = tower.config
        config.validate_architecture()
    model = MiniVLMForConditionalGeneration._from_config(config, attn_implementation=args.attn_implementation)
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[
            config.image_token_id
        ],  # a placeholder in an answer would ask for a picture that is not there
    )
    if tower is not None:
        load_tower(model.model.vision_tower, tower, args.vision_model)
    return model, build_processor(config, tokenizer)


def model_from_scratch(args: TrainArgs):
    """Configuration of `model_config` and the tokenizer that it must have room for."""
    register_config()  # or AutoTokenizer would ask to run the configuration's code beside a tokenizer of ours
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = MiniVLMConfig(**(args.model_config or {}))
    if config.text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"`vocab_size`={config.text_config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} entries. "
            "Raise text_config.vocab_size in model_config."
        )
    return config, tokenizer


def load_tower(target: torch.nn.Module, source: torch.nn.Module, name: str) -> None:
    """Copy a trained tower's weights; the source may have more blocks and heads than are used, never fewer."""
    weights, needed = source.state_dict(), target.state_dict().keys()
    missing = sorted(needed - weights.keys())
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of the tower: {', '.join(missing[:5])}.")
    target.load_state_dict({key: weights[key] for key in needed})


def build_processor(config: MiniVLMConfig, tokenizer) -> MiniVLMProcessor:
    """CLIP's preprocessing at the tower's resolution, and as many image tokens as the model makes features."""
    side = config.vision_config.image_size
    # Squeezed, not cropped: what stands at the border of a picture can be asked about.
    image_processor = CLIPImageProcessorPil(do_center_crop=False, size={"height": side, "width": side})
    return MiniVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        image_seq_length=config.image_seq_length,
    )


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


def freeze(model: torch.nn.Module, train: list[str]) -> dict[str, list[torch.nn.Parameter]]:
    """Let only the named parts learn; return the learning parameters of each part."""
    trainable = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(parameter.requires_grad and part in train)
        if parameter.requires_grad:
            trainable[part].append(parameter)
    return trainable


def check_gradients(model: torch.nn.Module) -> None:
    """Stop if a part that should learn got no gradient, or one that should not got one."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    extra = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    if missing or extra:
        raise RuntimeError(
            f"After the first backward pass {len(missing)} parameters that should learn have no gradient "
            f"({', '.join(missing[:5])}) and {len(extra)} frozen ones have one ({', '.join(extra[:5])})."
        )


def check_pictures(rows: Rows, train: list[str]) -> None:
    """Stop if the parts that see should learn from rows without a single picture: weight decay alone would act."""
    seeing = [part for part in train if part != "text"]
    bad = Counter()
    for sample in rows.samples() if seeing else []:
        if isinstance(sample, BadRow):
            bad[str(sample).split(":")[0]] += 1
            example = sample
        elif sample["images"]:
            return
    if bad:
        raise ValueError(f"No row has a picture that can be had:\n{describe_bad_rows(bad)}\nThe last: {example}.")
    if seeing:
        raise ValueError(f"No row has a picture for {' and '.join(seeing)} to learn from. Use --train text.")


def build_optimizers(model: torch.nn.Module, args: TrainArgs) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) for the matrices of the blocks beside AdamW for everything else."""
    embedding = model.get_input_embeddings().weight
    matrices, hidden, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_block = ".layers." in name or ".layer." in name
            kind = rest if parameter.ndim < 2 or parameter is embedding else hidden if is_block else matrices
            kind.append(parameter)
    muon = args.optimizer == "muon" and bool(hidden)
    decayed = matrices if muon else matrices + hidden
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)] if groups else []
    if muon:  # scaled so that one learning rate suits both (arXiv 2502.16982, section 2.2)
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    if not optimizers:
        raise ValueError(f"Nothing is left to train: --train {' '.join(args.train)} names no parameter.")
    return optimizers


def compile_blocks(model: torch.nn.Module, device: torch.device) -> None:
    """Compile each block by itself: equal blocks share the compiled code, so start-up stays short.

    On a machine that cannot compile (no C++ compiler, no Python headers, a path with spaces) say so and train without.
    """
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception as error:  # inductor raises several classes for a missing compiler or header
        reason = " ".join(str(error).split("\n", 2)[:2])
        remedy = "On Debian: apt install g++ python3-dev"
        if " " in torch.__file__:  # inductor does not quote the path of PyTorch's headers
            remedy = f"PyTorch lies in a path with spaces, {torch.__file__}: use another one"
        print(f"Not compiled, training will be slower: {reason}. {remedy}.")
        return
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                block.compile(dynamic=True)  # batches differ in length; compiled once for all of them


def supports_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# ------------------------------------------------------------------------------------------------- training


@dataclass
class State:
    """What a checkpoint must restore beyond weights and optimizer; the data order follows from `step`."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bad_rows: Counter = field(default_factory=Counter)
    bad_sources: Counter = field(default_factory=Counter)

    def state_dict(self) -> dict:
        return {**asdict(self), "bad_rows": dict(self.bad_rows), "bad_sources": dict(self.bad_sources)}

    def load_state_dict(self, values: dict) -> None:
        self.step, self.tokens, self.seconds = values["step"], values["tokens"], values["seconds"]
        self.bad_rows, self.bad_sources = Counter(values["bad_rows"]), Counter(values["bad_sources"])


def progress(args: TrainArgs, state: State, max_steps: int, elapsed: float) -> float:
    """Share of the run that is done, by steps or by time."""
    if args.max_minutes is not None:
        return min(1.0, elapsed / (60 * args.max_minutes))
    return state.step / max_steps


def schedule(done: float, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to zero (arXiv 2502.15938)."""
    return min(done / warmup, 1.0) * (1 - done) if warmup else 1 - done


def train(accelerator, model, optimizers, loader, accumulation, args, state, max_steps) -> None:
    """Take optimizer steps until `max_steps` or `max_minutes`."""
    model.train()
    device, batches = accelerator.device, iter(loader)
    total = None if max_steps == sys.maxsize else max_steps
    bar = tqdm(total=total, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    log = open(Path(args.output_dir) / "log.jsonl", "a", encoding="utf-8") if accelerator.is_main_process else None
    start, first_step = time.perf_counter() - state.seconds, state.step
    window_tokens, window_start = state.tokens, time.perf_counter()
    while state.step < max_steps:
        state.seconds = time.perf_counter() - start
        done = progress(args, state, max_steps, state.seconds)
        if accelerator.num_processes > 1 and args.max_minutes is not None:  # clocks differ, the decision must not
            done = accelerator.reduce(torch.tensor(done, device=device), reduction="mean").item()
        if done >= 1:
            break
        group = list(islice(batches, accumulation))
        # Divide by the answer tokens of all ranks and micro-batches. A mean of micro-batch means would let a row with
        # three answer tokens pull as hard as one with three hundred.
        answers = sum((batch["shift_labels"] != IGNORE).sum() for batch in group).to(device)
        answers = accelerator.reduce(answers, reduction="sum")
        loss_sum = torch.zeros((), device=device)
        for i, batch in enumerate(group):
            epoch = batch.pop("epoch") + 1
            read = args.batch_size * (state.step + 1) + 1000 if args.streaming else epoch * len(loader.dataset)
            count_bad_rows(state, batch.pop("bad_rows"), args.max_bad_rows, read)
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with nullcontext() if i == len(group) - 1 else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = model(
                        **batch, labels=batch["shift_labels"], use_cache=False, num_items_in_batch=answers
                    ).loss
                accelerator.backward(loss * accelerator.num_processes)  # undo the mean that DDP takes over ranks
            loss_sum += loss.detach()
            state.tokens += batch["input_ids"].numel() * accelerator.num_processes
        if state.step == first_step:
            check_gradients(accelerator.unwrap_model(model))
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for optimizer in optimizers:
            for part in optimizer.param_groups:  # not accelerator.prepare(scheduler), which steps once per rank
                part["lr"] = args.learning_rate * schedule(done, args.warmup)
        loss = accelerator.reduce(loss_sum, reduction="sum").item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {state.step + 1}. Lower --learning_rate ({args.learning_rate}), or use "
                f"--mixed_precision no; the newest checkpoint is in {args.output_dir}."
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.step += 1
        state.seconds = time.perf_counter() - start
        bar.update(1)
        if state.step % args.log_every == 0 or state.step == max_steps:
            now = time.perf_counter()
            rate = (state.tokens - window_tokens) / (now - window_start)
            window_tokens, window_start = state.tokens, now
            if accelerator.is_main_process:
                left = state.seconds / max(done, 1e-9) * (1 - done) if args.max_minutes else None
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {rate:,.0f} tokens/s" + (f", {left / 60:.1f} min left" if left else "")
                )
                bar.write(f"[Train Epoch {epoch}] step: {state.step}, loss: {loss:.4f}")
                entry = {"step": state.step, "epoch": epoch, "loss": loss, "grad_norm": float(norm)}
                entry |= {"lr": optimizers[0].param_groups[0]["lr"], "tokens_per_second": round(rate)}
                print(json.dumps(entry), file=log, flush=True)
        if state.step % args.save_every == 0 and state.step < max_steps:
            save_checkpoint(accelerator, args, state)
    bar.close()


def count_bad_rows(state: State, bad_rows: list[tuple[str, str]], limit: float, read: int) -> None:
    """Count rows that were left out, each (file and row, reason); stop beyond a share of the rows that can be read."""
    for place, reason in bad_rows:
        kind = reason.split(":")[0]
        if kind not in state.bad_rows:
            tqdm.write(f"{'' if kind in BY_CHOICE else 'skipped: '}{place}: {reason}", file=sys.stderr)
        state.bad_rows[kind] += 1
        if kind not in BY_CHOICE:
            state.bad_sources[place.rpartition(", row ")[0]] += 1
    if state.bad_sources.total() > limit * read:
        worst = "\n".join(f"  {count} in {name}" for name, count in state.bad_sources.most_common(3))
        raise ValueError(
            f"{state.bad_sources.total()} bad rows of {read}, more than max_bad_rows={limit:.2%}:\n"
            f"{describe_bad_rows(state.bad_rows)}\nmost of them:\n{worst}\nMend the data, or raise --max_bad_rows."
        )


# ---------------------------------------------------------------------------------------- checkpoints, results


def save_checkpoint(accelerator: Accelerator, args: TrainArgs, state: State) -> None:
    """Write the state beside the old one, rename it, mark it complete, and only then delete the old one."""
    final = Path(args.output_dir) / f"checkpoint-{state.step:07d}"
    partial = final.with_suffix(".partial")
    accelerator.save_state(str(partial), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        (final / "COMPLETE").touch()
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest_checkpoint(output_dir: str) -> Path | None:
    complete = [marker.parent for marker in Path(output_dir).glob("checkpoint-*/COMPLETE")]
    return max(complete, default=None)


def describe(accelerator: Accelerator, model, trainable: dict, args: TrainArgs, rows, max_steps: int) -> None:
    """Print what runs where, and what learns."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"device {device} ({name}), {accelerator.num_processes} process(es), precision {accelerator.mixed_precision}"
    )
    if device.type == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        print(f"warning: CUDA_VISIBLE_DEVICES={value!r} is set and no GPU is visible; unset it to use one.")
    length = f"{args.max_minutes:g} min" if args.max_minutes else f"{max_steps:,} steps"
    amount = f"{len(rows):,} sources, streamed" if args.streaming else f"{len(rows):,} rows"
    print(f"{amount}, {args.batch_size} {'packs' if args.packing else 'rows'} per step, {length}")
    print(f"{'part':<12}{'parameters':>14}{'learning':>14}")
    for part in PARTS:
        total = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == part)
        print(f"{part:<12}{total:>14,}{sum(p.numel() for p in trainable[part]):>14,}")


def commit() -> str | None:
    """The commit of the code that runs, if it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run(args: TrainArgs, accelerator: Accelerator, state: State, metrics: dict) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)} | {
        "python": sys.version.split()[0]
    }
    run = {"options": asdict(args), "versions": versions, "commit": commit(), "device": str(accelerator.device)}
    run |= {
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "metrics": {k: v for k, v in metrics.items() if k != "answers"},
    }
    run |= {"steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1)}
    run |= {"bad_rows": dict(state.bad_rows)}
    (Path(args.output_dir) / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False), encoding="utf-8")


def choose_rows(args: TrainArgs) -> Rows:
    rows = keep_rows(load_rows(args.data), args.keep or {})
    if args.min_rating:
        count, rows = len(rows), keep_rated(rows, args.min_rating)
        PartialState().print(f"{count - len(rows):,} of {count:,} rows left out: no turn is rated as min_rating asks.")
    rows = rows.select(range(min(args.max_rows or len(rows), len(rows))))
    check_pictures(rows, args.train)
    return rows


def make_plan(rows: Rows, encoder: Encoder, args: TrainArgs, quiet: bool) -> LikeLengths | Packs:
    """What the batches of an epoch are made of."""

    def draw(units: list[tuple[int, ...]]):
        return partial(by_weight, [rows.source(unit[0]) for unit in units], args.weights) if args.weights else None

    if args.packing:
        tokens, pictures = measure(rows, encoder, args.workers, quiet)
        each = draw([(i,) for i in range(len(rows))])
        return Packs(tokens, pictures, args.batch_size, args.pack_tokens, args.pack_pictures, args.seed, each)
    sizes = rows.sizes()
    units = rows_by_picture(rows, args.share_pictures) if args.share_pictures > 1 else [(i,) for i in range(len(rows))]
    return LikeLengths(units, [sum(sizes[i] for i in unit) for unit in units], args.batch_size, args.seed, draw(units))


def main(argv: list[str] | None = None) -> Path:
    """Train by the options given; return the folder of the finished model."""
    args = parse_args(argv)
    # Before the model: a wrong path should not cost a download.
    rows = load_streams(args.data, args.min_rating) if args.streaming else choose_rows(args)
    eval_rows = load_rows(args.eval_data) if args.eval_data else None
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(PartialState().device) else "no"
    accelerator = Accelerator(mixed_precision=precision, project_config=ProjectConfiguration(str(output)))
    set_seed(args.seed)
    model, processor = build(args)
    trainable = freeze(model, args.train)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_blocks(model, accelerator.device)
    optimizers = build_optimizers(model, args)
    encoder = Encoder(processor, args.max_length, args.too_long)
    tower = model.model.vision_tower
    if args.feature_cache:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        cache = FeatureCache(args.feature_cache, model, encoder, dtype)
        tower.to(accelerator.device)
        cache.fill(rows, encoder, accelerator)
        encoder.features, model.model.vision_tower = cache, CachedTower(dtype)
    state = State()
    accelerator.register_for_checkpointing(state)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    checkpoint = newest_checkpoint(args.output_dir) if args.resume else None
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"continuing from {checkpoint}")
    blank = encoder.blank() if {"vision", "projector"} & set(args.train) else None
    collate = PackingCollator(blank) if args.packing else PaddingCollator(processor.tokenizer.pad_token_id, blank)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "start_step": state.step}
    if args.streaming:
        order = StreamedBatches(
            rows,
            encoder,
            collate,
            args.batch_size,
            args.micro_batch_size,
            weights=args.weights or None,
            keep=args.keep,
            pack_budget=(args.pack_tokens, args.pack_pictures) if args.packing else None,
            augment=args.augment,
            seed=args.seed,
            **share,
        )
        loader = DataLoader(order, batch_size=None, num_workers=args.workers)
        max_steps = args.max_steps or sys.maxsize
    else:
        plan = make_plan(rows, encoder, args, quiet=not accelerator.is_main_process)
        order = GlobalBatchSampler(plan, args.micro_batch_size, **share)
        dataset = TrainingRows(rows, encoder, seed=args.seed, augment=args.augment, packed=args.packing)
        loader = DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=args.workers)
        max_steps = args.max_steps or (sys.maxsize if args.max_minutes else order.steps(args.epochs))
    if accelerator.is_main_process:
        describe(accelerator, accelerator.unwrap_model(model), trainable, args, rows, max_steps)
    train(accelerator, model, optimizers, loader, order.accumulation, args, state, max_steps)
    # DDP's wrapper must go before the process group does: destroyed as the group's last owner it holds Python's lock
    # while it waits for Gloo's threads, one of which may wait for that lock.
    model = accelerator.unwrap_model(model)
    accelerator.free_memory()
    model.model.vision_tower = tower  # in the place of what gave back cached features
    if accelerator.is_main_process:
        final = output / "final"
        model.save_pretrained(final)
        processor.save_pretrained(final)
        metrics = {}
        if eval_rows is not None:
            # From disk: what is scored is what was saved, and free of training's compiled graphs.
            model, processor = load_trained(final)
            metrics = evaluate(model.to(accelerator.device), processor, eval_rows, limit=args.eval_limit)
            print_table(metrics)
        write_run(args, accelerator, state, metrics)
        print(f"{state.step} steps in {state.seconds / 60:.1f} min; model in {final}")
        if state.bad_rows:
            print(f"rows left out or cut:\n{describe_bad_rows(state.bad_rows)}")
    accelerator.end_training()
    return output / "final"


if __name__ == "__main__":
    main()
