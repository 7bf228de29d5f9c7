"""Train MiniVLM on one or more devices: `accelerate launch train_accelerate.py --recipe recipes/X.yaml`.

    options -> data -> model -> loop of optimizer steps -> finished model, record, plot

The result is a folder that `from_pretrained` loads; options, versions, metrics and checkpoints lie beside it. The
functions that the steps call are in `minivlm/`: `data/` makes batches, `model/` builds and freezes, the rest is in
`training/`.
"""

import dataclasses
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from safetensors import SafetensorError

from minivlm.cli import run_command
from minivlm.data.bad_rows import describe_bad_rows
from minivlm.data.collators import PackingCollator, PaddingCollator
from minivlm.data.composed import Composer, load_composer
from minivlm.data.encoder import Encoder
from minivlm.data.features import use_cached_features
from minivlm.data.loader import MicroBatches, check_pictures, choose_rows, make_loader
from minivlm.data.options import is_composed
from minivlm.data.rows import Rows, StreamSource, load_rows, load_streams
from minivlm.evaluation.on_the_way import sample_sheet, score_on_all_ranks
from minivlm.evaluation.scoring import evaluate, print_table
from minivlm.hub.background import BackgroundPush
from minivlm.hub.publish import ReleaseError, publish
from minivlm.model.backbones import build
from minivlm.model.loading import check_names, load_trained, save_model
from minivlm.model.lora import add_lora
from minivlm.model.packed_attention import use_packed_attention
from minivlm.model.parts import check_gradients, freeze
from minivlm.training.checkpoints import STOPPED, StopSignal, check_disk, resume, save_checkpoint
from minivlm.training.device import SHARDED, compile_blocks, make_accelerator
from minivlm.training.grounding import check_grounding
from minivlm.training.losses import SUMS, compute_loss
from minivlm.training.micro_batch import largest_micro_batch
from minivlm.training.optimizers import WeightAverage, build_optimizers, schedule, set_learning_rates
from minivlm.training.options import TrainArgs, parse_args
from minivlm.training.plotting import plot
from minivlm.training.record import keep_recipe, print_start, run_name, write_run
from minivlm.training.reporting import Reporter
from minivlm.training.run_options import METRICS
from minivlm.training.state import State, check_finite, count_bad_rows, count_totals


@dataclass(frozen=True)
class Run:
    """Hold what the steps of a run share; built once, not changed afterwards."""

    args: TrainArgs
    accelerator: Accelerator
    model: torch.nn.Module  # as Accelerate prepared it
    processor: object
    optimizers: list
    batches: MicroBatches
    state: State
    max_steps: int
    reporter: Reporter
    tower: torch.nn.Module  # the real one, also while cached features stand in its place
    adapter: torch.nn.Module | None  # PEFT's model around ours
    average: WeightAverage | None
    eval_rows: Rows | None
    uploads: BackgroundPush | None  # of the main process, if the model is published

    @property
    def progress(self) -> float:
        """Return the share of the run that is done, by steps or by time; the same on all ranks."""
        if self.args.max_minutes is None:
            return self.state.step / self.max_steps
        progress = min(1.0, self.state.seconds / (60 * self.args.max_minutes))
        if self.accelerator.num_processes > 1:  # clocks differ, the decision must not
            progress = self.accelerator.reduce(torch.tensor(progress, device=self.accelerator.device), "mean").item()
        return progress


def main(argv: list[str] | None = None) -> Path:
    """Train by the options given; return the folder of the finished model."""
    args = parse_args(argv)
    # Data and names before the model: a wrong path should not cost a download.
    check_names(args)
    rows = read_rows(args)
    eval_rows = load_rows(args.eval_data) if args.eval_data else None
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    run = build_run(args, accelerator, rows, eval_rows)
    stopped = train(run)
    run.reporter.close()
    if stopped:
        accelerator.print(f"stopped by {stopped} at step {run.state.step}, saved: start it again to go on from here")
        accelerator.end_training()
        sys.exit(STOPPED)
    if run.average:
        run.average.swap()
    state_dict = accelerator.get_state_dict(run.model) if accelerator.distributed_type in SHARDED else None
    # DDP's wrapper must go before the process group does: destroyed as the group's last owner it holds Python's lock
    # while it waits for Gloo's threads, one of which may wait for that lock.
    plain = accelerator.unwrap_model(run.model)
    plain.model.vision_tower = run.tower
    run = dataclasses.replace(run, model=plain, optimizers=[], batches=None)
    accelerator.free_memory()
    if accelerator.is_main_process:
        finish(run, state_dict)
    accelerator.end_training()
    return Path(args.output_dir) / "final"


