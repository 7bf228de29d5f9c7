"""Towers and decoders of every family are joined by name, trained and asked; the tests make tiny ones."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from helpers.convert import fails, train_and_ask
from helpers.families import DECODERS, SIZES, TOWERS
from helpers.models import ROOT, make_pixels
from minivlm.commands.convert import main, parse_args
from minivlm.model.loading import check_names, load_trained
from minivlm.training import options as training

PAIRS = [(tower, "qwen3") for tower in TOWERS] + [("siglip_vision_model", decoder) for decoder in DECODERS][1:]


@pytest.mark.parametrize("tower, decoder", PAIRS)
def test_every_family_is_joined_trained_and_asked(tower, decoder, published, data, picture, tmp_path, capsys):
    tower, decoder, out = published(tower), published(decoder), tmp_path / "new"
    main(["build", "--vision_model", str(tower), "--text_model", str(decoder), "--out", str(out)])
    assert "4 image tokens per picture" in capsys.readouterr().out
    model, processor = load_trained(out)
    source = AutoModelForCausalLM.from_pretrained(decoder)
    rows, old = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old) and model.config.image_token_id >= len(old)
    torch.testing.assert_close(rows[len(old) :], old.mean(0).expand(len(rows) - len(old), -1))
    weights = AutoModel.from_pretrained(tower).state_dict()
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    train_and_ask(out, data, picture(), tmp_path)


def test_a_built_folder_is_a_repository(published, tmp_path):
    """It carries its code, and transformers alone loads it."""
    out = tmp_path / "new"
    parts = ["--vision_model", str(published("siglip_vision_model")), "--text_model", str(published("llama"))]
    options = json.dumps({"pixel_shuffle_factor": 2, "projector_layer_norm": True, "vision_feature_layer": -1})
    main(["build", *parts, "--model_config", options, "--out", str(out)])
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert model.config.image_seq_length == processor.image_seq_length == 1
    assert model.get_image_features(make_pixels(2), return_dict=True).pooler_output.shape == (2, 1, 16)


def test_what_cannot_be_joined_is_refused_before_anything_is_written(published, tmp_path):
    out = tmp_path / "new"
    tower, decoder = str(published("clip_vision_model")), str(published("llama"))
    said = fails(["build", "--vision_model", "no/such", "--text_model", decoder, "--out", str(out)], out)
    assert "--vision_model no/such: no folder with a model" in said
    said = fails(["build", "--vision_model", decoder, "--text_model", decoder, "--out", str(out)], out)
    assert "it is not a vision transformer" in said
    said = fails(["build", "--vision_model", tower, "--text_model", tower, "--out", str(out)], out)
    assert f"--text_model {tower} is of type 'clip_vision_model', which is not a causal decoder" in said
    naflex = tmp_path / "naflex"
    AutoModel.from_config(AutoConfig.for_model("siglip2_vision_model", **SIZES)).save_pretrained(naflex)
    said = fails(["build", "--vision_model", str(naflex), "--text_model", decoder, "--out", str(out)], out)
    assert "'siglip2_vision_model' has no image_size" in said
    command = ["build", "--vision_model", tower, "--text_model", decoder, "--out", str(out), "--model_config"]
    said = fails([*command, '{"pixel_shuffle_factor": 3}'], out)
    assert "`pixel_shuffle_factor`=3 does not divide the 2 x 2 patch grid" in said


def test_a_model_needs_no_parts_of_a_new_one(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vision_model: runs/tower-that-was-deleted\n", encoding="utf-8")
    options = ["--recipe", str(recipe), "--model", str(ROOT)]
    check_names(training.parse_args(options))
    assert capsys.readouterr().out == ""
    check_names(training.parse_args([*options, "--text_model", "no/such", "--vision_model", "another/tower"]))
    said = "warning: --vision_model another/tower, --text_model no/such not used: --model "
    assert capsys.readouterr().out.startswith(said)
    with pytest.raises(ValueError, match="--vision_model runs/tower-that-was-deleted: no folder with a model"):
        check_names(training.parse_args(options[:2]))


def test_a_model_that_is_none_of_ours_is_refused(published, tmp_path, capsys):
    for command in ("to_minimind", "to_llava", "to_causal_lm", "to_onnx"):
        said = fails([command, str(published("llama")), "--out", str(tmp_path / "out")], tmp_path / "out")
        assert "is of type 'llama', not a MiniVLM" in said
    for text, problem in (("{bad", "is not JSON"), ("[1]", "is not a mapping")):
        command = ["build", "--vision_model", "a", "--text_model", "b", "--out", "c", "--model_config", text]
        with pytest.raises(SystemExit):
            main(command)
        assert problem in capsys.readouterr().err


COMMANDS = ("build", "from_minimind", "to_minimind", "to_llava", "to_causal_lm", "to_onnx", "to_web", "to_gguf")


def test_help_shows_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    manual = (ROOT / "CONVERTING.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert command in shown and f"minivlm convert {command}" in manual


def test_the_commands_of_the_manual_can_be_parsed():
    manual = (ROOT / "CONVERTING.md").read_text(encoding="utf-8")
    examples = re.findall(r"^minivlm convert (.*)", manual, flags=re.MULTILINE)
    assert {parse_args(example.split()).command for example in examples} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_of_a_command_can_be_parsed(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: minivlm convert {command} ")
    examples = re.findall(r"^    minivlm convert (.*)", shown.replace("\\\n", " "), flags=re.MULTILINE)
    assert examples and all(parse_args(example.split()).command == command for example in examples)
