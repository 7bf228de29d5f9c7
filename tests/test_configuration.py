"""Configuration: what cannot work is refused with a remedy, what can is read, saved and derived right."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Dinov2Config, LlamaConfig, Qwen3Config, SiglipVisionConfig

from configuration_minivlm import MiniVLMConfig
from helpers.models import ROOT, TEXT, VISION, make_config, make_model, make_pixels, make_prompt

REFUSED = {
    "odd head_dim": (dict(text={"head_dim": 15}), ["`head_dim`=15", "even"]),
    "hidden_size not divided by the heads": (
        dict(text={"head_dim": None, "hidden_size": 30}),
        ["`hidden_size`=30", "`num_attention_heads`=4", "give `head_dim`"],
    ),
    "heads not divided by key-value heads": (dict(text={"num_key_value_heads": 3}), ["=4", "=3", "divisor"]),
    "pixel shuffle does not divide the grid": (dict(pixel_shuffle_factor=3), ["=3", "2 x 2", "divisor"]),
    "pixel shuffle of nothing": (dict(pixel_shuffle_factor=0), ["=0", "1 (off)"]),
    "pixel shuffle with the class token": (
        dict(pixel_shuffle_factor=2, vision_feature_select_strategy="full"),
        ["pixel_shuffle_factor", "class token", '"default"'],
    ),
    "image token above the vocabulary": (dict(image_token_id=128), ["=128", "128 entries", "resize"]),
    "image token below the vocabulary": (dict(image_token_id=-1), ["=-1", "128 entries", "correct the id"]),
    "feature layer beyond the tower": (dict(vision_feature_layer=4), ["=4", "1 to 3", "None"]),
    "feature layer before the tower": (dict(vision_feature_layer=-4), ["=-4", "-3 to -1"]),
    "feature layer without a block": (dict(vision_feature_layer=0), ["=0", "1 to 3"]),
    "unknown selection": (dict(vision_feature_select_strategy="cls"), ["cls", "default", "full"]),
    "unknown projector": (dict(projector_type="resampler"), ["resampler", "mlp", "linear"]),
    "a string for a number": (dict(image_token_id="<image>"), ["image_token_id", "int", "<image>"]),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_with_value_limit_and_remedy(options, words):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        make_config(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(vision_config={"model_type": "qwen3"}), ["`vision_config`", "'qwen3'", "CLIP, SigLIP, DINO"]),
        (dict(text_config={"model_type": "clip_vision_model"}), ["`text_config`", "'clip_vision_model'", "causal"]),
        (dict(text_config={"model_type": "no_such"}), ["no_such"]),
    ],
)
def test_sub_configs_of_the_wrong_kind_are_refused(options, words):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        MiniVLMConfig(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_composite_round_trip_keeps_every_option_and_class(tmp_path):
    text = Qwen3Config(**{k: v for k, v in TEXT.items() if k != "model_type"})
    vision = SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "model_type"})
    config = MiniVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=7,
        vision_feature_layer=None,
        projector_type="linear",
        projector_layer_norm=True,
        pixel_shuffle_factor=2,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    again = MiniVLMConfig.from_pretrained(tmp_path)
    assert isinstance(again.text_config, Qwen3Config) and isinstance(again.vision_config, SiglipVisionConfig)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert again.text_config.tie_word_embeddings is False  # read there by serving engines


def test_saved_config_names_every_remote_class(tmp_path):
    make_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_minivlm.MiniVLMConfig",
        "AutoModel": "modeling_minivlm.MiniVLMModel",
        "AutoModelForCausalLM": "modeling_minivlm.MiniVLMForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_minivlm.MiniVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_minivlm.MiniVLMForConditionalGeneration",
        "AutoProcessor": "processing_minivlm.MiniVLMProcessor",
    }
    assert (tmp_path / "configuration_minivlm.py").read_text() == (ROOT / "configuration_minivlm.py").read_text()


def test_only_the_text_config_is_registered():
    """Else trust_remote_code=False would not refuse a download. In a process of its own: other tests register both."""
    code = (
        "import modeling_minivlm, processing_minivlm\n"
        "from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('minivlm_text')))\n"
        "AutoConfig.for_model('minivlm')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "<class 'configuration_minivlm.MiniVLMTextConfig'>\n"
    assert done.returncode == 1 and "Unrecognized model identifier: minivlm" in done.stderr


@pytest.mark.parametrize("given, expected", [(None, True), (True, True), (False, False)])
def test_tying_is_decided_at_the_top(given, expected):
    config = make_config(tie_word_embeddings=given)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is expected
    model = make_model(config)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is expected


def test_tying_follows_the_decoder_unless_given():
    assert MiniVLMConfig(text_config=LlamaConfig(tie_word_embeddings=False)).tie_word_embeddings is False


TOWERS = {
    "clip": (dict(), 4, 5),
    "siglip": (dict(model_type="siglip_vision_model"), 4, 4),
    "dinov2": (dict(model_type="dinov2"), 4, 5),
    "registers": (dict(model_type="dinov2_with_registers", num_register_tokens=3), 4, 8),
    "vit": (dict(model_type="vit"), 4, 5),
    "oblong": (dict(model_type="vit", image_size=[32, 64]), 8, 9),
}


@pytest.mark.parametrize("vision, patches, tokens", TOWERS.values(), ids=TOWERS)
def test_image_seq_length_is_what_the_tower_gives(vision, patches, tokens):
    """The processor writes this many placeholders; one more or less and no prompt with a picture runs."""
    height, width = vision.get("image_size", [32, 32])
    for strategy, expected in (("default", patches), ("full", tokens)):
        config = make_config(vision=vision, vision_feature_select_strategy=strategy)
        pixels = torch.randn(2, 3, height, width)
        features = make_model(config).get_image_features(pixels).pooler_output
        assert config.image_seq_length == features.shape[1] == expected


@pytest.mark.parametrize("layer, blocks", [(-1, 3), (-2, 2), (-3, 1), (1, 1), (2, 2), (3, 3), (None, 3)])
def test_blocks_after_the_feature_layer_are_not_built(layer, blocks):
    model = make_model(vision_feature_layer=layer)
    names = {
        n.split(".layers.")[1].split(".")[0]
        for n, _ in model.named_parameters()
        if "vision_tower" in n and ".layers." in n
    }
    assert len(names) == model.config.num_vision_layers == blocks
    assert model.config.vision_config.num_hidden_layers == 3  # the config still names the tower that it came from


def test_default_is_minimind_3v_on_clip_base():
    config = MiniVLMConfig()
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.head_dim, text.vocab_size) == (768, 8, 96, 6400)
    assert config.image_seq_length == 196 and config.vision_config.model_type == "clip_vision_model"


def test_sub_configs_are_shared_not_copied():
    vision = Dinov2Config(image_size=32, patch_size=16)
    assert MiniVLMConfig(vision_config=vision).vision_config is vision


DEVICES = re.compile(r"(CUDA|HIP|ROCR|ASCEND_RT|MUSA|GPU)_?VISIBLE_?\w*|ZE_AFFINITY_MASK|ACCELERATE_USE_CPU")


def hides_an_accelerator(tree: ast.AST):
    """Lines that do more with a device variable than read it, or that ask for the CPU whatever the machine has."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICES.fullmatch(node.value):
            parent = parents[node]
            reads = isinstance(parent, ast.Compare)
            reads |= isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Load)
            reads |= isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith(("environ.get", "getenv"))
            if not reads:
                yield node.lineno
        elif isinstance(node, ast.keyword) and (node.arg or "") != "":
            if DEVICES.fullmatch(node.arg) or ast.unparse(node) in ("cpu=True", "use_cpu=True", "no_cuda=True"):
                yield node.value.lineno