def read_rows(args: TrainArgs) -> Rows | Composer | list[StreamSource]:
    """Return the rows to train on, what composes them, or the sources to stream them from."""
    if args.streaming:
        return load_streams(args.data, args.min_rating)
    if is_composed(args.data):
        return load_composer(args.data[0], args.seed)
    rows = choose_rows(args, quiet=os.environ.get("RANK", "0") != "0")  # no state yet: it would fix the device
    check_pictures(rows, args.train)
    return rows


def build_run(args: TrainArgs, accelerator: Accelerator, rows, eval_rows: Rows | None) -> Run:
    """Build model, data and optimizers by the options, and load the checkpoint to go on from."""
    model, processor = build(args)
    adapter = prepare_model(model, args, accelerator)
    encoder = Encoder(processor, args.max_length, args.too_long)
    tower = model.model.vision_tower
    if args.feature_cache:
        encoder = use_cached_features(args.feature_cache, model, encoder, rows, accelerator)
    collate = make_collator(model, encoder, args, tower)
    if not args.micro_batch_size:
        found = largest_micro_batch(model, encoder, collate, args, accelerator)
        args = dataclasses.replace(args, micro_batch_size=found)
    optimizers, state = build_optimizers(model, args), State()
    accelerator.register_for_checkpointing(state)
    prepared, *optimizers = accelerator.prepare(model, *optimizers)
    average = WeightAverage(accelerator.unwrap_model(prepared), args.ema) if args.ema else None
    if average:
        accelerator.register_for_checkpointing(average)
    resume(accelerator, args, state)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, encoder, collate, args, **ranks, start_step=state.step)
    max_steps = args.max_steps or (not args.max_minutes and batches.steps(args.epochs)) or sys.maxsize
    if accelerator.is_main_process:
        print_start(accelerator, model, args, rows, (max_steps, batches.accumulation))
        write_run(args, accelerator, state, {}, finished=False)
        keep_recipe(args)
    reporter = Reporter(accelerator, args, state, max_steps, model)
    uploads = BackgroundPush() if args.push_to_hub and accelerator.is_main_process else None
    return Run(
        args=args, accelerator=accelerator, model=prepared, processor=processor, optimizers=optimizers,
        batches=batches, state=state, max_steps=max_steps, reporter=reporter, tower=tower, adapter=adapter,
        average=average, eval_rows=eval_rows, uploads=uploads,
    )  # fmt: skip


def prepare_model(model: torch.nn.Module, args: TrainArgs, accelerator: Accelerator) -> torch.nn.Module | None:
    """Freeze what does not train, check the disk, compile; return PEFT's model around ours with `--lora`."""
    adapter = add_lora(model, args) if args.lora else None
    if adapter is None:
        freeze(model, args.train)
    if args.grounding_loss:
        check_grounding(model)
    check_disk(model, args.output_dir)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.packing and not args.attn_implementation and accelerator.device.type == "cpu":
        use_packed_attention(model.model.language_model)
    if args.compile:
        compile_blocks(model, accelerator.device)
    return adapter


def make_collator(model, encoder: Encoder, args: TrainArgs, tower) -> PackingCollator | PaddingCollator:
    """Return the collator; it adds a blank picture to a batch without one if tower or projector train."""
    seeing = (tower, model.model.multi_modal_projector)
    blank = encoder.blank() if any(p.requires_grad for part in seeing for p in part.parameters()) else None
    return PackingCollator(blank) if args.packing else PaddingCollator(encoder.tokenizer.pad_token_id, blank)


