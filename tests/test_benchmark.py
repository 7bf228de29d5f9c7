"""The benchmark: sides do the same work on the same rows by turns, and the floor counts the products of the model."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minivlm.benchmark import training
from minivlm.benchmark.answering import answer_sides
from minivlm.benchmark.floors import products
from minivlm.benchmark.measure import alternate, machine, summarise
from minivlm.benchmark.memory import peak_bytes
from minivlm.benchmark.rows import IGNORE, draw_lengths, make_prompt, make_rows
from minivlm.benchmark.shapes import SHAPES, make_ours, read_shape
from minivlm.commands import benchmark
from minivlm.training.flops import FlopCounter

TINY = SHAPES["tiny"]


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = alternate(sides, 3)
    assert calls == ["a", "b"] * 4 and [len(times) for times in seconds.values()] == [3, 3]


def test_ratios_pair_the_times_of_a_round():
    """A machine that is three times as slow in one round changes no ratio."""
    seconds = {"a": [1.0, 3.0, 1.0], "b": [0.5, 1.5, 0.5]}
    a, b = summarise(seconds, 10, "a")
    assert (a["ratio"], b["ratio"], a["rate"], b["lowest"], b["highest"]) == (1, 2, 10, 10 / 1.5, 20)


def test_rows_have_the_mean_length_of_captions_and_instructions():
    shape = SHAPES["minimind-3v"]
    lengths = draw_lengths(shape, 200)
    assert sum(lengths) / 200 == pytest.approx((sum(shape.captions) + sum(shape.instructions)) / 4, abs=1)
    assert min(lengths) < 130 and max(lengths) > 450 and lengths == draw_lengths(shape, 200)
    rows = make_rows(TINY, draw_lengths(TINY, 6))
    image = TINY.config().image_seq_length
    for sample in rows.samples:
        ids, labels = sample["input_ids"], sample["labels"]
        assert (ids == 12).sum() == image == (ids[:image] == 12).sum()
        assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE]) and 0 < (labels != IGNORE).sum() < len(ids)
    assert make_prompt(TINY, 3)["input_ids"].shape == (3, image + TINY.prompt)


def test_all_of_our_sides_compute_the_same_gradients(monkeypatch):
    rows = make_rows(TINY, draw_lengths(TINY, 5))
    models = []
    monkeypatch.setattr(training, "make_ours", lambda shape: models.append(make_ours(shape)) or models[-1])
    for packing in ("padded", "sdpa", training.PACKED):
        training.our_step(TINY, rows, torch.float32, packing, compiled=False)()
    first, *others = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    assert any("projector" in name for name in first) and not any("vision_tower" in name for name in first)
    for other in others:
        assert other.keys() == first.keys()
        for name, grad in first.items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4)


def test_the_floor_has_the_products_that_the_trainer_counts():
    model = make_ours(TINY)
    needed = products(TINY, pictures=3, tokens=50, answers=20, training=True)
    assert 2 * sum(m * k * n * count for (m, k, n), count in needed.items()) == pytest.approx(
        FlopCounter(model)(tokens=50, pictures=3, answers=20), rel=0.01
    )
    decoding = products(TINY, pictures=0, tokens=8, answers=8, training=False)
    assert {m for m, _, _ in decoding} == {8} and isinstance(decoding, Counter)


def test_a_convolutional_tower_is_measured_without_llava_which_takes_none():
    vision = {"model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
              "layer_type": "basic"}  # fmt: skip
    shape = replace(TINY, vision=vision)
    sides = answer_sides(shape, 1, None, {}, ["fp32"])
    assert list(sides) == ["ours, fp32"] and "LLaVA + Qwen 3, fp32" in answer_sides(TINY, 1, None, {}, ["fp32"])
    sides["ours, fp32"](2)


def test_the_peak_of_memory_is_that_of_the_largest_sum_held_at_once():
    """Three tensors of 4 MB, of which two at a time, and one that stays."""
    stays = []

    def work():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        stays.append(second + 1)

    work()
    assert peak_bytes(work) == pytest.approx(8_000_000, abs=1000)  # a scalar beside them


def test_the_command_prints_tables_and_writes_all_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "compile_blocks", lambda model, device: None)
    threads = torch.get_num_threads()
    try:
        options = [
            "--shape",
            "tiny",
            "--rounds",
            "2",
            "--rows",
            "4",
            "--batch",
            "2",
            "--json",
            str(tmp_path / "a.json"),
        ]
        benchmark.main(options)
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    sides = ("ours, packed row by row, compiled", "floor, fp32", "ours by onnxruntime, int8")
    assert all(f"| {side} |" in out for side in sides) and "processor: " in out
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [table["unit"] for table in saved["tables"]] == ["rows/s", "bytes", "per second", "tokens/s"]
    memory = saved["tables"].pop(1)["sides"]
    assert all(len(times) == 2 for table in saved["tables"] for times in table["seconds"].values())
    assert 0 < memory["ours, packed row by row, compiled"] < memory["ours, padded to the longest"]
    assert saved["machine"] == machine() | {"threads": 1, "shape": "tiny", "rounds": 2}


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="neither minimind-3v nor tiny nor a folder"):
        read_shape(str(tmp_path))
    with pytest.raises(ValueError, match="has no model/model_vlm.py. Name a checkout"):
        training.minimind_v_step(str(tmp_path), TINY, SimpleNamespace())
    with pytest.raises(SystemExit):
        benchmark.parse_args(["speed"])
    assert "'speed' is no topic. Topics are training, memory, answers" in capsys.readouterr().err.replace(
        "speed is", "'speed' is"
    )
