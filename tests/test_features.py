"""Cached features train as the tower itself does, and are never taken for those of another tower or preprocessing."""

import json
import os
import pathlib

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train_accelerate
from helpers.data import row, write
from helpers.models import make_model, make_processor
from helpers.sources import run
from helpers.training import TINY, losses
from minivlm.data.encoder import BadRow, Encoder
from minivlm.data.features import FeatureCache
from minivlm.data.rows import load_rows

FROZEN = ("--train", "projector", "text", "--mixed_precision", "no", "--max_steps", "4")


def rows_with_a_bad_one():
    rows = [row(f"{i}?", "an answer", images=i % 3, seed=i % 5) for i in range(12)]
    return [*rows, {**row("q", "a"), "image_bytes": [b"damaged"]}]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_training_on_cached_features_is_training_with_the_tower(packing, tmp_path):
    source = write(tmp_path / "a.parquet", rows_with_a_bad_one())
    options = ["--data", source, *FROZEN, "--packing", packing, "--batch_size", "1", "--max_bad_rows", "1"]
    run(tmp_path / "plain", *options)
    for name in ("first", "again"):  # the second finds all features on disk
        run(tmp_path / name, *options, "--feature_cache", str(tmp_path / "cache"))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
        ours, theirs = (json.loads((tmp_path / n / "run.json").read_text())["bad_rows"] for n in (name, "plain"))
        assert ours == theirs
    final = train_accelerate.load_trained(tmp_path / "again" / "final")[0].state_dict()
    for key, value in train_accelerate.load_trained(tmp_path / "plain" / "final")[0].state_dict().items():
        torch.testing.assert_close(final[key], value, atol=1e-4, rtol=1e-4)


def test_each_picture_is_computed_once_and_in_its_own_place(tmp_path):
    rows = load_rows([write(tmp_path / "a.parquet", rows_with_a_bad_one())])
    model, encoder, accelerator = make_model(), Encoder(make_processor()), Accelerator(cpu=True)
    cache = FeatureCache(str(tmp_path / "cache"), model, encoder, torch.float32)
    cache.fill(rows, encoder, accelerator)
    pictures = {image for sample in list(rows.samples())[:12] for image in sample["images"]}
    assert len(cache.places) == len(pictures)
    for sample in list(rows.samples())[:12]:
        if sample["images"]:
            hidden = model.model.vision_tower(encoder(sample)["pixel_values"]).last_hidden_state[:, -4:]
            torch.testing.assert_close(cache(sample["images"])[:, 0], hidden)
    with pytest.raises(BadRow, match="unreadable picture"):
        cache([b"damaged"])


def test_a_file_is_replaced_where_the_system_renames_onto_none(tmp_path, monkeypatch):
    def rename(path, target):
        if os.path.exists(target):
            raise FileExistsError(f"[WinError 183] {target}")
        os.replace(path, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(pathlib.Path, "rename", rename)
    cache = FeatureCache(str(tmp_path), make_model(), Encoder(make_processor()), torch.float32)
    cache.folder.mkdir()
    for value in (1.0, 2.0):  # two runs that share a cache write the same number
        assert cache.write(7, [bytes(16)], [torch.full((1, 4, 16), value)]) == 8
    (file,) = cache.folder.glob("*")
    assert file.name == "000007.safetensors" and load_file(file)["features"].unique().tolist() == [2.0]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_shape_of_features_is_known_before_any_is_computed(strategy, tmp_path):
    model, encoder = make_model(vision_feature_select_strategy=strategy), Encoder(make_processor())
    cache = FeatureCache(str(tmp_path / "cache"), model, encoder, torch.float32)
    pixels = encoder.blank()["pixel_values"]
    assert cache.encode(pixels, Accelerator(cpu=True)).shape[1:] == cache.shape
    with_cache = encoder.with_features(cache)
    assert with_cache.blank()["pixel_values"].shape == (1, 1, *cache.shape)
    assert torch.equal(encoder.blank()["pixel_values"], pixels)  # the encoder itself still gives pixel values


def test_another_tower_or_preprocessing_has_another_cache(tmp_path):
    def folder(model, encoder, dtype=torch.float32):
        return FeatureCache(str(tmp_path), model, encoder, dtype).folder

    model, encoder = make_model(), Encoder(make_processor())
    known = folder(model, encoder)
    assert folder(make_model(), Encoder(make_processor())) == known
    assert folder(model, encoder, torch.bfloat16) != known
    other = make_processor()
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert folder(model, Encoder(other)) != known
    next(model.model.vision_tower.parameters()).data[0] += 1
    assert folder(model, encoder) != known


@pytest.mark.parametrize("options", [["--train", "vision"], ["--train", "text", "--augment", "mild"]])
def test_what_would_change_the_features_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        train_accelerate.parse_args(["--feature_cache", "x", *options])
    assert "--feature_cache keeps a frozen tower's features" in capsys.readouterr().err


def test_a_full_disk_is_told_before_work_is_lost(tmp_path, monkeypatch):
    rows = load_rows([write(tmp_path / "a.parquet", rows_with_a_bad_one())])
    encoder = Encoder(make_processor())
    cache = FeatureCache(str(tmp_path / "cache"), make_model(), encoder, torch.float32)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="The features need .* free. Name a folder on another disk"):
        cache.fill(rows, encoder, Accelerator(cpu=True))


def test_a_model_that_learns_from_cached_features_is_evaluated_and_kept_whole(data, tmp_path):
    """The tower is away while its features are cached, but what answers and what is saved has it."""
    options = [*TINY, "--data", data, "--batch_size", "8", "--train", "projector", "text", "--max_steps", "2"]
    options += ["--feature_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    train_accelerate.main([*options, "--eval_data", data, "--eval_every", "1", "--keep_best", "loss"])
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    model, processor = train_accelerate.load_trained(tmp_path / "run" / "best")
    again = train_accelerate.evaluate(model, processor, train_accelerate.load_rows([data]))
    assert again["scores"]["loss"] == pytest.approx(report["best"], abs=1e-3)
