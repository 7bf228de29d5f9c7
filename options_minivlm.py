"""The options of training: defaults < recipe < command line, checked before anything is loaded."""

import importlib.util
from argparse import ArgumentParser
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from optimization_minivlm import PARTS, SCHEDULES, check_selector
from sources_minivlm import ADAPTERS

DATA_HELP = (
    "Data to train on, schemas mixed at will: parquet, jsonl, json or webdataset tar files, folders or globs of them, "
    "or hub:owner/name[:config[:split]]. The schema is told from the columns; FILE::ADAPTER forces one of "
    f"{', '.join(adapter.__name__ for adapter in ADAPTERS)}. Pictures given by name lie in the folder of their file."
)
TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow", "comet_ml", "clearml", "dvclive", "aim")
METRICS = {"loss": min, "match": max, "ranked": max}  # what keep_best can go by, and which of two values is better
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": SCHEDULES,
    "augment": ("none", "mild", "strong"),
    "too_long": ("drop", "cut"),
    "mixed_precision": ("auto", "bf16", "fp16", "fp8", "tf32", "no"),
    "device": ("auto", "cpu", "cuda"),
    "keep_best": ("", *METRICS),
}


def option(default, text, **kwargs):
    """A command-line option; its help text carries the unit."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **kwargs})
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class TrainArgs:
    recipe: str | None = option(None, "YAML file whose keys are the options below.")
    # where to start
    model: str | None = option(None, "Folder or Hub id to start from. Left out: a new model around model_config.")
    model_config: str | None = option(None, "MiniVLMConfig of a new model: a mapping in a recipe, or JSON.")
    vision_model: str | None = option(None, "Folder or Hub id of a trained vision tower for a new model.")
    text_model: str | None = option(None, "Folder or Hub id of a trained causal language model for a new model.")
    tokenizer: str | None = option(None, "Folder or Hub id of a new model's tokenizer. Default: text_model's, or '.'.")
    # data
    data: list[str] = option(["data/train.parquet"], DATA_HELP)
    keep: str | None = option(None, "Rows to train on: a mapping from column to values in a recipe, or JSON.")
    min_rating: list[str] = option(
        [], "FineVision: lowest rating of a turn, as relevance=3; rows left empty are left out."
    )
    max_rows: int | None = option(None, "Train on the first so many rows only.")
    max_length: int = option(1024, "Longest row in tokens, pictures included.")
    too_long: str = option("drop", "A longer row: drop counts it as a bad one, cut leaves out its last turns.")
    max_bad_rows: float = option(0.001, "Share of rows that may be unusable before training stops.")
    share_pictures: int = option(1, "Most rows about the same picture that share its tokens, blind to each other.")
    streaming: bool = option(False, "Read the data in order instead of holding it; needs max_steps or max_minutes.")
    weights: list[float] = option([], "How often each source is drawn, relative to others; streamed, until its end.")
    packing: bool = option(False, "Fill packs with rows instead of padding them; batch sizes then count packs.")
    pack_tokens: int = option(4096, "Most tokens in a pack.")
    pack_pictures: int = option(64, "Most pictures in a pack.")
    augment: str = option("none", "mild: shift, scale, tilt, tint pictures. strong: also new colours. Or none.")
    feature_cache: str | None = option(None, "Folder to keep a frozen tower's features in, computed once per picture.")
    workers: int = option(1, "Processes that read and encode rows, per rank. 0: in the training process.")
    # what learns, for how long
    train: list[str] = option(
        ["vision", "projector", "text"],
        "Parts that learn: vision, projector, text, lm_head, or some blocks of one: text:first_last (MiniMind-V's "
        "freeze_llm=1), text:last_2, vision:last_2.",
    )
    lora: str | None = option(
        None, "Train a LoRA adapter instead of whole matrices, as r=16,alpha=32,targets=decoder (or vision, all)."
    )
    epochs: float = option(1.0, "Passes over the data, if neither max_steps nor max_minutes is given.")
    max_steps: int | None = option(None, "Optimizer steps, whatever the number of ranks.")
    max_minutes: float | None = option(None, "Stop after so many minutes; the learning rate decays over them.")
    batch_size: int = option(64, "Rows (groups with share_pictures, packs with packing) per step, over all ranks.")
    micro_batch_size: int = option(
        64, "Rows, groups or packs that one rank puts through the model at once. 0: as many as fit into GPU memory."
    )
    # optimisation
    optimizer: str = option("adamw", "adamw, or muon (matrices of blocks by Muon, everything else by AdamW).")
    learning_rate: float = option(1e-3, "Learning rate after warm-up.")
    learning_rates: list[str] = option(
        [], "Learning rates of parts that have their own, as vision=1e-5 projector=1e-3."
    )
    schedule: str = option("linear", f"Course of the learning rate after warm-up: {', '.join(SCHEDULES)}.")
    final_learning_rate: float = option(0.0, "What the schedule falls to, as a share of the learning rate.")
    warmup: float = option(
        0.03, "Over which the learning rate rises: a share of the run, or from 1 up optimizer steps."
    )
    weight_decay: float = option(0.05, "Decoupled weight decay of matrices; norms, biases and embeddings have none.")
    adam_beta2: float = option(0.98, "Decay of AdamW's mean square gradient.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this global norm.")
    z_loss: float = option(0.0, "Weight of the squared log-partition added to the loss (arXiv 2204.02311, section 5).")
    ema: float = option(0.0, "Decay of an average of the weights that is evaluated and saved as the result. 0: none.")
    # how it computes
    device: str = option("auto", "auto, cpu, or cuda: stop if there is no GPU.")
    mixed_precision: str = option(
        "auto", "bf16, fp16, fp8, tf32, no (fp32), or auto: bf16 where the device computes in it."
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flex_attention or flash_attention_2. Left out: sdpa where the decoder can."
    )
    compile: bool = option(False, "Compile the blocks of tower and decoder (needs a C++ compiler on CPU).")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    seed: int = option(0, "Seed of weights, order and augmentation.")
    # what it leaves
    output_dir: str = option("runs/train", "Folder for checkpoints, the log and the final model.")
    resume: str = option("auto", "auto: go on from output_dir's newest complete checkpoint; never; or a checkpoint.")
    save_every: int = option(500, "Optimizer steps between checkpoints.")
    log_every: int = option(10, "Optimizer steps between lines of the log.")
    trackers: list[str] = option([], f"Where to log, besides log.jsonl: {', '.join(TRACKERS)}.")
    eval_data: list[str] = option([], "Data to answer, named as for data; loss and exact match are reported.")
    eval_limit: int = option(2000, "Rows of eval_data to answer.")
    eval_every: int | None = option(None, "Optimizer steps between evaluations. Left out: only at the end.")
    keep_best: str = option("", "Also keep the best model met, in best/, by loss, match or ranked on eval_data.")
    patience: int | None = option(None, "Stop after so many evaluations in a row without a better keep_best.")
    samples: int = option(8, "Pictures of eval_data whose answers are drawn at each evaluation.")
    # publishing
    push_to_hub: str | None = option(None, "Hub repository, as jinv2/minivlm, to upload the result to.")
    push_every: int | None = option(None, "Upload in the background at every so many-th checkpoint, too.")
    hub_private: bool = option(False, "Create the Hub repository as a private one.")
    run_name: str | None = option(None, "Name of the run, its tag on the Hub and in trackers. Default: output_dir's.")


def parse_args(argv: list[str] | None = None) -> TrainArgs:
    """Defaults < recipe < command line. An unknown recipe key is an error that names the nearest option."""
    parser = HfArgumentParser(TrainArgs, description="Train MiniVLM on one or more devices.")
    path = parser.parse_known_args(argv)[0].recipe
    if path:
        parser.set_defaults(**read_recipe(path, parser))  # argparse converts the string that YAML makes of `1e-5`
    args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    for name in ("model_config", "keep"):
        if isinstance(value := getattr(args, name), str):
            setattr(args, name, yaml.safe_load(value))
    args.min_rating = read_pairs(parser, "min_rating", args.min_rating, "relevance=3")
    args.learning_rates = read_pairs(parser, "learning_rates", args.learning_rates, "vision=1e-5")
    for check in (check_choices, check_numbers, check_parts, check_data, check_tracking):
        check(parser, args)
    return args


def recipe_names() -> list[str]:
    return sorted(path.name for path in Path(__file__).with_name("recipes").glob("*.yaml"))


def read_recipe(path: str, parser: ArgumentParser) -> dict:
    if not Path(path).is_file():
        parser.error(f"{path}: no such recipe. Recipes are in recipes/: {', '.join(recipe_names())}.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path}: not YAML: {error}")
    known = [f.name for f in fields(TrainArgs) if f.name != "recipe"]
    for key in values.keys() - set(known):
        near = get_close_matches(key, known, n=1)
        parser.error(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "."))
    lists = [f.name for f in fields(TrainArgs) if f.default_factory is not MISSING]
    for name in values.keys() & lists:
        if isinstance(values[name], dict):  # learning_rates and min_rating read better as mappings
            values[name] = [f"{key}={value}" for key, value in values[name].items()]
        elif not isinstance(values[name], list):
            parser.error(f"{path}: {name}: {values[name]!r} is not a list. Write [{values[name]}].")
    return values


def read_pairs(parser: ArgumentParser, name: str, entries: list[str], example: str) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (text.split("=") for text in entries)}
    except ValueError:
        parser.error(f"--{name} {' '.join(entries)}: write a name and a number, as {example}.")


def check_choices(parser: ArgumentParser, args: TrainArgs) -> None:
    for name, known in CHOICES.items():
        if (value := getattr(args, name)) not in known:
            known = [choice for choice in known if choice]
            near = get_close_matches(str(value), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            parser.error(f"--{name} {value}: not known. Use {', '.join(known[:-1])} or {known[-1]}.{hint}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: PyTorch sees no GPU here. Is CUDA_VISIBLE_DEVICES empty, the driver missing, or this a "
            f"CPU build of PyTorch ({torch.__version__})? Use --device auto to train on the CPU."
        )
    if args.mixed_precision == "fp8" and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    ):
        parser.error("--mixed_precision fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later. Use bf16.")
    if args.mixed_precision == "fp16" and args.optimizer == "muon":
        # Accelerate's scaler steps once per optimizer, so the second would see gradients that are unscaled twice.
        parser.error("--mixed_precision fp16 goes with one optimizer. Use --optimizer adamw, or bf16.")


def check_numbers(parser: ArgumentParser, args: TrainArgs) -> None:
    if args.batch_size < 1 or args.micro_batch_size < 0:
        parser.error(
            f"--batch_size {args.batch_size} must be 1 or more, --micro_batch_size {args.micro_batch_size} 0 or more."
        )
    for name in ("log_every", "save_every", "eval_every", "push_every", "patience", "max_steps", "max_rows"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be 1 or more.")
    for name in ("ema", "final_learning_rate"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be 0 or more and less than 1.")
    if args.warmup < 0 or (args.warmup >= 1 and args.max_minutes):
        parser.error(f"--warmup {args.warmup}: with --max_minutes give a share of the run, 0 or more and less than 1.")


def check_parts(parser: ArgumentParser, args: TrainArgs) -> None:
    for selector in args.train:
        if problem := check_selector(selector):
            parser.error(problem)
    for part in args.learning_rates:
        if part not in PARTS:
            parser.error(f"--learning_rates {part}: no such part. Parts are {', '.join(PARTS)}.")
    if args.lora:
        args.lora = read_lora(parser, args.lora)
        if args.keep_best or args.push_every:
            parser.error("--lora saves its adapter at the end only: leave out --keep_best and --push_every.")


def read_lora(parser: ArgumentParser, text: str) -> dict[str, str]:
    """`r=16,alpha=32,targets=decoder` as a mapping; what is left out has these values."""
    values = {"r": "16", "alpha": "32", "targets": "decoder"}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        if key not in values or not value:
            parser.error(f"--lora {text}: {pair!r} is not understood. Write r=16,alpha=32,targets=decoder.")
        values[key] = value
    if values["targets"] not in ("decoder", "vision", "all"):
        parser.error(f"--lora targets={values['targets']}: use decoder, vision or all.")
    if not (values["r"].isdigit() and int(values["r"]) and values["alpha"].isdigit()):
        parser.error(f"--lora {text}: r and alpha are whole numbers from 1 up.")
    if importlib.util.find_spec("peft") is None:
        parser.error("--lora needs the package peft. Install it: pip install peft")
    return values


def check_data(parser: ArgumentParser, args: TrainArgs) -> None:
    if args.streaming:
        if not (args.max_steps or args.max_minutes):
            parser.error("--streaming: the data has no known length. Give --max_steps or --max_minutes.")
        if args.share_pictures > 1 or args.max_rows:
            parser.error("--streaming does not go with --share_pictures or --max_rows. Leave them out.")
    if args.weights and (min(args.weights) <= 0 or len(args.weights) != len(args.data)):
        parser.error(f"--weights {args.weights}: give a positive number for each of {len(args.data)} --data sources.")
    sees = any(selector.startswith("vision") for selector in args.train) or args.lora
    if args.feature_cache and (sees or args.augment != "none" or args.streaming):
        parser.error(
            "--feature_cache keeps what a frozen tower makes of pictures that never change, of data that is held. "
            "Use it with --train projector text, --augment none and without --streaming or --lora."
        )
    if args.packing and args.share_pictures > 1:
        parser.error("--packing and --share_pictures exclude each other. Choose one.")
    if args.packing and args.pack_tokens < args.max_length:
        parser.error(
            f"--pack_tokens {args.pack_tokens} is less than --max_length {args.max_length}: the longest rows "
            "would fit into no pack. Raise the one or lower the other."
        )


def check_tracking(parser: ArgumentParser, args: TrainArgs) -> None:
    for name in args.trackers:
        if name not in TRACKERS:
            parser.error(f"--trackers {name}: not known. Use {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None and not (
            name == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            parser.error(f"--trackers {name}: the package is not installed. Install it: pip install {name}")
    for name in ("eval_every", "keep_best"):
        if getattr(args, name) and not args.eval_data:
            parser.error(f"--{name} needs --eval_data to look at.")
    if args.keep_best and not args.eval_every:
        parser.error("--keep_best compares evaluations: give --eval_every.")
    if args.patience and not args.keep_best:
        parser.error("--patience needs --keep_best, to know what is better.")
    if args.push_every and not args.push_to_hub:
        parser.error("--push_every needs --push_to_hub, to know where to.")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            parser.error(f"--push_to_hub {args.push_to_hub}: {error}")
        if args.push_to_hub.count("/") != 1:
            parser.error(f"--push_to_hub {args.push_to_hub}: write owner/name, as jinv2/minivlm.")
        if get_token() is None:
            parser.error("--push_to_hub: nobody is logged in. Run `hf auth login` with a token that may write.")
