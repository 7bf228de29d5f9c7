"""Parse every recipe and build its model on the meta device; read every launch configuration with Accelerate."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

import train_accelerate
from configuration_minivlm import MiniVLMConfig
from helpers.families import plain_tokenizer
from helpers.models import ROOT, TEXT, VISION, make_model, make_prompt
from helpers.training import TINY, losses, run
from minivlm.model.backbones import build
from minivlm.model.parts import freeze
from minivlm.resources import RECIPES, recipe_names
from minivlm.training.options import parse_args
from modeling_minivlm import MiniVLMForConditionalGeneration

# Millions of parameters as published: besides the tower, or in all.
PUBLISHED = {
    "minimind2_v_small": ("rest", 26),
    "minimind_3v_pretrain": ("rest", 65),
    "minimind_3v_moe": ("rest", 200),
    "dinov2_minimind_3v": ("rest", 65),
    "nanovlm_222m": ("all", 222),
}


def parsed(name):
    return parse_args(["--recipe", str(RECIPES / f"{name}.yaml")])


def on_meta(args):
    with torch.device("meta"):
        return MiniVLMForConditionalGeneration(MiniVLMConfig(**args.model_config))


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_builds_its_model(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert "# Run:" in text and "# Result:" in text
    args = parsed(recipe)
    if args.model_config:
        on_meta(args)
    if args.model:  # the released one, or what another recipe leaves
        left = {f"{parsed(name).output_dir}/final" for name in recipe_names() if name != recipe}
        assert args.model in (".", "runs/emoji/aligned", "runs/demo/aligned", *left)  # aligned by tools
        return
    model = on_meta(args)
    assert any(freeze(model, args.train).values())
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    total = sum(p.numel() for p in model.parameters())
    kind, millions = PUBLISHED.get(recipe, ("all", 7.3))
    assert (total - (tower if kind == "rest" else 0)) / 1e6 == pytest.approx(millions, rel=0.02)


def test_a_mixture_of_experts_works_with_a_third_of_its_weights():
    args = parsed("minimind_3v_moe")
    model = on_meta(args)
    rest = sum(p.numel() for name, p in model.named_parameters() if "vision_tower" not in name)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (rest - experts * 3 / 4) / 1e6 == pytest.approx(65, rel=0.02)


def test_image_tokens_are_those_published():
    tokens = {"minimind2_v_small": 196, "minimind_3v_pretrain": 64, "dinov2_minimind_3v": 64, "nanovlm_222m": 49}
    for recipe, count in tokens.items():
        assert MiniVLMConfig(**parsed(recipe).model_config).image_seq_length == count


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_launch_configuration_is_read(name):
    config = load_config_from_file(str(ROOT / "configs" / name))
    assert config.num_processes == {"cpu": 1, "gpu1": 1, "ddp_2x8": 16}.get(name.removesuffix(".yaml"), 8)


def test_accelerate_launch_trains_on_a_folder_of_pictures(tmp_path):
    """Run the recipe for your own pictures through the launcher, with a launch configuration of this repository."""
    folder = tmp_path / "my_pictures"
    folder.mkdir()
    lines = []
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "question": "How red is it?", "answer": "{i}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / "cpu.yaml")]
    command += [str(ROOT / "train_accelerate.py"), "--recipe", str(ROOT / "recipes" / "finetune_folder.yaml")]
    command += ["--data", str(folder), "--batch_size", "3", "--log_every", "1", "--output_dir", str(tmp_path / "run")]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ}).stdout
    assert len(losses(tmp_path / "run")) == 6 and "distributed" not in out
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def save_decoder(folder, family, tokenizer):
    """Save and return a tiny decoder of another family; its tokenizer has none of our special tokens."""
    torch.manual_seed(3)
    sizes = {
        key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_decoder_of_another_family_is_taken_over_and_learns(data, tmp_path, family):
    tokenizer = plain_tokenizer()
    old = len(tokenizer)
    decoder = save_decoder(tmp_path / "decoder", family, tokenizer)
    config = f'{{"vision_config": {VISION}, "vision_feature_layer": -1}}'.replace("'", '"')
    start = ["--text_model", str(tmp_path / "decoder"), "--model_config", config]
    model, processor = build(parse_args([*TINY[2:], *start][2:]))
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings[:old], decoder.get_input_embeddings().weight)
    torch.testing.assert_close(embeddings[old], embeddings[:old].mean(0))
    ids = make_prompt(8) % old
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :old], decoder(input_ids=ids).logits[..., :old])
    assert processor.image_token_id == model.config.image_token_id >= old
    options = ["--data", data, "--batch_size", "8", "--output_dir", str(tmp_path / "run"), "--max_steps", "12"]
    final = train_accelerate.main([*TINY[4:], *start, *options, "--learning_rate", "1e-2", "--eval_data", data])
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    again, _ = train_accelerate.load_trained(final)
    assert again.config.text_config.model_type == family


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_of_a_model_with_two_encoders_is_taken_over(data, tmp_path, family):
    """Load a tower out of a model that also has a text encoder, as CLIP and SigLIP are published."""
    torch.manual_seed(1)
    vision = {key: value for key, value in VISION.items() if key != "model_type"}
    classes = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[family]
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    both = classes[1](classes[0](vision_config=vision, text_config=text))
    both.save_pretrained(tmp_path / "both")
    config = f'{{"text_config": {TEXT | {"vocab_size": 6400}}, "vision_feature_layer": -1}}'.replace("'", '"')
    options = ("--model_config", config, "--vision_model", str(tmp_path / "both"), "--max_steps", "2")
    final = run(data, tmp_path / "run", *options, "--train", "projector", "text")
    tower = train_accelerate.load_trained(final)[0].model.vision_tower
    names = {name.removeprefix("vision_model."): weight for name, weight in both.vision_model.state_dict().items()}
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, names[name.removeprefix("vision_model.")]), name


def test_a_recipe_that_is_untrue_about_what_it_loads_is_refused(data, tmp_path):
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model(**VISION)).save_pretrained(tmp_path / "tower")
    config = f'{{"vision_config": {VISION | {"hidden_size": 24}}}}'.replace("'", '"')
    with pytest.raises(ValueError, match=r"model_config.vision_config.hidden_size=24, but .* has 16"):
        run(data, tmp_path / "run", "--model_config", config, "--vision_model", str(tmp_path / "tower"))


def test_a_recipe_may_name_a_config_json_beside_the_tower_that_it_describes(tmp_path):
    """Build as recipes/emoji.yaml does: the whole config.json of a model, and a tower of the same sizes."""
    model = make_model(text={"vocab_size": 6400})
    model.save_pretrained(tmp_path / "model")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    options = ["--model_config", str(tmp_path / "model" / "config.json"), "--vision_model", str(tmp_path / "tower")]
    built, _ = build(parse_args(options))
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(built.model.vision_tower.state_dict()[name], weight), name


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("signalled", [True, False])
def test_the_slurm_job_is_queued_again_only_if_its_time_was_up(tmp_path, signalled):
    """Replace `srun` and `scontrol` by small programs that note what the job asks of them, and when."""
    tools = {
        "scontrol": f'#!/bin/bash\necho "$@" >> "{tmp_path}/asked"\n[ "$1" != show ] || printf "node-a\\nnode-b\\n"',
        "srun": f'#!/bin/bash\ntrap "echo saved >> {tmp_path}/asked; exit 143" TERM\n'
        f'echo started "$4" "${{@:5}}" >> "{tmp_path}/asked"\n' + ("sleep 20 & wait" if signalled else "exit 1"),
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[a-b]"}
    env["SLURM_JOB_ID"] = "7"
    script = ["bash", str(ROOT / "configs" / "slurm_2x8.sh"), "--recipe", "x.yaml"]
    job = subprocess.Popen(script, env=env, cwd=ROOT)
    asked, end = tmp_path / "asked", time.monotonic() + 20
    while "started" not in (asked.read_text() if asked.exists() else "") and time.monotonic() < end:
        time.sleep(0.05)
    if signalled:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) != 0
    lines = asked.read_text().splitlines()
    assert lines[:2] == ["show hostnames node-[a-b]", "started node-a --recipe x.yaml"]
    assert lines[2:] == (["saved", "requeue 7"] if signalled else [])
