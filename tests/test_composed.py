"""Rows that a module composes during training: a batch follows from seed and step, and nothing is lost in silence."""

import json

import pytest
import torch

from helpers.composer import Composer
from helpers.data import ENCODER
from helpers.training import losses, run
from minivlm.data.collators import PaddingCollator
from minivlm.data.composed import load_composer
from minivlm.data.loader import make_loader
from minivlm.data.options import DataArgs, check_data

NAME = "compose:helpers.composer"


def places(rank: int, world_size: int, workers: int = 0, start_step: int = 0, steps: int = 7) -> list[set]:
    """Return the questions of each step of one rank."""
    args = DataArgs(data=[NAME], batch_size=4, micro_batch_size=2, share_pictures=3, workers=workers, seed=5)
    share = {"rank": rank, "world_size": world_size, "start_step": start_step}
    batches = make_loader(load_composer(NAME, 5), ENCODER, PaddingCollator(0), args, **share)
    loader = iter(batches)
    return [{p for _ in range(batches.accumulation) for p in next(loader)["places"]} for _ in range(steps)]


def test_a_step_has_the_same_questions_for_any_number_of_ranks_and_workers():
    alone = places(0, 1)
    assert alone == places(0, 1, workers=2)
    assert alone == [a | b for a, b in zip(places(0, 2), places(1, 2))]
    assert alone[3:] == places(0, 1, start_step=3, steps=4)
    # 10 pictures fill two batches of 4 in each epoch, and each picture brings three questions.
    assert [len(step) for step in alone[2:]] == [12] * 5
    assert len(alone[0] | alone[1]) in (23, 24) and not alone[0] & alone[2]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = ("--share_pictures", "2", "--batch_size", "4", "--max_steps", "6", "--save_every", "3")
    options += ("--max_bad_rows", "1")
    run(NAME, tmp_path / "run", *options)
    whole = losses(tmp_path / "run")
    assert len(set(whole)) == 6
    (tmp_path / "run" / "log.jsonl").unlink()
    run(NAME, tmp_path / "run", *options, "--workers", "2")
    assert losses(tmp_path / "run") == whole[3:]


def test_a_sample_that_cannot_be_used_is_counted(tmp_path):
    options = ("--share_pictures", "3", "--batch_size", "10", "--max_steps", "2", "--max_bad_rows", "1")
    run(NAME, tmp_path / "run", *options)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["bad_rows"] == {"picture markers and pictures differ in number": 1} and record["rows"] == 59


def test_questions_about_a_picture_share_its_tokens():
    args = DataArgs(data=[NAME], batch_size=1, micro_batch_size=1, share_pictures=3, workers=0, seed=5)
    batch = next(iter(make_loader(Composer(5), ENCODER, PaddingCollator(0), args)))
    pictures = (batch["input_ids"] == ENCODER.processor.image_token_id).sum()
    assert pictures == ENCODER.processor.image_seq_length and len(batch["places"]) == 3
    assert torch.equal(batch["attention_mask"][0, 0].diagonal(), torch.zeros(batch["input_ids"].shape[1]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": [NAME, "a.parquet"]}, "cannot be mixed with others"),
        ({"packing": True}, "--packing does not go with --data compose:helpers.composer"),
        ({"max_rows": 3}, "--max_rows does not go"),
        ({"augment": "mild"}, "--augment mild does not go"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_data(DataArgs(**{"data": [NAME], **options}))


@pytest.mark.parametrize("name, message", [("no.such", "No module named 'no'"), ("helpers.data", "has no function")])
def test_a_module_that_composes_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_composer(f"compose:{name}", 0)
