"""Packs: full, within both budgets, each row once, the same for every number of ranks, and trained on as rows are."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_accelerate
from helpers.data import ENCODER, loss_of, row, write
from helpers.models import make_model
from helpers.training import TINY, losses
from minivlm.data.collators import PackingCollator
from minivlm.data.dataset import TrainingRows
from minivlm.data.loader import choose_rows, make_plan
from minivlm.data.plans import GlobalBatchSampler, PackBudget, PackedPlan, draw_by_weight, measure, pack
from minivlm.data.rows import load_rows
from tools.packing_efficiency import lengths

ROWS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 4)), max_size=200)


@given(ROWS, st.integers(100, 300), st.integers(4, 9), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_pack_and_no_pack_is_over_a_budget(rows, max_tokens, max_pictures, look_ahead):
    packs = list(pack([(i, *r) for i, r in enumerate(rows)], PackBudget(max_tokens, max_pictures), look_ahead))
    assert sorted(i for keys in packs for i in keys) == list(range(len(rows)))
    for keys in packs:
        assert sum(rows[i][0] for i in keys) <= max_tokens and sum(rows[i][1] for i in keys) <= max_pictures


@given(ROWS, st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_a_row_waits_no_longer_than_the_look_ahead(rows, look_ahead):
    """A stream can be packed: what is drawn lies at most `look_ahead` rows behind what is read."""
    read = 0

    def stream():
        nonlocal read
        for i, r in enumerate(rows):
            read = i + 1
            yield i, *r

    packed = 0
    for keys in pack(stream(), PackBudget(100, 4), look_ahead):
        packed += len(keys)
        assert read - packed < look_ahead


def test_packs_leave_less_than_three_percent_empty():
    tokens, pictures = lengths(20_000, seed=1)
    for budget, least in ((2048, 0.97), (4096, 0.97), (8192, 0.97)):
        packs = pack(zip(range(20_000), tokens, pictures), PackBudget(budget, budget))
        filled = [sum(tokens[i] for i in keys) for keys in packs]
        assert np.mean(filled) / budget > least, budget


def test_a_row_that_fits_into_no_pack_is_named():
    with pytest.raises(
        ValueError, match="Row 7 has 30 tokens and 5 pictures, more than a pack of 40 tokens and 4 pic"
    ):
        list(pack([(7, 30, 5)], PackBudget(40, 4)))


def steps_of(world_size, micro, steps, start=0):
    tokens, pictures = lengths(300, seed=3)
    plan = PackedPlan(tokens, pictures, 4, PackBudget(1024, 8), seed=5)
    ranks = [iter(GlobalBatchSampler(plan, micro, rank, world_size, start)) for rank in range(world_size)]
    accumulation = GlobalBatchSampler(plan, micro, 0, world_size).accumulation
    return [
        sorted(key for sampler in ranks for _ in range(accumulation) for key in next(sampler)) for _ in range(steps)
    ]


def test_packs_do_not_depend_on_ranks_micro_batches_or_restarts():
    whole = steps_of(1, 4, 60)
    assert whole == steps_of(2, 1, 60) == steps_of(4, 1, 60)
    assert whole[37:] == steps_of(2, 2, 23, start=37)
    first = [i for step in whole for epoch, keys in step for i in keys if epoch == 0]
    assert len(first) == len(set(first)) > 270 and {epoch for step in whole for epoch, _ in step} >= {0, 1, 2}
    second = [sorted(keys) for step in whole for epoch, keys in step if epoch == 1]
    assert second != [sorted(keys) for step in whole for epoch, keys in step if epoch == 0][: len(second)]


@pytest.fixture
def mixed(tmp_path):
    """Rows of many lengths, with 0 to 2 pictures, and a bad one."""
    rng = random.Random(0)
    rows = [
        row("word " * rng.randint(1, 60), "answer " * rng.randint(1, 20), images=rng.choice([0, 1, 1, 2]), seed=i)
        for i in range(40)
    ]
    rows[7] = {**row(), "image_bytes": [b"damaged"]}
    return write(tmp_path / "mixed.parquet", rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_measured_lengths_are_those_that_training_sees(mixed, workers):
    rows = load_rows([mixed])
    tokens, pictures = measure(rows, ENCODER, workers, quiet=True)
    for i in set(range(40)) - {7}:
        sample = ENCODER(rows.sample(i))
        assert (tokens[i], pictures[i]) == (len(sample["input_ids"]), len(sample["pixel_values"]))


def test_a_packed_batch_has_loss_and_gradients_of_its_rows_alone(mixed):
    rows = load_rows([mixed])
    plan = PackedPlan(*measure(rows, ENCODER, quiet=True), 1, PackBudget(512, 8), seed=1)
    data = TrainingRows(rows, ENCODER, packed=True)
    model = make_model(text={"vocab_size": 6400})
    for keys in plan.packs(0)[:3]:
        samples = data[0, keys]
        answers = sum(int((s["labels"][1:] != -100).sum()) for s in samples)
        together = loss_of(model, PackingCollator()([samples]), answers)
        alone = sum(loss_of(model, PackingCollator()([[s]]), answers) for s in samples)
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
        grads = []
        for batches in ([[samples]], [[[s]] for s in samples]):
            model.zero_grad()
            for batch in batches:
                batch = {k: v for k, v in PackingCollator()(batch).items() if isinstance(v, torch.Tensor)}
                loss = model(
                    **batch, labels=batch["shift_labels"], use_cache=False, num_items_in_batch=torch.tensor(answers)
                ).loss
                loss.backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        for name, gradient in grads[0].items():
            assert (gradient - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm() + 1e-6, name


def test_training_on_packs_counts_bad_rows_and_resumes_exactly(mixed, tmp_path):
    options = [*TINY, "--data", mixed, "--packing", "true", "--pack_tokens", "512", "--max_length", "512"]
    options += ["--batch_size", "2", "--micro_batch_size", "1", "--max_bad_rows", "0.5", "--epochs", "2"]
    options += ["--workers", "2", "--save_every", "4", "--output_dir", str(tmp_path)]
    train_accelerate.main(options)
    assert '"unreadable picture": 2' in (tmp_path / "run.json").read_text()  # once an epoch
    whole = losses(tmp_path)
    assert len(whole) > 5
    (tmp_path / "log.jsonl").unlink()
    train_accelerate.main([*options, "--workers", "0"])
    assert losses(tmp_path) == whole[4:]


@pytest.mark.parametrize(("mix", "counts"), [([1, 1], [50, 50]), ([3, 1], [75, 25]), ([1, 99], [1, 99])])
def test_a_mix_is_the_shares_of_the_sources(mix, counts):
    """Ten rows of one source and ninety of another, repeated or sampled as evenly as can be, others each epoch."""
    sources = [0] * 10 + [1] * 90
    orders = [draw_by_weight(sources, mix, random.Random(seed)) for seed in range(2)]
    assert orders[0] != orders[1] and orders[0] == draw_by_weight(sources, mix, random.Random(0))
    for order in orders:
        drawn = Counter(order)
        assert [sum(drawn[i] for i in range(100) if sources[i] == s) for s in (0, 1)] == counts
        for source, count in enumerate(counts):
            times = [drawn[i] for i in range(100) if sources[i] == source]
            assert max(times) - min(times) <= 1 and sum(times) == count
    with pytest.raises(ValueError, match="source 3 of --data has no rows left"):
        draw_by_weight(sources, [1, 1, 1], random.Random(0))


def test_a_mix_reaches_the_batches_of_training(tmp_path):
    (tmp_path / "many").mkdir()
    few = write(tmp_path / "few.parquet", [row("few")] * 4)
    write(tmp_path / "many" / "a.parquet", [row("many")] * 20)
    write(tmp_path / "many" / "b.parquet", [row("many")] * 16)
    for packing in ("true", "false"):
        options = ["--data", few, str(tmp_path / "many"), "--mix", "1", "1", "--batch_size", "1"]
        args = train_accelerate.parse_args([*options, "--packing", packing, "--pack_tokens", "1024", "--workers", "0"])
        rows = choose_rows(args)
        plan = make_plan(rows, ENCODER, args, quiet=True)
        drawn = Counter(rows.source_number(index) for batch in plan.batches(0) for unit in batch for index in unit)
        assert drawn == {0: 20, 1: 20}


def test_tokens_are_counted_without_padding(tmp_path):
    """Rows of two lengths side by side: the log tells the tokens of the rows, and how many were computed in vain."""
    data = write(tmp_path / "rows.parquet", [row("word " * (1 + 40 * (i % 2)), seed=i) for i in range(16)])
    lengths = [len(ENCODER(load_rows([data]).sample(i))["input_ids"]) for i in range(16)]
    options = [*TINY, "--data", data, "--max_steps", "1"]
    for packing, size, padding in (("true", "1", 0.0), ("false", "16", 1 - sum(lengths) / 16 / max(lengths))):
        folder = tmp_path / packing
        train_accelerate.main([*options, "--packing", packing, "--batch_size", size, "--output_dir", str(folder)])
        assert losses(folder, "padding") == [pytest.approx(padding, abs=1e-4)]
        assert json.loads((folder / "run.json").read_text())["tokens"] == sum(lengths)
