"""Weights of MiniMind that cannot be converted give one clear error each and leave no files."""

import pytest
import torch

from helpers.convert import fails
from helpers.minimind import make_source, options, save
from helpers.models import ROOT
from minivlm.commands.convert import main
from minivlm.convert import formulas
from minivlm.model.loading import load_trained


def spoil(tensors, how):
    if how == "extra":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    elif how == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif how == "size":
        tensors["vision_proj.mlp.3.weight"] = torch.zeros(32, 31)
    elif how == "layer":
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    elif how == "head":
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1


@pytest.mark.parametrize(
    "how, said",
    [
        ("extra", r"model.layers.0.self_attn.q_proj.bias (32,) has no place here"),
        ("missing", "model.layers.1.mlp.up_proj.weight is missing"),
        ("size", "vision_proj.mlp.3.weight has shape (32, 31) instead of (32, 32)"),
        ("layer", "model.layers.1.self_attn.k_proj.weight has shape (32, 32) instead of (16, 32)"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(how, said, parts, tmp_path):
    tensors = make_source("minimind-3v")
    spoil(tensors, how)
    source, out = save(tmp_path / "weights.pth", tensors), tmp_path / "out"
    assert said in fails(["from_minimind", str(source), *options("minimind-3v", parts, out)], out)


@torch.no_grad()
def test_an_untied_head_is_kept_unless_the_config_denies_it(parts, tmp_path):
    tensors, out = make_source("minimind-3v"), tmp_path / "out"
    spoil(tensors, "head")
    source = save(tmp_path / "folder", tensors)
    (source / "config.json").write_text('{"tie_word_embeddings": true}')
    assert "config.json says tie_word_embeddings" in fails(
        ["from_minimind", str(source), *options("minimind-3v", parts, out)], out
    )
    (source / "config.json").write_text('{"tie_word_embeddings": false}')
    main(["from_minimind", str(source), *options("minimind-3v", parts, out), "--verify"])
    assert torch.equal(load_trained(out)[0].lm_head.weight, tensors["lm_head.weight"])


class Evil:
    def __reduce__(self):
        return (print, ("code that ran",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_cut_short_is_refused(suffix, parts, tmp_path):
    source, out = save(tmp_path / f"weights{suffix}", make_source("minimind-3v")), tmp_path / "out"
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    command = ["from_minimind", str(source), *options("minimind-3v", parts, out)]
    said = fails(command, out)
    assert "is not a complete" in said and "again" in said


@pytest.mark.parametrize(
    "content, said",
    [
        (Evil(), "could run code: it is not loaded"),
        ({"model": {"a": torch.zeros(1)}, "step": 3}, "holds other things than tensors: model, step"),
        ([torch.zeros(1)], "holds other things than tensors: list"),
        ({"tok_embeddings.weight": torch.zeros(2, 2)}, "not the weights of a MiniMind of April 2025 or later"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(content, said, parts, tmp_path, capsys):
    out = tmp_path / "out"
    torch.save(content, tmp_path / "weights.pth")
    assert said in fails(["from_minimind", str(tmp_path / "weights.pth"), *options("minimind-3v", parts, out)], out)
    assert "code that ran" not in capsys.readouterr().out


def test_what_is_missing_or_in_the_way_is_named(parts, tmp_path):
    source, out = save(tmp_path / "weights.pth", make_source("minimind-3v")), tmp_path / "out"
    good = ["from_minimind", str(source), *options("minimind-3v", parts, out)]

    def without(option, *instead):
        place = good.index(option)
        return [*good[:place], *instead, *good[place + 2 :]]

    assert "holds no vision tower" in fails(without("--vision_model"), out)
    assert "no folder with a model" in fails(without("--vision_model", "--vision_model", "no/such"), out)
    assert "a file without a tokenizer" in fails(without("--tokenizer"), out)
    clip = str(parts["folder"] / "clip_vision_model")
    assert "was trained on 'siglip_vision_model'" in fails(without("--vision_model", "--vision_model", clip), out)
    assert "no such file or folder" in fails(["from_minimind", str(tmp_path / "none"), "--out", str(out)], out)
    (tmp_path / "lfs.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in fails(["from_minimind", str(tmp_path / "lfs.pth"), *good[2:]], out)
    (tmp_path / "empty").mkdir()
    assert "no weights" in fails(["from_minimind", str(tmp_path / "empty"), *good[2:]], out)
    folder = save(tmp_path / "folder", make_source("minimind-3v"))
    (folder / "config.json").write_text('{"hidden_size": 512, "image_ids": [12]}')
    assert "hidden_size=512 (the weights have 32)" in fails(["from_minimind", str(folder), *good[2:]], out)
    (folder / "config.json").write_text('{"image_token_len": 196}')
    assert "makes 64 features of a picture, config.json says 196" in fails(
        ["from_minimind", str(folder), *good[2:]], out
    )
    (folder / "config.json").write_text('{"inference_rope_scaling": true}')
    assert "scales RoPE" in fails(["from_minimind", str(folder), *good[2:]], out)
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists. Choose another --out"):
        main(good)
    assert (out / "mine").read_text() == "kept"


def test_weights_that_do_not_verify_are_not_kept(parts, tmp_path, monkeypatch):
    source, out = save(tmp_path / "weights.pth", make_source("minimind-3v")), tmp_path / "out"
    monkeypatch.setattr(formulas, "silu", torch.nn.functional.gelu)
    command = ["from_minimind", str(source), *options("minimind-3v", parts, out), "--verify"]
    assert "logits and those of MiniMind's formulas differ" in fails(command, out)


def test_what_minimind_v_cannot_express_is_not_written(tmp_path, tiny):
    out = tmp_path / "out"
    said = fails(["to_minimind", tiny, "--out", str(out)], out)
    assert "projector_layer_norm=False" in said and "not 'siglip_vision_model'" in said
    assert "'resnet', not 'siglip_vision_model'" in fails(["to_minimind", str(ROOT), "--out", str(out)], out)
    assert "no folder with a model" in fails(["to_minimind", str(tmp_path / "none"), "--out", str(out)], out)
