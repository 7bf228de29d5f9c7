"""Test the training of the eyes: pictures, optimizer, and a resumed run that equals an uninterrupted one."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("resvg_py")

from transformers import AutoModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tools.emoji import composer, drawings, eyes_measure, eyes_train, prepare
from tools.emoji.augment import augment, grow, on_white
from tools.emoji.drawings import Drawings
from tools.emoji.eyes import Eyes, build_tower, load
from tools.emoji.eyes_measure import measure, read_pictures


def pixels(count: int) -> torch.Tensor:
    """Return `count` drawings of 48 x 60 opaque pixels in the middle of 96 x 96."""
    x = torch.zeros(count, 4, 96, 96, dtype=torch.uint8)
    x[:, :3, 18:78, 24:72] = torch.arange(count)[:, None, None, None].byte() * 9
    x[:, 3, 18:78, 24:72] = 255
    return x


@pytest.mark.parametrize("size", (64, 128))
def test_without_strength_a_picture_is_the_drawing_on_white(size):
    x = augment(pixels(20), torch.zeros(20, dtype=torch.bool), size, 0.0, eyes_train.generator(0))
    white = on_white(pixels(20), size)
    assert x.shape == white.shape == (20, 3, size, size)
    assert (x - white).abs().mean() < 0.02 and x[:, :, 0, 0].min() > 0.99


def test_a_picture_follows_from_its_generator_and_grows_wilder_with_strength():
    mono = torch.zeros(20, dtype=torch.bool)
    pictures = [augment(pixels(20), mono, 64, k, eyes_train.generator(0, 5)) for k in (1.0, 1.0, 0.25)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    other = augment(pixels(20), mono, 64, 1.0, eyes_train.generator(0, 6))
    assert not torch.equal(pictures[0], other) and 0 <= other.min() and other.max() <= 1
    wild, mild = ((x - on_white(pixels(20), 64)).abs().mean() for x in (pictures[0], pictures[2]))
    assert wild > 1.5 * mild


def test_drawings_of_one_colour_get_a_fill_and_others_keep_theirs():
    same = pixels(2)[1:].expand(20, 4, 96, 96)
    fills = augment(same, torch.ones(20, dtype=torch.bool), 64, 0.0, eyes_train.generator(1))[:, :, 32, 32]
    kept = augment(pixels(20), torch.zeros(20, dtype=torch.bool), 64, 0.0, eyes_train.generator(1))[:, :, 32, 32]
    assert len({tuple(fill.tolist()) for fill in fills}) == 20
    torch.testing.assert_close(kept, (torch.arange(20) * 9 / 255)[:, None].expand(20, 3), atol=0.01, rtol=0)


def test_growing_is_a_greatest_value_pooling():
    x = torch.rand(2, 1, 9, 9)
    for steps in (1, 2):
        torch.testing.assert_close(grow(x, steps), F.max_pool2d(x, 2 * steps + 1, 1, steps))


def test_a_vit_shown_all_patches_by_number_sees_the_same_and_shown_half_sees_those():
    eyes = Eyes(build_tower("clip", 64, 1), 5).eval()
    x = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        whole = eyes.look(x)
        torch.testing.assert_close(eyes.look(x, torch.arange(64)), whole)
        assert eyes.look(x, torch.arange(0, 64, 2)).shape == (2, 32, 64)
        torch.testing.assert_close(whole, eyes.tower(eyes_input(x)).last_hidden_state[:, 1:])


def eyes_input(x):
    """Return pictures in [0, 1] normalized as the tower expects."""
    return (x - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that trains on forty drawings; each step takes one second of a fake clock."""
    styles = np.array(["noto"] * 20 + ["symbola"] * 20 + ["fxemoji"] * 20)
    concepts = np.array([f"thing{i % 20:02}" for i in range(60)])
    Drawings(pixels(60).numpy(), styles, concepts).save(tmp_path / "drawings.npz")
    clock = iter(range(10**6))
    monkeypatch.setattr(eyes_train.time, "process_time", lambda: next(clock))

    def run(name: str, *options: str):
        arguments = ["--drawings", tmp_path / "drawings.npz", "--output", tmp_path / name, "--batch", 8, *options]
        eyes_train.main([str(argument) for argument in arguments])
        return tmp_path / name

    return run