def train(run: Run) -> str | None:
    """Take optimizer steps until the end or an early stop; return the name of the signal if one stopped the run."""
    args, accelerator, state = run.args, run.accelerator, run.state
    run.model.train()
    batches, first_step, evaluated = iter(run.batches), state.step, -1
    start = time.perf_counter() - state.seconds
    with StopSignal() as stop:
        while state.step < run.max_steps:
            state.seconds = time.perf_counter() - start
            if (progress := run.progress) >= 1:
                break
            group = next_group(run, batches)
            totals = count_totals(accelerator, group, stop.received is not None)
            if totals["stop"]:
                save_checkpoint(accelerator, args.output_dir, state) or sys.exit("Stopped, and nothing was saved.")
                return stop.received.name if stop.received else "a signal to another rank"
            epoch = max(batch.pop("epoch") for batch in group) + 1
            metrics = take_step(run, group, totals, progress, check=state.step == first_step)
            state.step, state.tokens = state.step + 1, state.tokens + totals["tokens"]
            state.rows += totals["rows"]
            state.seconds = time.perf_counter() - start
            run.reporter.step(epoch, totals, metrics)
            if args.eval_every and state.step % args.eval_every == 0:
                evaluated = state.step
                if evaluate_and_keep(run):
                    accelerator.print(f"stopping: {args.keep_best} did not get better {state.worse} times in a row")
                    break
            if state.step % args.save_every == 0 and state.step < run.max_steps:
                save_checkpoint(accelerator, args.output_dir, state)
                if run.uploads and args.push_every and state.step // args.save_every % args.push_every == 0:
                    push_latest(run, f"step {state.step}")
        if args.eval_every and evaluated != state.step:
            evaluate_and_keep(run)
    return None


def next_group(run: Run, batches) -> list[dict]:
    """Return the micro-batches of the next step; count the rows that had to be left out of them."""
    group = list(islice(batches, run.batches.accumulation))
    read = run.args.batch_size * (run.state.step + 1) + 1000 if run.args.streaming else None
    for batch in group:
        rows_read = read or (batch["epoch"] + 1) * len(run.batches.loader.dataset)
        count_bad_rows(run.state, batch.pop("bad_rows"), run.args.max_bad_rows, rows_read)
    return group


def take_step(run: Run, group: list[dict], totals: dict[str, int], progress: float, check: bool) -> dict[str, float]:
    """Take one optimizer step; return `loss` per answer token of all ranks, `grad_norm` and `lr`."""
    args, accelerator = run.args, run.accelerator
    warmup = args.warmup if args.warmup < 1 else args.warmup / run.max_steps
    factor = schedule(progress, warmup, args.schedule, args.final_learning_rate)
    set_learning_rates(run.optimizers, factor)  # not accelerator.prepare(scheduler), which steps once per rank
    sums = accumulate_gradients(run, group, totals["answers"])
    if check and accelerator.distributed_type not in SHARDED:
        check_gradients(accelerator.unwrap_model(run.model))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = run.model.get_global_grad_norm()
    else:
        norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm or 0.0)
    sums = dict(zip(SUMS, accelerator.reduce(sums, "sum").tolist()))
    loss = sums.pop("loss")
    # With fp16 gradients may overflow: the scaler then leaves the step out and scales less.
    value = loss if accelerator.mixed_precision == "fp16" or math.isfinite(norm) else norm
    check_finite(value, group, args, run.state.step + 1, accelerator.process_index)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if run.average:
        run.average.update()
    metrics = {"loss": loss, "grad_norm": norm, "lr": args.learning_rate * factor}
    return metrics | {name: value for name, value in sums.items() if value}


def accumulate_gradients(run: Run, group: list[dict], answers: int) -> torch.Tensor:
    """Put each micro-batch forward and backward; return this rank's share of `SUMS`."""
    args, accelerator, device = run.args, run.accelerator, run.accelerator.device
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    answers = torch.tensor(answers, device=device)
    sums = torch.zeros(len(SUMS), device=device)
    for i, batch in enumerate(group):
        tensors = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        last = i == len(group) - 1
        with nullcontext() if last or deepspeed else accelerator.no_sync(run.model):
            objective, share = compute_loss(run.model, tensors, answers, args, accelerator)
            sums += share
            if deepspeed:  # its engine steps within the backward pass, so this is the last chance to look
                if last:
                    value = accelerator.reduce(sums, "sum")[0].item()
                    check_finite(value, group, args, run.state.step + 1, accelerator.process_index)
                accelerator.deepspeed_engine_wrapped.backward(objective, sync_gradients=last)
            else:
                accelerator.backward(objective)
    return sums


