"""Options of what a run leaves: folder, checkpoints, log, evaluations, and the model on the Hub."""

import importlib.util
from argparse import Namespace
from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from minivlm.cli import option

TRACKERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow", "comet_ml", "clearml", "dvclive", "aim")
METRICS = {"loss": min, "match": max, "ranked": max}  # metric of keep_best -> the better one of two values


@dataclass
class RunArgs:
    """Choose what the run writes, evaluates and publishes."""

    _argument_group_name = "run"

    output_dir: str = option("runs/train", "Folder for checkpoints, the log and the final model.")
    resume: str = option("auto", "auto: go on from output_dir's newest complete checkpoint; never; or a checkpoint.")
    save_every: int = option(500, "Optimizer steps between checkpoints.")
    log_every: int = option(10, "Optimizer steps between lines of the log.")
    trackers: list[str] = option([], f"Where to log, besides log.jsonl: {', '.join(TRACKERS)}.")
    eval_data: list[str] = option([], "Data to answer, named as for data; loss and exact match are reported.")
    eval_limit: int = option(2000, "Rows of eval_data to answer.")
    eval_every: int | None = option(None, "Optimizer steps between evaluations. Left out: only at the end.")
    keep_best: str = option("", "Also keep the best model so far, in best/, by loss, match or ranked on eval_data.")
    patience: int | None = option(None, "Stop after so many evaluations in a row without a better keep_best.")
    samples: int = option(8, "Pictures of eval_data whose answers are drawn at each evaluation.")
    push_to_hub: str | None = option(None, "Hub repository, as jinv2/minivlm, to upload the result to.")
    push_every: int | None = option(None, "Upload in the background at every so many-th checkpoint, too.")
    hub_private: bool = option(False, "Create the Hub repository as a private one.")
    run_name: str | None = option(None, "Name of the run, its tag on the Hub and in trackers. Default: output_dir's.")


def check_run(args: RunArgs | Namespace) -> None:
    """Raise ValueError for options that need another one, a package, or a login."""
    for name in args.trackers:
        if name not in TRACKERS:
            raise ValueError(f"--trackers {name}: not known. Use {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None and not (
            name == "tensorboard" and importlib.util.find_spec("tensorboardX")
        ):
            raise ValueError(f"--trackers {name}: the package is not installed. Install it: pip install {name}")
    for name in ("eval_every", "keep_best"):
        if getattr(args, name) and not args.eval_data:
            raise ValueError(f"--{name} needs --eval_data to look at.")
    if args.keep_best and not args.eval_every:
        raise ValueError("--keep_best compares evaluations: give --eval_every.")
    if args.patience and not args.keep_best:
        raise ValueError("--patience needs --keep_best, to know what is better.")
    if args.push_every and not args.push_to_hub:
        raise ValueError("--push_every needs --push_to_hub, to know where to.")
    if args.push_to_hub:
        check_hub(args.push_to_hub)


def check_hub(repo_id: str) -> None:
    """Raise ValueError if `repo_id` is no owner/name, or nobody is logged in."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {repo_id}: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"--push_to_hub {repo_id}: write owner/name, as jinv2/minivlm.")
    if get_token() is None:
        raise ValueError("--push_to_hub: nobody is logged in. Run `hf auth login` with a token that may write.")
