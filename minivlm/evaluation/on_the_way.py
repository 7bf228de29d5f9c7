"""Evaluate a model while it trains: rows are shared out over the ranks, the first answers are drawn."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from minivlm.data.rows import Rows
from minivlm.evaluation.contact_sheet import contact_sheet
from minivlm.evaluation.scoring import prompts, score_rows, summarise


def score_on_all_ranks(model, processor, rows: Rows, accelerator: Accelerator) -> dict:
    """Return the metrics of all rows, as `summarise` does; each rank answers its share of them."""
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    # Compiled blocks would be compiled anew for every length of an answer.
    with torch.compiler.set_stance("force_eager"), accelerator.autocast():
        results = score_rows(model, processor, rows.select(mine), quiet=not accelerator.is_main_process)
    for result, row in zip(results, mine):
        result["row"] = row
    return summarise(sorted(gather_object(results), key=lambda result: result["row"]))


def sample_sheet(rows: Rows, processor, metrics: dict, count: int) -> Image.Image | None:
    """Draw the first `count` rows that have a picture, with the answers in `metrics`; None if there are none."""
    items = prompts(rows.select(range(min(4 * count, len(rows)))), processor) if count else []
    pictured = [(i, item) for i, item in enumerate(items) if item["images"]][:count]
    outputs = [metrics["answers"][i]["output"] for i, _ in pictured]
    return contact_sheet([item for _, item in pictured], outputs) if pictured else None
