"""Scenes of the eyes' training, and the alignment of their features with the words of the names."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("resvg_py")

from helpers.models import TEXT
from minivlm.model.loading import load_processor, load_trained
from tools.emoji import align
from tools.emoji.augment import compose, lay_out
from tools.emoji.concepts import Concept
from tools.emoji.drawings import Drawings, save_concept_table
from tools.emoji.eyes import Eyes, build_tower, cell_weights, means, save, threads
from tools.emoji.eyes_train import PictureSource, generator

NAMES = [("red apple", "红苹果"), ("zebra", "斑马"), ("ship", "船"), ("tiger", "老虎")]


@pytest.fixture
def drawings() -> Drawings:
    """Return 32 black drawings of four things, which differ in size."""
    pixels = np.zeros((32, 4, 96, 96), dtype=np.uint8)
    for number in range(32):
        half = 8 + 13 * (number % 4)
        pixels[number, 3, 48 - half : 48 + half, 48 - half : 48 + half] = 255
    return Drawings(pixels, np.array(["noto"] * 32), np.array([f"s{i % 4}" for i in range(32)]))


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_the_places_of_a_cell_are_those_that_its_drawing_covers(grid):
    number = grid * grid
    for cell in range(number):
        one = torch.full((1, 4, 96, 96), 255, dtype=torch.uint8)
        one[:, :3] = 0  # black, on a white ground
        picture, coverage = compose(one, torch.tensor([False]), torch.tensor([[cell]]), grid, 128, 0.0, generator(0))
        assert ((coverage > 0.5) == (picture.amax(1) < 0.5)).all()
        share = means(coverage[:, None], 1)[0, :, 0]
        weights = cell_weights(grid)[cell]
        assert weights.sum() == pytest.approx(1) and (weights > 0).sum() <= (8 // grid + 2) ** 2
        inside = (weights * share).sum()
        assert inside > 0.6 and share[weights == 0].sum() < 0.1 * share.sum()


def test_tiles_are_laid_out_in_their_cells():
    tiles = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    cells = torch.tensor([[0, 3, 1, 2], [8, 0, 4, 2]])
    assert lay_out(tiles[:4], cells[:1], 2)[0, 0].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [3, 3, 1, 1], [3, 3, 1, 1]]
    three = lay_out(tiles[4:], cells[1:], 3)[0, 0, ::2, ::2]
    assert three.tolist() == [[5, 0, 7], [0, 6, 0], [0, 0, 4]]


def test_the_parts_of_a_place_are_those_of_the_picture():
    x = torch.rand(2, 3, 128, 128)
    found = means(x, 2).view(2, 8, 8, 3, 2, 2)
    torch.testing.assert_close(found[1, 2, 5, 1, 0, 1], x[1, 1, 32:40, 88:96].mean())


def test_a_step_of_the_source_follows_from_its_number(drawings):
    source = PictureSource(drawings, batch=8, scenes=0.5, seed=3)
    first, again, other = (source.batch(step, 1.0, generator(step)) for step in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    assert first.labels.shape == (8, 4) and (first.labels[:4, 1:] == -100).all() and (first.labels[4:] >= 0).all()
    shown = first.labels >= 0
    torch.testing.assert_close(first.weights.sum(-1), shown.float())
    with pytest.raises(ValueError, match="32 training drawings are fewer than the 224 of one step. Lower --batch"):
        PictureSource(drawings, batch=56, scenes=1.0, seed=3)


def test_a_program_that_calls_another_keeps_its_threads():
    number = torch.get_num_threads()
    with pytest.raises(KeyError), threads(number + 1):
        assert torch.get_num_threads() == number + 1
        raise KeyError
    assert torch.get_num_threads() == number


def test_the_words_of_a_thing_are_those_of_its_names():
    tokenizer = load_processor(".").tokenizer
    concepts = [Concept(str(i), f"s{i}", en, zh, 0, "x") for i, (en, zh) in enumerate(NAMES)]
    target = align.name_tokens(tokenizer, concepts, ["s1", "s0"], 6400)
    torch.testing.assert_close(target.sum(1), torch.ones(2))
    for row, (en, zh) in zip(target, (NAMES[1], NAMES[0])):
        known = {token for text in (en, f" {en}", zh) for token in tokenizer.encode(text, add_special_tokens=False)}
        assert set(row.nonzero().flatten().tolist()) == known


@pytest.fixture
def options(drawings, tmp_path) -> list[str]:
    """Return options of the alignment for a random tower and its random classifier."""
    torch.manual_seed(0)
    save(Eyes(build_tower("resnet", 4), 4), ["s0", "s1", "s2", "s3"], tmp_path / "eyes")
    drawings.save(tmp_path / "drawings.npz")
    concepts = [Concept(str(i), f"s{i}", en, zh, 0, "x") for i, (en, zh) in enumerate(NAMES)]
    save_concept_table(tmp_path / "concepts.json", concepts, set())
    vision = json.loads((tmp_path / "eyes" / "config.json").read_text())
    vision.pop("dtype")
    config = {"vision_config": vision, "text_config": TEXT | {"vocab_size": 6400}, "vision_feature_layer": None}
    found = ["--vision_model", tmp_path / "eyes", "--drawings", tmp_path / "drawings.npz", "--batch", 8]
    found += ["--concepts", tmp_path / "concepts.json", "--model_config", json.dumps(config)]
    found += ["--pictures", 64, "--passes", 20, "--learning_rate", "1e-2", "--output", tmp_path / "out"]
    return [str(option) for option in found]


def test_alignment_teaches_the_names_and_leaves_tower_and_blocks_alone(options, tmp_path):
    (tmp_path / "eyes" / "head.pt").unlink()  # a tower without its classifier, as that of a released model
    start = align.Aligner(align.parse_args(options))
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    align.main(options)
    model, _ = load_trained(tmp_path / "out")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "projector" in name or "embed_tokens" in name or "lm_head" in name or
                       name == "model.language_model.norm.weight"}  # fmt: skip
    start.model.load_state_dict(model.state_dict())
    hits = []
    for step in range(1000, 1005):
        seen = start.see(step)
        assert seen.taught is None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            likeliest = start.logits(seen)[seen.labels >= 0].argmax(-1, keepdim=True)
        hits.append(start.targets[seen.labels[seen.labels >= 0]].gather(1, likeliest) > 0)
    assert torch.cat(hits).float().mean() > 0.4, "one guess in four is right by chance"


def test_alignment_learns_the_names_that_the_classifier_gives(options):
    aligner = align.Aligner(align.parse_args(options))
    with torch.no_grad():
        aligner.classifier.head.bias[2] = 100.0  # whatever it sees, it says s2
    seen = aligner.see(0)
    for _ in range(40):
        aligner.step(seen, 0.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        likeliest = aligner.logits(seen)[seen.labels >= 0].argmax(-1)
    assert (aligner.targets[2, likeliest] > 0).all()