def test_no_file_hides_an_accelerator():
    """The first training log ran on a CPU because a line of the code had set CUDA_VISIBLE_DEVICES."""
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    files = [path for path in files if path.parts[0] not in ("tests", "build", "runs", ".git", ".venv")]
    python = [path for path in files if path.suffix == ".py"]
    assert {"configuration_minivlm.py", "modeling_minivlm.py", "processing_minivlm.py"} <= set(map(str, python))
    found = [f"{p}:{n}" for p in python for n in hides_an_accelerator(ast.parse((ROOT / p).read_text("utf-8")))]
    for path in files:  # an assignment in a shell script, a Makefile or a recipe
        if path.suffix in (".sh", ".yaml", ".yml", ".cfg", ".toml") or path.name in ("Makefile", "run", "Dockerfile"):
            text = (ROOT / path).read_text("utf-8")
            found += [f"{path}: {hit.group()}" for hit in re.finditer(rf"({DEVICES.pattern})\s*[:?]?=", text)]
    assert not found, f"{found}: leave the choice of devices to the user and to accelerate."


@pytest.mark.parametrize(
    "line, count",
    [
        ("os.environ['CUDA_VISIBLE_DEVICES'] = ''", 1),
        ("os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')", 1),
        ("os.environ.update(HIP_VISIBLE_DEVICES='-1')", 1),
        ("env = os.environ | {'CUDA_VISIBLE_DEVICES': ''}", 1),
        ("Accelerator(cpu=True)", 1),
        ("print(os.environ.get('CUDA_VISIBLE_DEVICES'))", 0),
    ],
)
def test_the_search_for_hidden_accelerators_finds_them(line, count):
    assert len(list(hides_an_accelerator(ast.parse(line)))) == count


def test_using_the_package_does_not_touch_the_devices_of_the_process():
    code = (
        "import os; before = dict(os.environ)\n"
        "from helpers import models\n"
        "model = models.make_model()\n"
        "model(input_ids=models.make_prompt(2, 'image', 2), pixel_values=models.make_pixels(1))\n"
        "new = {k: v for k, v in os.environ.items() if before.get(k) != v}\n"
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '7,3', os.environ['CUDA_VISIBLE_DEVICES']\n"
        "assert not [k for k in new if 'VISIBLE' in k or k.startswith('ACCELERATE')], new\n"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "7,3", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_pictures_of_another_size_are_refused_by_shape():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 32, 32\).*reading order"):
        make_model()(input_ids=make_prompt("image", 2), pixel_values=make_pixels(2)[None])
