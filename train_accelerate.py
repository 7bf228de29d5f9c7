"""Train MiniVLM on one or more devices: `accelerate launch train_accelerate.py --recipe recipes/X.yaml`.

Options come from the defaults in options_minivlm.py, then the recipe, then the command line. The result is a folder
that `from_pretrained` loads, with the options and versions of the run, its metrics and its checkpoints beside it.
"""

import json
import math
import shutil
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import ProjectConfiguration, find_executable_batch_size, gather_object, set_seed
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from backbones_minivlm import build, check_sources
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
from checkpoints_minivlm import STOPPED, State, StopSignal, check_disk, resume, save_checkpoint, save_model
from data_minivlm import CUT, IGNORE, Encoder, TrainingRows, describe_bad_rows
from features_minivlm import CachedTower, FeatureCache
from optimization_minivlm import WeightAverage, build_optimizers, check_gradients, freeze, load_balance, schedule
from options_minivlm import METRICS, TrainArgs, parse_args
from reporting_minivlm import Reporter, contact_sheet, describe, run_name, write_run
from scripts.adapters import add_lora
from scripts.evaluate import evaluate, judge, load_trained, print_table, prompts, summarise
from scripts.plot import plot
from scripts.release import BackgroundPush, ReleaseError, publish
from sources_minivlm import LOW_RATING, BadRow, Rows, keep_rated, keep_rows, load_rows, load_streams
from streaming_minivlm import StreamedBatches

BY_CHOICE = (CUT, LOW_RATING)  # kinds of rows that are counted, but are no fault of the data
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


# ------------------------------------------------------------------------------------------------------- data


def choose_rows(args: TrainArgs) -> Rows:
    rows = keep_rows(load_rows(args.data), args.keep or {})
    if args.min_rating:
        count, rows = len(rows), keep_rated(rows, args.min_rating)
        PartialState().print(f"{count - len(rows):,} of {count:,} rows left out: no turn is rated as min_rating asks.")
    rows = rows.select(range(min(args.max_rows or len(rows), len(rows))))
    check_pictures(rows, args.train)
    return rows


def check_pictures(rows: Rows, train: list[str]) -> None:
    """Stop if the parts that see should learn from rows without a single picture: weight decay alone would act."""
    seeing = [part for part in train if part.startswith(("vision", "projector"))]
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


def make_loader(rows, encoder: Encoder, collate, args: TrainArgs, accelerator: Accelerator, start_step: int):
    """Micro-batches of this rank from `start_step` on, and the optimizer steps that `epochs` are (None: no end)."""
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes, "start_step": start_step}
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
        return DataLoader(order, batch_size=None, num_workers=args.workers), order.accumulation, None
    plan = make_plan(rows, encoder, args, quiet=not accelerator.is_main_process)
    order = GlobalBatchSampler(plan, args.micro_batch_size, **share)
    dataset = TrainingRows(rows, encoder, seed=args.seed, augment=args.augment, packed=args.packing)
    loader = DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=args.workers)
    return loader, order.accumulation, order.steps(args.epochs)


# ----------------------------------------------------------------------------------------------- the device's part


def make_accelerator(args: TrainArgs) -> Accelerator:
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(PartialState(cpu=args.device == "cpu").device) else "no"
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
        precision = "no"
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=precision,
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=args.output_dir),
    )
    sharded = accelerator.distributed_type in SHARDED
    if sharded and (args.optimizer != "adamw" or args.ema or args.eval_every or args.push_every or args.compile):
        raise ValueError(
            f"{accelerator.distributed_type.value} cuts the weights into shards: use --optimizer adamw without --ema, "
            "--eval_every, --push_every or --compile (eval_data is still answered at the end), or a DDP configuration."
        )
    if plugin := accelerator.state.deepspeed_plugin:  # what it would read off the loader that it is not given
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = max(1, args.micro_batch_size)
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the loss is divided by answer tokens already
    return accelerator


def supports_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


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


