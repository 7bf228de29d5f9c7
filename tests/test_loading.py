"""Saving and loading: weights, tying, RoPE buffers, dtypes, and the code that travels with a checkpoint."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from transformers import set_seed

from helpers.models import ROOT, make_config, make_model, make_pixels, make_processor, make_prompt, same
from modeling_minivlm import MiniVLMForConditionalGeneration, MiniVLMModel, MiniVLMTextModel

IDS, PIXELS = make_prompt(3, "image", 5, "image", 12), make_pixels(2)  # 28 tokens
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device), pixel_values=PIXELS.to(model.device)).logits


@pytest.mark.parametrize("rope", ROPES)
def test_loading_fills_the_rope_buffers(rope, tmp_path):
    """Weights are loaded through the meta device, where a buffer that is not saved is uninitialised memory.

    This is how MiniMind-V's export gives NaN on transformers 5.
    """
    model = make_model(text={"rope_parameters": ROPES[rope], "max_position_embeddings": 16})
    model.save_pretrained(tmp_path)
    expected = model.model.language_model.rotary_emb
    frequencies = expected.inv_freq.clone()  # before a long sequence changes those of "dynamic"
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MiniVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        rotary = loaded.model.language_model.rotary_emb
        assert loaded.lm_head.weight.dtype == dtype and rotary.inv_freq.dtype == torch.float32
        assert torch.equal(rotary.inv_freq, frequencies) and torch.equal(rotary.original_inv_freq, frequencies)
        assert rotary.attention_scaling == expected.attention_scaling
        if dtype == torch.float32:
            assert torch.equal(logits(loaded), logits(model))


OPTIONS = [
    {},
    {"tie_word_embeddings": False, "projector_layer_norm": True},
    {"text": {"model_type": "qwen3"}, "vision": {"model_type": "siglip_vision_model"}, "vision_feature_layer": None},
    {"text": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}, "tie_word_embeddings": True},
    {"text": {"model_type": "llama"}, "vision": {"model_type": "dinov2"}, "projector_type": "linear"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_save_and_load_is_exact_and_keeps_tying(options, tmp_path):
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded, info = MiniVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(logits(loaded), logits(model))
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    with torch.no_grad():
        loaded.get_input_embeddings().weight.add_(1)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) is not tied


def test_parts_load_from_the_whole_and_the_whole_from_its_base(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    base = MiniVLMModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        expected = model.model(input_ids=IDS, pixel_values=PIXELS).last_hidden_state
        assert torch.equal(base(input_ids=IDS, pixel_values=PIXELS).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")  # tied: the LM head needs no weights of its own
    assert torch.equal(logits(MiniVLMForConditionalGeneration.from_pretrained(tmp_path / "base")), logits(model))
    model.model.language_model.save_pretrained(tmp_path / "text")
    text = MiniVLMTextModel.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        assert torch.equal(text(IDS).last_hidden_state, model.model.language_model(IDS).last_hidden_state)


def test_a_checkpoint_in_shards_and_device_map_auto(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MiniVLMForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    same(logits(loaded).cpu(), logits(model), atol=1e-3)  # on an accelerator if there is one


def test_new_weights_are_drawn_small_and_from_the_seed():
    """An initialisation that is skipped leaves torch's own, of another scale."""

    def build():
        set_seed(3)
        return MiniVLMForConditionalGeneration(make_config(text={"initializer_range": 0.02})).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("model.language_model.layers.0.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.weight"):
        assert abs(first[name].std() - 0.02) < 0.004, name
    assert not first["model.multi_modal_projector.linear_1.bias"].any()
    assert (first["model.language_model.norm.weight"] == 1).all()
    assert not first["model.language_model.embed_tokens.weight"][0].any()  # padding


