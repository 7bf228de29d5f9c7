"""Count what a run has done: steps, tokens, rows, bad rows."""

import json
import math
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from minivlm.data.bad_rows import BY_CHOICE, describe_bad_rows
from minivlm.data.encoder import IGNORE
from minivlm.training.options import TrainArgs

# Options that decide which rows a step holds: a run cannot go on with other ones.
ORDER = ("data", "filter", "min_rating", "max_rows", "max_length", "too_long", "share_pictures", "streaming", "mix")
ORDER += ("packing", "pack_tokens", "pack_pictures", "augment", "batch_size", "seed")


@dataclass
class State:
    """Counts that a checkpoint restores beside weights and optimizer; the order of the data follows from `step`."""

    step: int = 0
    tokens: int = 0  # without padding
    rows: int = 0
    seconds: float = 0.0
    bad_rows: Counter = field(default_factory=Counter)
    bad_sources: Counter = field(default_factory=Counter)
    best: float | None = None  # best value so far of the metric keep_best
    worse: int = 0  # evaluations since then
    processes: int = 1
    order: str = ""  # the options of ORDER, as JSON

    def improve(self, value: float, better) -> bool:
        """Note an evaluation of the metric keep_best; return whether it is the best so far.

        Args:
            better: `min` or `max`.
        """
        improved = self.best is None or better(value, self.best) != self.best
        self.best, self.worse = (value, 0) if improved else (self.best, self.worse + 1)
        return improved

    def state_dict(self) -> dict:
        return {**asdict(self), "bad_rows": dict(self.bad_rows), "bad_sources": dict(self.bad_sources)}

    def load_state_dict(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)


def order_options(args: TrainArgs) -> str:
    """Return the options of ORDER as JSON, to compare them with those of a checkpoint."""
    return json.dumps({name: getattr(args, name) for name in ORDER}, sort_keys=True)


def count_totals(accelerator: Accelerator, group: list[dict], stop: bool) -> dict[str, int]:
    """Return the sums of a step over all ranks and micro-batches, in one reduction.

    `row_checksum` sums checksums of the rows' places: the same rows give the same sum, whatever the number of ranks.
    """
    own = {"answers": sum(int((batch["shift_labels"] != IGNORE).sum()) for batch in group)}
    own["tokens"] = sum(batch["tokens"] for batch in group)
    own["padding"] = sum(batch["input_ids"].numel() for batch in group) - own["tokens"]
    own["pictures"] = sum(len(batch["pixel_values"]) for batch in group if "pixel_values" in batch)
    own["rows"] = sum(len(batch["places"]) for batch in group)
    own["row_checksum"] = sum(zlib.crc32(place.encode()) for batch in group for place in batch["places"])
    own["stop"] = int(stop)
    sums = accelerator.reduce(torch.tensor(list(own.values()), device=accelerator.device), "sum")
    return dict(zip(own, sums.tolist()))


def count_bad_rows(state: State, bad_rows: list[tuple[str, str]], limit: float, read: int) -> None:
    """Count rows that were left out, each as (file and row, reason).

    Args:
        limit: share of the `read` rows that may be bad.

    Raises:
        ValueError: more rows are bad; the message names the kinds and the worst files.
    """
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


def check_finite(value: float, group: list[dict], args: TrainArgs, step: int, rank: int) -> None:
    """Stop before the optimizer spoils the weights, and list the rows of the step in a file.

    Raises:
        FloatingPointError: `value`, the loss or its gradient norm, is not finite.
    """
    if math.isfinite(value):
        return
    path = Path(args.output_dir) / f"nonfinite-step{step}-rank{rank}.json"
    path.write_text(json.dumps({"step": step, "rows": [row for batch in group for row in batch["places"]]}, indent=1))
    raise FloatingPointError(
        f"The loss or its gradient is {value} at step {step}; its rows are listed in {path}. Look at them with "
        f"minivlm preview, lower --learning_rate ({args.learning_rate}), or use --mixed_precision no. Weights and "
        f"the newest checkpoint in {args.output_dir} are as they were before this step."
    )