def largest_micro_batch(model, encoder: Encoder, collate, args: TrainArgs, accelerator: Accelerator) -> int:
    """As many of the longest rows as go forward and backward in this device's memory; the same on all ranks."""
    blank = encoder.blank()
    rest = torch.full((max(0, args.max_length - len(blank["input_ids"])),), encoder.processor.tokenizer.pad_token_id)
    ids = torch.cat([blank["input_ids"], rest])
    row = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(len(ids))}
    row = {**blank, **row, "branch": torch.zeros_like(ids)}
    model.to(accelerator.device).train()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)

    @find_executable_batch_size(starting_batch_size=-(-args.batch_size // accelerator.num_processes))
    def attempt(count: int) -> int:
        held = torch.empty(2 * learning, device=accelerator.device)  # the optimizer's two moments will need this much
        batch = collate([[row] * max(1, args.pack_tokens // len(ids))] * count if args.packing else [row] * count)
        tensors = {k: v.to(accelerator.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        with accelerator.autocast():
            model(**tensors, labels=tensors["shift_labels"], use_cache=False).loss.backward()
        del held
        return count

    found = torch.tensor(attempt(), device=accelerator.device)
    model.zero_grad(set_to_none=True)
    least = int(accelerator.gather(found).min())
    accelerator.print(f"micro-batches of {least}: the most rows of {len(ids)} tokens that fit into memory")
    return least


# ------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Run:
    """What the steps of a run share."""

    args: TrainArgs
    accelerator: Accelerator
    model: torch.nn.Module
    processor: object
    optimizers: list
    state: State
    max_steps: int
    accumulation: int
    reporter: Reporter
    tower: torch.nn.Module  # the real one, also while features of a cache stand in its place
    average: WeightAverage | None = None
    eval_rows: Rows | None = None
    push: object = None

    @property
    def done(self) -> float:
        """Share of the run that is behind, by steps or by time; the same on all ranks."""
        if self.args.max_minutes is None:
            return self.state.step / self.max_steps
        done = min(1.0, self.state.seconds / (60 * self.args.max_minutes))
        if self.accelerator.num_processes > 1:  # clocks differ, the decision must not
            done = self.accelerator.reduce(torch.tensor(done, device=self.accelerator.device), "mean").item()
        return done


def train(run: Run, loader) -> str | None:
    """Take optimizer steps until the end, an early stop, or a signal, whose name is then returned."""
    args, accelerator, state = run.args, run.accelerator, run.state
    run.model.train()
    batches, first_step, evaluated = iter(loader), state.step, -1
    start = time.perf_counter() - state.seconds
    with StopSignal() as stop:
        while state.step < run.max_steps:
            state.seconds = time.perf_counter() - start
            if (done := run.done) >= 1:
                break
            group = list(islice(batches, run.accumulation))
            read = args.batch_size * (state.step + 1) + 1000 if args.streaming else None
            for batch in group:
                rows_read = read or (batch["epoch"] + 1) * len(loader.dataset)
                count_bad_rows(state, batch.pop("bad_rows"), args.max_bad_rows, rows_read)
            totals = count_totals(accelerator, group, stop)
            if totals["stop"]:
                save_checkpoint(accelerator, args.output_dir, state) or sys.exit("Stopped, and nothing was saved.")
                return stop.received.name if stop.received else "a signal to another rank"
            epoch = max(batch.pop("epoch") for batch in group) + 1
            figures = take_step(run, group, totals, done, check=state.step == first_step)
            state.step, state.tokens = state.step + 1, state.tokens + totals["tokens"]
            state.rows += totals["rows"]
            state.seconds = time.perf_counter() - start
            run.reporter.step(epoch, totals, figures)
            if args.eval_every and state.step % args.eval_every == 0:
                evaluated = state.step
                if evaluate_and_keep(run):
                    accelerator.print(f"stopping: {args.keep_best} did not get better {state.worse} times in a row")
                    break
            if state.step % args.save_every == 0 and state.step < run.max_steps:
                save_checkpoint(accelerator, args.output_dir, state)
                if run.push and args.push_every and state.step // args.save_every % args.push_every == 0:
                    run.push(f"step {state.step}")
        if args.eval_every and evaluated != state.step:
            evaluate_and_keep(run)
    return None


def count_totals(accelerator: Accelerator, group: list[dict], stop: StopSignal) -> dict[str, int]:
    """Sums over all ranks and micro-batches of a step, in one reduction.

    `digest` sums checksums of the rows' places: the same rows give the same digest, whatever the number of ranks.
    """
    own = {"answers": sum(int((batch["shift_labels"] != IGNORE).sum()) for batch in group)}
    own["tokens"] = sum(batch["input_ids"].numel() for batch in group)
    own["pictures"] = sum(len(batch["pixel_values"]) for batch in group if "pixel_values" in batch)
    own["rows"] = sum(len(batch["rows"]) for batch in group)
    own["digest"] = sum(zlib.crc32(row.encode()) for batch in group for row in batch["rows"])
    own["stop"] = int(stop.received is not None)
    sums = accelerator.reduce(torch.tensor(list(own.values()), device=accelerator.device), "sum")
    return dict(zip(own, sums.tolist()))


def take_step(run: Run, group: list[dict], totals: dict[str, int], done: float, check: bool) -> dict[str, float]:
    """One optimizer step; returns `loss` per answer token of all ranks and micro-batches, `grad_norm` and `lr`."""
    args, accelerator, device = run.args, run.accelerator, run.accelerator.device
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    warmup = args.warmup if args.warmup < 1 else args.warmup / run.max_steps
    factor = schedule(done, warmup, args.schedule, args.final_learning_rate)
    for optimizer in run.optimizers:
        for part in optimizer.param_groups:  # not accelerator.prepare(scheduler), which steps once per rank
            part["lr"] = part["peak_lr"] * factor
    # Divide by the answer tokens of all ranks and micro-batches. A mean of micro-batch means would let a row with
    # three answer tokens pull as hard as one with three hundred.
    answers = torch.tensor(totals["answers"], device=device)
    loss_sum, imbalance = torch.zeros((), device=device), torch.zeros((), device=device)
    text = accelerator.unwrap_model(run.model).config.text_config
    routed = {"output_router_logits": True} if getattr(text, "num_experts", 0) else {}
    for i, batch in enumerate(group):
        tensors = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        last = i == len(group) - 1
        with nullcontext() if last or deepspeed else accelerator.no_sync(run.model):
            labels = tensors["shift_labels"]
            with accelerator.autocast():
                outputs = run.model(**tensors, labels=labels, use_cache=False, num_items_in_batch=answers, **routed)
            loss = outputs.loss
            loss_sum += loss.detach()
            if args.z_loss:
                log_partition = outputs.logits.float().logsumexp(-1)[labels != IGNORE]  # (K,)
                loss = loss + args.z_loss * log_partition.square().sum() / answers
            if outputs.router_logits:  # or a mixture soon asks one expert for everything
                share = (labels != IGNORE).sum() / answers  # of this micro-batch in the step
                balance = share * load_balance(outputs.router_logits, text.num_experts_per_tok)
                imbalance += balance.detach()
                loss = loss + text.router_aux_loss_coef * balance
            loss = loss * accelerator.num_processes  # undo the mean that DDP, FSDP and ZeRO take over ranks
            if deepspeed:  # its engine steps within the backward pass, so this is the last chance to look
                if last:
                    check_finite(run, group, accelerator.reduce(loss_sum, "sum").item())
                accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
            else:
                accelerator.backward(loss)
    if check and accelerator.distributed_type not in SHARDED:
        check_gradients(accelerator.unwrap_model(run.model))
    if deepspeed:
        norm = run.model.get_global_grad_norm()
    else:
        norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm or 0.0)
    loss = accelerator.reduce(loss_sum, "sum").item()
    # With fp16 gradients may overflow: the scaler then leaves the step out and scales less.
    check_finite(run, group, loss if accelerator.mixed_precision == "fp16" or math.isfinite(norm) else norm)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if run.average:
        run.average.update()
    figures = {"loss": loss, "grad_norm": norm, "lr": args.learning_rate * factor}
    if routed:
        figures["imbalance"] = accelerator.reduce(imbalance, "sum").item() / text.num_hidden_layers
    return figures


def check_finite(run: Run, group: list[dict], value: float) -> None:
    """Stop before the optimizer spoils the weights, and leave behind which rows did it."""
    if math.isfinite(value):
        return
    step, rank = run.state.step + 1, run.accelerator.process_index
    path = Path(run.args.output_dir) / f"nonfinite-step{step}-rank{rank}.json"
    path.write_text(json.dumps({"step": step, "rows": [row for batch in group for row in batch["rows"]]}, indent=1))
    raise FloatingPointError(
        f"The loss or its gradient is {value} at step {step}; its rows are listed in {path}. Look at them with "
        f"scripts.preview, lower --learning_rate ({run.args.learning_rate}), or use --mixed_precision no. Weights and "
        f"the newest checkpoint in {run.args.output_dir} are as they were before this step."
    )


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


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate_and_keep(run: Run) -> bool:
    """Evaluate on all ranks, keep the model if it is the best so far; True if it is time to stop early."""
    args, accelerator, state = run.args, run.accelerator, run.state
    rows = run.eval_rows.select(range(min(args.eval_limit, len(run.eval_rows))))
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    stop = False
    with finished_model(run) as model:
        # Compiled blocks would be compiled anew for every length of an answer.
        with torch.compiler.set_stance("force_eager"), accelerator.autocast():
            results = judge(model, run.processor, rows.select(mine), quiet=not accelerator.is_main_process)
        for result, row in zip(results, mine):
            result["row"] = row
        metrics = summarise(sorted(gather_object(results), key=lambda result: result["row"]))
        run.reporter.evaluation(metrics, sample_sheet(rows, run.processor, metrics, args.samples))
        if args.keep_best:
            if args.keep_best not in metrics["scores"]:
                raise ValueError("--keep_best ranked: no row of --eval_data has options to rank. Use loss or match.")
            value = metrics["scores"][args.keep_best]
            if state.best is None or METRICS[args.keep_best](value, state.best) != state.best:
                state.best, state.worse = value, 0
                if accelerator.is_main_process:
                    save_model(model, run.processor, Path(args.output_dir) / "best")
            else:
                state.worse += 1
            stop = args.patience is not None and state.worse >= args.patience
    accelerator.wait_for_everyone()
    return stop


@contextmanager
def finished_model(run: Run):
    """The model as it would be saved now: averaged weights, and the tower in the place of its cached features."""
    model = run.accelerator.unwrap_model(run.model)
    cached, model.model.vision_tower = model.model.vision_tower, run.tower
    if run.average:
        run.average.swap()
    try:
        yield model
    finally:
        if run.average:
            run.average.swap()
        model.model.vision_tower = cached


def sample_sheet(rows: Rows, processor, metrics: dict, count: int):
    """The first `count` rows with a picture and what was answered, as a picture; None if there are none."""
    items = prompts(rows.select(range(min(4 * count, len(rows)))), processor) if count else []
    seen = [(i, item) for i, item in enumerate(items) if item["images"]][:count]
    outputs = [metrics["answers"][i]["output"] for i, _ in seen]
    return contact_sheet([item for _, item in seen], outputs) if seen else None


# ------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> Path:
    """Train by the options given; return the folder of the finished model."""
    args = parse_args(argv)
    # Before the model: a wrong path should not cost a download.
    check_sources(args)
    rows = load_streams(args.data, args.min_rating) if args.streaming else choose_rows(args)
    eval_rows = load_rows(args.eval_data) if args.eval_data else None
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    model, processor = build(args)
    adapter = add_lora(model, args) if args.lora else None
    if adapter is None:
        freeze(model, args.train)
    check_disk(model, output)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        compile_blocks(model, accelerator.device)
    encoder = Encoder(processor, args.max_length, args.too_long)
    tower = model.model.vision_tower
    if args.feature_cache:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        cache = FeatureCache(args.feature_cache, model, encoder, dtype)
        tower.to(accelerator.device)
        cache.fill(rows, encoder, accelerator)
        encoder.features, model.model.vision_tower = cache, CachedTower(dtype)
    sees = any(p.requires_grad for part in (tower, model.model.multi_modal_projector) for p in part.parameters())
    blank = encoder.blank() if sees else None
    collate = PackingCollator(blank) if args.packing else PaddingCollator(processor.tokenizer.pad_token_id, blank)
    if not args.micro_batch_size:
        args.micro_batch_size = largest_micro_batch(model, encoder, collate, args, accelerator)
    plain, optimizers = model, build_optimizers(model, args)
    state = State()
    accelerator.register_for_checkpointing(state)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    average = WeightAverage(accelerator.unwrap_model(model), args.ema) if args.ema else None
    if average:
        accelerator.register_for_checkpointing(average)
    resume(accelerator, args, state)
    loader, accumulation, steps = make_loader(rows, encoder, collate, args, accelerator, state.step)
    max_steps = args.max_steps or (sys.maxsize if args.max_minutes or steps is None else steps)
    if accelerator.is_main_process:
        describe(accelerator, plain, args, rows, max_steps, accumulation)
        write_run(args, accelerator, state, {}, finished=False)
        if args.recipe and Path(args.recipe).resolve() != (output / "recipe.yaml").resolve():
            shutil.copyfile(args.recipe, output / "recipe.yaml")
    reporter = Reporter(accelerator, args, state, max_steps, plain)
    run = Run(
        args, accelerator, model, processor, optimizers, state, max_steps, accumulation, reporter, tower, average
    )
    run.eval_rows, uploads = eval_rows, BackgroundPush()
    if args.push_to_hub and accelerator.is_main_process:
        run.push = partial(push_latest, run, uploads)
    stopped = train(run, loader)
    reporter.close()
    if stopped:
        accelerator.print(f"stopped by {stopped} at step {state.step}, saved: start it again and it goes on from here")
        accelerator.end_training()
        sys.exit(STOPPED)
    if average:
        average.swap()
    sharded = accelerator.get_state_dict(model) if accelerator.distributed_type in SHARDED else None
    # DDP's wrapper must go before the process group does: destroyed as the group's last owner it holds Python's lock
    # while it waits for Gloo's threads, one of which may wait for that lock.
    model = accelerator.unwrap_model(model)
    run.model = run.optimizers = optimizers = None
    accelerator.free_memory()
    model.model.vision_tower = tower  # in the place of what gave back cached features
    if accelerator.is_main_process:
        uploads.finish()
        finish(args, accelerator, model, processor, state, eval_rows, adapter, sharded)
    accelerator.end_training()
    return output / "final"


def finish(args, accelerator, model, processor, state: State, eval_rows, adapter, state_dict: dict | None) -> None:
    """Save the model, score what was saved, and leave the record and the plot of the run."""
    output = Path(args.output_dir)
    final = output / "final"
    if adapter is not None:
        adapter.save_pretrained(output / "adapter")
        model = adapter.merge_and_unload()
    try:
        save_model(model, processor, final, state_dict)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The finished model could not be written to {final} ({error}; "
            f"{shutil.disk_usage(output).free / 2**20:,.0f} MiB free). Make room and run the same "
            "command: it goes on from the newest checkpoint."
        ) from error
    metrics = {}
    if eval_rows is not None:
        # From disk: what is scored is what was saved, and free of training's compiled graphs.
        model, processor = load_trained(final)
        metrics = evaluate(model.to(accelerator.device), processor, eval_rows, limit=args.eval_limit)
        print_table(metrics)
    record = write_run(args, accelerator, state, metrics, finished=True)
    try:
        drawn = f"; loss drawn in {plot([output], output / 'loss.png')}" if (output / "log.jsonl").is_file() else ""
    except ImportError:
        drawn = f"; to draw the loss: pip install matplotlib, python -m scripts.plot {output}"
    print(f"{run_name(args)}: {state.step} steps in {state.seconds / 60:.1f} min; model in {final}{drawn}")
    if state.bad_rows:
        print(f"rows left out or cut:\n{describe_bad_rows(state.bad_rows)}")
    if args.push_to_hub:
        options = {"private": args.hub_private, "tag": run_name(args), "message": f"{run_name(args)}: finished"}
        try:
            print(f"published: {publish(final, args.push_to_hub, run=record, **options)}")
        except (ReleaseError, ValueError) as error:  # the model is on the disk; the text says how to go on
            print(error, file=sys.stderr)


def push_latest(run: Run, uploads: BackgroundPush, message: str) -> None:
    """Upload the weights of this moment in the background, as latest/."""
    args = run.args
    latest = Path(args.output_dir) / "latest"
    with finished_model(run) as model:
        save_model(model, run.processor, latest)
    message = f"{run_name(args)}: {message}"
    uploads.submit(latest, args.push_to_hub, private=args.hub_private, message=message)


if __name__ == "__main__":
    main()
