"""Time TRL's training on padded and on packed rows: `examples/sft_trl.py` beside `examples/sft_trl_packed.py`.

    OMP_NUM_THREADS=1 python -m tools.trl_speed

Each row is a conversation about a picture of `--data`, with a random number of its questions, so lengths are unequal.
Both examples train on the same rows for one epoch, by turns. With one thread the clock counts CPU seconds.
"""

import json
import random
import runpy
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from minivlm.benchmark.measure import alternate, machine, summarise
from minivlm.cli import Parser, run_command
from minivlm.data.rows import Rows, load_rows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MOST = 8  # questions in a conversation


def conversations(rows: Rows, count: int, seed: int) -> list[dict]:
    """Return conversations about `count` pictures; those of one picture stand one after another in `rows`."""
    rng, found = random.Random(seed), []
    groups = [list(group) for _, group in groupby(range(len(rows)), rows["image_bytes"].__getitem__)]
    if len(groups) < count:
        raise ValueError(f"The data has {len(groups)} pictures, fewer than --rows {count}.")
    for group in rng.sample(groups, count):
        turns = []
        for index in group[: rng.randint(1, min(len(group), MOST))]:
            question, answer = json.loads(rows[index]["conversations"])
            content = question["content"].replace("<image>\n", "" if turns else "<image>\n")
            turns += [{**question, "content": content}, answer]
        found.append({"conversations": json.dumps(turns), "image_bytes": rows[group[0]]["image_bytes"]})
    return found


def train(example: str, options: list[str]):
    """Run an example; return its trainer."""
    return runpy.run_path(str(EXAMPLES / example))["main"](options)


def main(argv: list[str] | None = None) -> None:
    """Print rows and tokens per second of both examples."""
    parser = Parser(__doc__, prog="python -m tools.trl_speed")
    parser.add_argument("--model", default=".", help="Folder of the model.")
    parser.add_argument("--data", default="data/train.parquet", help="Rows in MiniMind-V's columns.")
    parser.add_argument("--rows", type=int, default=48, help="Conversations to train on.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows of a padded batch.")
    parser.add_argument("--pack_tokens", type=int, default=2048, help="Most tokens in a pack.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of each side.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the conversations.")
    args = parser.parse_args(argv)
    rows = conversations(load_rows([args.data]), args.rows, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "rows.parquet"))
        pq.write_table(pa.Table.from_pylist(rows), data)
        base = ["--model", args.model, "--data", data, "--output_dir", str(Path(folder, "out"))]
        steps = str(-(-args.rows // args.batch_size))
        padded = train("sft_trl.py", [*base, "--max_steps", steps, "--batch_size", str(args.batch_size)])
        packed = train("sft_trl_packed.py", [*base, "--max_steps", "-1", "--pack_tokens", str(args.pack_tokens)])
        tokens = [sum(batch["input_ids"].numel() for batch in t.get_train_dataloader()) for t in (padded, packed)]
        seconds = alternate({"padded": padded.train, "packed": packed.train}, args.rounds)
    print(
        f"{args.rows} rows, {tokens[1] / args.rows:.0f} tokens each; {1 - tokens[1] / tokens[0]:.1%} of padded batches"
    )
    print(f"is padding. {steps} padded steps, {packed.state.max_steps} packed ones. {machine()}")
    for side in summarise(seconds, args.rows, "padded"):
        rate, low, high = (side[name] for name in ("rate", "lowest", "highest"))
        print(f"{side['side']}: {rate:.2f} rows/s ({low:.2f} to {high:.2f}), {rate * tokens[1] / args.rows:.0f} "
              f"tokens/s, ratio {side['ratio']:.2f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
