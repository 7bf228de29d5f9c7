"""Turn rows of the embedded data into what lm-eval asks and scores; minivlm_emoji.yaml names these functions."""

import json

from minivlm.data.pictures import decode_image
from minivlm.evaluation.scoring import is_right

TASKS = ("name", "choice")  # one short right answer each


def keep_scored(rows):
    """Return the rows of a data set whose task is scored here, in their order."""
    return rows.select([i for i, task in enumerate(rows["task"]) if task in TASKS])


def turns(row):
    """Return the texts of a row's conversation."""
    return [turn["content"] for turn in json.loads(row["conversations"])]


def question(row):
    """Return the question; `<image>` in it is also lm-eval's mark for a picture."""
    return turns(row)[0]


def answer(row):
    """Return the reference."""
    return turns(row)[-1]


def pictures(row):
    """Return the row's picture, in a list as lm-eval wants it."""
    return [decode_image(row["image_bytes"])]


def score(row, outputs):
    """Return 1 or 0 for the answer as `minivlm evaluate` counts it, under two names: for all rows and for its kind."""
    right = float(is_right({"task": row["task"], "answer": answer(row)}, outputs[0]))
    return {"exact_match": right, f"{row['task']}_{row['language']}": right}