def evaluate_and_keep(run: Run) -> bool:
    """Evaluate on all ranks, keep the model if it is the best so far; return whether to stop early."""
    args, accelerator = run.args, run.accelerator
    rows = run.eval_rows.select(range(min(args.eval_limit, len(run.eval_rows))))
    stop = False
    with finished_model(run) as model:
        metrics = score_on_all_ranks(model, run.processor, rows, accelerator)
        run.reporter.evaluation(metrics, sample_sheet(rows, run.processor, metrics, args.samples))
        if args.keep_best:
            if args.keep_best not in metrics["scores"]:
                raise ValueError("--keep_best ranked: no row of --eval_data has options to rank. Use loss or match.")
            if run.state.improve(metrics["scores"][args.keep_best], METRICS[args.keep_best]):
                if accelerator.is_main_process:
                    save_model(model, run.processor, Path(args.output_dir) / "best")
            stop = args.patience is not None and run.state.worse >= args.patience
    accelerator.wait_for_everyone()
    return stop


@contextmanager
def finished_model(run: Run):
    """Yield the model as it would be saved now: with averaged weights, and the tower instead of cached features."""
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


def push_latest(run: Run, message: str) -> None:
    """Save the weights of this moment as latest/ and upload them in the background."""
    args = run.args
    latest = Path(args.output_dir) / "latest"
    with finished_model(run) as model:
        save_model(model, run.processor, latest)
    message = f"{run_name(args)}: {message}"
    run.uploads.submit(latest, args.push_to_hub, private=args.hub_private, message=message)


def finish(run: Run, state_dict: dict | None) -> None:
    """Save the model, score what was saved, leave record and plot of the run, and publish if that was asked for."""
    args, state, output = run.args, run.state, Path(run.args.output_dir)
    if run.uploads:
        run.uploads.finish()
    final = save_final(run, state_dict)
    metrics = {}
    if run.eval_rows is not None:
        # From disk: what is scored is what was saved, and free of training's compiled graphs.
        model, processor = load_trained(final)
        metrics = evaluate(model.to(run.accelerator.device), processor, run.eval_rows, limit=args.eval_limit)
        print_table(metrics)
    record = write_run(args, run.accelerator, state, metrics, finished=True)
    try:
        drawn = f"; loss drawn in {plot([output], output / 'loss.png')}" if (output / "log.jsonl").is_file() else ""
    except ImportError:
        drawn = f"; to draw the loss: pip install matplotlib, minivlm plot {output}"
    print(f"{run_name(args)}: {state.step} steps in {state.seconds / 60:.1f} min; model in {final}{drawn}")
    if state.bad_rows:
        print(f"rows left out or cut:\n{describe_bad_rows(state.bad_rows)}")
    if args.push_to_hub:
        options = {"private": args.hub_private, "tag": run_name(args), "message": f"{run_name(args)}: finished"}
        try:
            print(f"published: {publish(final, args.push_to_hub, run=record, **options)}")
        except (ReleaseError, ValueError) as error:  # the model is on the disk; the text says how to go on
            print(error, file=sys.stderr)


def save_final(run: Run, state_dict: dict | None) -> Path:
    """Write final/, and adapter/ with `--lora`; return final/.

    Raises:
        OSError: they could not be written; the newest checkpoint is still there.
    """
    output, model = Path(run.args.output_dir), run.model
    final = output / "final"
    if run.adapter is not None:
        run.adapter.save_pretrained(output / "adapter")
        model = run.adapter.merge_and_unload()
    try:
        save_model(model, run.processor, final, state_dict)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The finished model could not be written to {final} ({error}; "
            f"{shutil.disk_usage(output).free / 2**20:,.0f} MiB free). Make room and run the same "
            "command: it goes on from the newest checkpoint."
        ) from error
    return final


if __name__ == "__main__":
    sys.exit(run_command(main))