def test_measuring_reads_each_named_picture_once_and_keeps_to_the_allowed_names(tmp_path):
    names, pictures = ["ant", "bat", "cow", "dog", "eel", "fox"], []
    for number in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (50, 40), (40 * number, 0, 0)).save(buffer, "WEBP", lossless=True)
        pictures.append(buffer.getvalue())
    rows = [(p, task, name) for p, name in zip(pictures, names) for task in ("name", "name", "category")]
    columns = dict(zip(("image_bytes", "task", "concept"), map(list, zip(*rows, (pictures[0], "count", "ant,bat")))))
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    pixels, concepts = read_pictures(tmp_path / "x.parquet")
    assert concepts == names and pixels.shape == (6, 3, 128, 128)

    class Fixed(torch.nn.Module):
        def forward(self, x):  # prefers "fox"; its second choice follows the red channel
            level = (x[:, 0].mean((1, 2)) * 255 / 40).round().long()
            return F.one_hot(level, 6) + 2.0 * F.one_hot(torch.full_like(level, 5), 6)

    assert measure(Fixed(), names, pixels, concepts)["right"] == pytest.approx(1 / 6)
    assert measure(Fixed(), names, pixels[:5], concepts[:5], among=set(names[:5]))["right"] == 1


@pytest.mark.parametrize("command", (composer, drawings, eyes_measure, eyes_train, prepare))
def test_a_misspelt_option_is_reported_in_one_line(command, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--pakages", "x"])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and "unknown arguments: --pakages" in lines[0]


RESNET = ("--tower", "resnet", "--width", 4, "--minutes", 0.2, "--measure_every", 0.1)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run):
    whole, stopped = run("whole", *RESNET), run("stopped", *RESNET, "--stop_after", 0.05)
    assert not (stopped / "model.safetensors").exists()
    assert run("stopped", *RESNET) == stopped
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and lines[-1]["minutes"] == 0.2
    (first, concepts), (second, _) = load(whole), load(stopped)
    assert concepts == sorted(f"thing{i:02}" for i in range(20))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_files_of_the_data_set_are_enough_to_learn_from(run, tmp_path):
    run("first", *RESNET)  # the fixture `run` has written drawings.npz
    Drawings.load(tmp_path / "drawings.npz").of(["noto", "symbola"]).pack(tmp_path / "drawings.parquet")
    with pytest.raises(ValueError, match="--dev data/dev.parquet"):
        run("second", *RESNET, "--drawings", tmp_path / "drawings.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "red").save(buffer, "WEBP")
    rows = {"image_bytes": [buffer.getvalue()], "task": ["name"], "concept": ["thing05"]}
    pq.write_table(pa.table(rows), tmp_path / "dev.parquet")
    folder = run("second", *RESNET, "--drawings", tmp_path / "drawings.parquet", "--dev", tmp_path / "dev.parquet")
    assert all(json.loads(line)["dev"] in (0, 1) for line in (folder / "log.jsonl").read_text().splitlines())


def test_a_pupil_learns_the_features_of_its_teacher(run):
    teacher = run("teacher", *RESNET)
    clip = ("--tower", "clip", "--width", 64, "--depth", 1, "--teacher", teacher, "--minutes", 0.5, "--lr", 1e-2)
    folder = run("pupil", *clip, "--patches", 32, "--names_from", 2)  # no loss on names: only the features count
    tower = AutoModel.from_pretrained(folder)
    assert tower.config.model_type == "clip_vision_model" and tower.config.patch_size == 16
    losses = []
    for name in ("pupil", "again"):
        args = eyes_train.parse_args([str(a) for a in (*clip, "--names_from", 2, "--batch", 8, "--output", name)])
        args.drawings = folder.parent / "drawings.npz"
        pupil = eyes_train.Run(args)
        if name == "pupil":
            pupil.args.output = folder
            pupil.load_state()
        pupil.seconds = 0.0
        losses.append(pupil.train_step()["loss"])
    assert losses[0] < 0.8 * losses[1]
