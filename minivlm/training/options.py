"""Parse the options of a training run: defaults < recipe < command line, checked before anything is loaded."""

import sys
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from minivlm.cli import HelpFormatter, Parser, option
from minivlm.data.options import DataArgs, check_data, is_composed
from minivlm.model.loading import PARTS_OF_NEW
from minivlm.model.options import ModelArgs, check_model, read_lora, read_model_config
from minivlm.resources import find_recipe
from minivlm.training.learning_options import TrainingArgs, check_training
from minivlm.training.optimizers import SCHEDULES
from minivlm.training.run_options import METRICS, RunArgs, check_run

DOC = """Train MiniVLM on one or more devices.

    minivlm train --recipe micro
    minivlm train --model . --data my_pictures --epochs 3
    accelerate launch train_accelerate.py --recipe recipes/emoji.yaml --batch_size 8

TRAINING.md explains the options. --debug shows the traceback of an error."""

CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": SCHEDULES,
    "augment": ("none", "mild", "strong"),
    "too_long": ("drop", "cut"),
    "mixed_precision": ("auto", "bf16", "fp16", "fp8", "tf32", "no"),
    "device": ("auto", "cpu", "cuda"),
    "keep_best": ("", *METRICS),
}
COUNTS = ("log_every", "save_every", "eval_every", "push_every", "patience", "max_steps", "max_rows")


@dataclass
class RecipeArgs:
    """Choose a recipe."""

    recipe: str | None = option(None, "YAML file whose keys are the options below, or the name of one of ours.")


@dataclass
class TrainArgs(RunArgs, TrainingArgs, DataArgs, ModelArgs, RecipeArgs):
    """All options of a run; each group stands beside the code that it steers."""


class TrainParser(HfArgumentParser, Parser):
    """Parse dataclasses, a group each, with the errors and the help of every other command."""

    def __init__(self):
        groups = (RecipeArgs, ModelArgs, DataArgs, TrainingArgs, RunArgs)
        script = Path(sys.argv[0]).name
        prog = script if script == "train_accelerate.py" else "minivlm train"
        super().__init__(groups, doc=DOC, formatter_class=HelpFormatter, prog=prog)


def parse_args(argv: list[str] | None = None) -> TrainArgs:
    """Return the options of `argv` (default: the command line), those of its recipe, and the defaults.

    Raises:
        SystemExit: code 2, after one line on the standard error that says what is wrong and what to do.
    """
    parser = TrainParser()
    try:
        name = parser.parse_known_args(argv)[0].recipe
        path = find_recipe(name) if name else None
        recipe = read_recipe(path) if path else {}
        parser.set_defaults(**recipe)  # argparse converts the string that YAML makes of `1e-5`
        args = TrainArgs(**vars(parser.parse_args(argv)))
        warn_unused(args, recipe)
        args = replace(args, recipe=str(path) if path else None, **read_mappings(args))
        check_options(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def read_recipe(path: Path) -> dict:
    """Return the options that a recipe sets; a mapping in the place of a list becomes `key=value` entries.

    Raises:
        ValueError: not YAML, an unknown key, or no list where one belongs.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    known = [f.name for f in fields(TrainArgs) if f.name != "recipe"]
    for key in values.keys() - set(known):
        near = get_close_matches(key, known, n=1)
        raise ValueError(f"{path}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "."))
    lists = [f.name for f in fields(TrainArgs) if f.default_factory is not MISSING]
    for name in values.keys() & lists:
        if isinstance(values[name], dict):  # learning_rates and min_rating read better as mappings
            values[name] = [f"{key}={value}" for key, value in values[name].items()]
        elif not isinstance(values[name], list):
            raise ValueError(f"{path}: {name}: {values[name]!r} is not a list. Write [{values[name]}].")
    return values


def warn_unused(args: TrainArgs, recipe: dict) -> None:
    """Print which parts of a new model the command line names beside `--model`, which has its own."""
    given = [name for name in PARTS_OF_NEW if getattr(args, name) not in (None, recipe.get(name))]
    if args.model and given:
        names = ", ".join(f"--{name} {getattr(args, name)}" for name in given)
        print(f"warning: {names} not used: --model {args.model} has its own. Leave one of the two out.")


def read_mappings(args: TrainArgs) -> dict[str, dict | None]:
    """Return, as mappings, the options that are written as text on the command line."""
    read = {}
    for name in ("model_config", "filter"):
        if isinstance(value := getattr(args, name), str):
            is_file = name == "model_config" and value.endswith(".json")
            read[name] = read_model_config(value) if is_file else read_mapping(name, value)
    read["min_rating"] = read_pairs("min_rating", args.min_rating, "relevance=3")
    read["learning_rates"] = read_pairs("learning_rates", args.learning_rates, "vision=1e-5")
    return read | {"lora": read_lora(args.lora) if args.lora else None}


def read_mapping(name: str, text: str) -> dict:
    """Return JSON or YAML text as a mapping."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name} {text}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'--{name} {text}: not a mapping. Write it as {{"key": "value"}}.')
    return value


def read_pairs(name: str, entries: list[str], example: str) -> dict[str, float]:
    """Return entries of the form name=number as a mapping."""
    try:
        return {key: float(value) for key, value in (text.split("=") for text in entries)}
    except ValueError:
        raise ValueError(f"--{name} {' '.join(entries)}: write a name and a number, as {example}.") from None


def check_options(args: TrainArgs) -> None:
    """Raise ValueError for the first option that cannot work, with value, limit and remedy."""
    for name, known in CHOICES.items():
        if (value := getattr(args, name)) not in known:
            known = [choice for choice in known if choice]
            near = get_close_matches(str(value), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{name} {value}: not known. Use {', '.join(known[:-1])} or {known[-1]}.{hint}")
    for name in COUNTS:
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be 1 or more.")
    for check in (check_model, check_data, check_training, check_run, check_together):
        check(args)


def check_together(args: TrainArgs) -> None:
    """Raise ValueError for options of different groups that exclude each other."""
    if args.streaming and not (args.max_steps or args.max_minutes):
        raise ValueError("--streaming: the data has no known length. Give --max_steps or --max_minutes.")
    if args.grounding_loss and not is_composed(args.data):
        raise ValueError("--grounding_loss needs --data compose:MODULE, whose samples say where a picture shows what.")
    if args.lora and (args.keep_best or args.push_every):
        raise ValueError("--lora saves its adapter at the end only: leave out --keep_best and --push_every.")
    tower_trains = any(selector.startswith("vision") for selector in args.train) or args.lora
    if args.feature_cache and (tower_trains or args.augment != "none" or args.streaming):
        raise ValueError(
            "--feature_cache keeps a frozen tower's features of pictures that never change, of data that is held. "
            "Use it with --train projector text, --augment none and without --streaming or --lora."
        )