PROLOGUE = """
    import json, os, sys
    import torch
    torch.set_num_threads(1)
    from PIL import Image
    from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                              AutoModelForMultimodalLM, AutoProcessor, pipeline)
    try:
        import modeling_minivlm
        sys.exit("the project is importable: this would prove nothing")
    except ImportError:
        pass
    folder = sys.argv[1]
    trust = dict(trust_remote_code=True)
    picture = Image.radial_gradient("L").convert("RGB")
    turns = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
"""
LOAD = """
    config = AutoConfig.from_pretrained(folder, **trust)
    assert (config.model_type, config.text_config.model_type) == ("minivlm", "minivlm_text")
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(processor).__name__ == "MiniVLMProcessor", type(processor)
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    models = {auto.__name__: auto.from_pretrained(folder, **trust)
              for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM)}
    assert {k: type(v).__name__ for k, v in models.items()} == {
        "AutoModel": "MiniVLMModel", "AutoModelForImageTextToText": "MiniVLMForConditionalGeneration",
        "AutoModelForCausalLM": "MiniVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "MiniVLMForConditionalGeneration"}  # the Hub's code snippet loads by this one
    base, model, causal, multimodal = models.values()
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, causal(**inputs).logits)
        assert torch.equal(logits, multimodal(**inputs).logits)
        assert torch.equal(logits, model.lm_head(base(**inputs).last_hidden_state))
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    text = processor.decode(answer, skip_special_tokens=True)

    pipe = pipeline("image-text-to-text", model=folder, **trust)
    out = pipe(text=turns, max_new_tokens=4, do_sample=False, return_full_text=False)
    assert out[0]["generated_text"] == text, (out, text)

    # Saved again from the classes that came with the checkpoint: the same logits, all code files, all entries.
    model.save_pretrained(sys.argv[2])
    processor.save_pretrained(sys.argv[2])
    again = AutoModelForImageTextToText.from_pretrained(sys.argv[2], **trust)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
    assert torch.equal(AutoProcessor.from_pretrained(sys.argv[2], **trust).apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt")["pixel_values"],
        inputs["pixel_values"])

    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto", **trust)
    assert half.dtype == torch.bfloat16 and half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        near = half(**{k: v.to(half.device) for k, v in inputs.items()}).logits.float().cpu()
    assert torch.nn.functional.cosine_similarity(near, logits, dim=-1).min() > 0.98

    fresh = AutoModelForImageTextToText.from_config(config, **trust)
    assert fresh.num_parameters() == model.num_parameters()
    torch.save({"logits": logits, "text": text}, sys.argv[3])
"""
REFUSE = """
    loaders = [auto.from_pretrained for auto in
               (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM)]
    loaders.append(lambda folder, **options: pipeline("image-text-to-text", model=folder, **options))
    for load in loaders:
        for options in ({}, {"trust_remote_code": False}):
            try:
                loaded = load(folder, **options)
            except (ValueError, EOFError) as error:
                assert "trust_remote_code" in str(error), error
            else:
                sys.exit(f"loaded without trust: {type(loaded)} by {load}")
    assert not any(name.startswith("transformers_modules") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as `save_pretrained` leaves it, and the model and processor that wrote it."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    model, processor = make_model(text={"vocab_size": 6400}), make_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def run_elsewhere(code, tmp_path, *arguments):
    """Run `code` in a fresh interpreter that sees neither this project nor a module cache that another run filled."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROLOGUE) + textwrap.dedent(code), *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # transformers asks on a terminal; nobody is there to answer
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_a_saved_checkpoint_answers_without_the_project(checkpoint, tmp_path):
    folder, model, processor = checkpoint
    run_elsewhere(LOAD, tmp_path, folder, tmp_path / "again", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    picture = {"type": "image", "image": Image.radial_gradient("L").convert("RGB")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        same(model(**inputs).logits, result["logits"])  # another process: not bit for bit
    for name in ("configuration_minivlm.py", "modeling_minivlm.py", "processing_minivlm.py"):
        for place in (folder, tmp_path / "again"):
            assert (place / name).read_text() == (ROOT / name).read_text()
    entries = {}
    for name in ("config.json", "processor_config.json"):
        first, entries[name] = (
            json.loads((place / name).read_text())["auto_map"] for place in (folder, tmp_path / "again")
        )
        assert first == entries[name]
    assert entries["processor_config.json"] == {"AutoProcessor": "processing_minivlm.MiniVLMProcessor"}
    models = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    assert entries["config.json"].keys() == {"AutoConfig", "AutoProcessor", *models}


def test_without_trust_nothing_loads(checkpoint, tmp_path):
    run_elsewhere(REFUSE, tmp_path, checkpoint[0])


def test_a_version_of_transformers_that_is_not_known_is_named_once(checkpoint, tmp_path):
    code = """
        import runpy, transformers
        transformers.__version__ = "5.25.0.dev0"
        for place in sys.argv[1:]:  # two copies of the code, one line
            AutoConfig.from_pretrained(place, **trust)
        for version in ("5.18.1", "5.19.0", "5.24.3", "6.0"):
            transformers.__version__ = version
            runpy.run_path(os.path.join(folder, "configuration_minivlm.py"))
    """
    shutil.copytree(checkpoint[0], tmp_path / "copy")
    errors = run_elsewhere(code, tmp_path, checkpoint[0], tmp_path / "copy").stderr
    assert errors.count("MiniVLM is tested") == 3, errors
    for version in ("5.18.1", "5.25.0.dev0", "6.0"):
        assert errors.count(f"MiniVLM is tested with transformers 5.19 to 5.24; this is {version}, ") == 1, errors
