"""Exports to classes that every engine knows: plain transformers gives the same logits and answers."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from helpers.convert import fails
from helpers.models import ROOT, SIGLIP, make_pixels, make_prompt, same, save
from minivlm.commands.convert import main
from minivlm.convert.llava import llava_config
from minivlm.model.loading import load_trained

DINO = {"model_type": "dinov2", "image_size": 28, "patch_size": 14}
CASES = {
    "clip, as LLaVA": {},
    "clip, last block": {"vision_feature_layer": -1},
    "clip, its output": {"vision_feature_layer": None},
    "clip, class token kept": {"vision_feature_select_strategy": "full"},
    "siglip, last block": {"vision": SIGLIP, "vision_feature_layer": -1},
    "siglip, one before": {"vision": SIGLIP, "vision_feature_layer": -2},
    "another activation": {"projector_hidden_act": "silu"},
    "dino": {"vision": DINO, "vision_feature_layer": -1},
    "dino, one before": {"vision": DINO, "vision_feature_layer": -2},
    "untied, no bias": {"tie_word_embeddings": False, "multimodal_projector_bias": False},
    "yarn": {"text": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                          "original_max_position_embeddings": 128}}},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_llava_gives_the_same_logits_and_answers(case, tmp_path, picture, capsys):
    model = save(tmp_path / "ours", **CASES[case])
    main(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava"), "--verify"])
    assert "the same greedy answer" in capsys.readouterr().out
    assert not list((tmp_path / "llava").glob("*.py"))
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", trust_remote_code=False).eval()
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    assert type(theirs.model.language_model).__name__ == "Qwen3Model"
    image_tokens, size = model.config.image_seq_length, model.config.vision_config.image_size
    ids = make_prompt(5, "image", 7, "image", 4, image_tokens=image_tokens)
    for inputs in ({"input_ids": ids, "pixel_values": make_pixels(2, size=size)}, {"input_ids": make_prompt(30)}):
        same(theirs(**inputs).logits, model(**inputs).logits)
    # From a picture and a question on: their processor, their prompt, their answer.
    answers = []
    for folder, m, trust in (("ours", model, True), ("llava", theirs, False)):
        processor = AutoProcessor.from_pretrained(tmp_path / folder, trust_remote_code=trust)
        content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is this?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        answers.append(m.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_weights_of_the_tower_are_named_as_vllm_wants_them(tower, tmp_path):
    """vLLM's LLaVA cuts `model.` off and keeps a CLIP or SigLIP tower as `vision_tower.vision_model`."""
    model = save(tmp_path / "ours", vision={"model_type": tower}, vision_feature_layer=-1)
    main(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava")])
    names = [name.removeprefix("model.") for name in load_file(tmp_path / "llava" / "model.safetensors")]
    for part, start in (("vision_tower", "vision_tower.vision_model."), ("language_model", "language_model.model.")):
        of_part = [name for name in names if name.startswith(part)]
        assert of_part and all(name.startswith(start) and name.count(part) == 1 for name in of_part), of_part
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weights = again.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("command", ["to_llava", "to_causal_lm"])
def test_an_export_names_no_code_of_ours(command, tmp_path):
    save(tmp_path / "ours")
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert "processing_minivlm" in (tmp_path / "ours" / name).read_text()
    main([command, str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text() and "MiniVLM" not in path.read_text(), path.name


def test_a_load_of_llava_lacks_no_weight(tmp_path):
    save(tmp_path / "ours", vision=SIGLIP, vision_feature_layer=-1)
    main(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava")])
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"projector_layer_norm": True}, "projector_layer_norm=True"),
        ({"projector_type": "linear"}, "projector_type='linear'"),
        ({"pixel_shuffle_factor": 2}, "pixel_shuffle_factor=2"),
        ({"vision": SIGLIP, "vision_feature_layer": None}, "vision_feature_layer=None"),
        ({"vision": DINO | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}}, "5 class and register"),
    ],
)
def test_what_llava_cannot_express_is_refused(options, said, tmp_path):
    save(tmp_path / "ours", **options)
    message = fails(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava")], tmp_path / "llava")
    assert said in message and "trust_remote_code" in message


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_alone_is_a_qwen3(tied, tmp_path):
    model = save(tmp_path / "ours", tie_word_embeddings=tied)
    main(["to_causal_lm", str(tmp_path / "ours"), "--out", str(tmp_path / "text"), "--verify"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "text", trust_remote_code=False)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = make_prompt(30)
    same(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(theirs.generate(ids, **greedy), model.generate(input_ids=ids, **greedy))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    turns = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize("decoder", ["llama", "gemma3_text", "qwen3_moe"])
def test_decoders_of_other_families_leave_as_they_came(decoder, published, tmp_path):
    source = published(decoder)
    parts = ["--vision_model", str(published("siglip_vision_model")), "--text_model", str(source)]
    main(["build", *parts, "--out", str(tmp_path / "ours"), "--model_config", '{"vision_feature_layer": -1}'])
    main(["to_causal_lm", str(tmp_path / "ours"), "--out", str(tmp_path / "text"), "--verify"])
    main(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava"), "--verify"])
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "text"))
    assert type(before) is type(after)
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name][: len(weight)], weight), name


@torch.no_grad()
def test_a_llava_configuration_leaves_the_model_as_it_is(published, tmp_path):
    parts = ["--vision_model", str(published("dinov2")), "--text_model", str(published("llama"))]
    main(["build", *parts, "--out", str(tmp_path / "ours")])
    model, _ = load_trained(tmp_path / "ours")
    inputs = {"input_ids": make_prompt(30)}
    before = model.eval()(**inputs).logits
    llava_config(model.config)
    same(model(**inputs).logits, before)


def test_an_export_that_does_not_verify_is_not_kept(tmp_path, monkeypatch):
    save(tmp_path / "ours")
    monkeypatch.setattr("transformers.models.llava.modeling_llava.LlavaMultiModalProjector.forward",
                        lambda self, features: self.linear_2(self.linear_1(features)))  # fmt: skip
    message = fails(
        ["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava"), "--verify"], tmp_path / "llava"
    )
    assert "Our logits and the exported model's differ by" in message


def test_half_precision_stays_as_it_is(tmp_path):
    save(tmp_path / "ours").to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    main(["to_llava", str(tmp_path / "ours"), "--out", str(tmp_path / "llava"), "--verify"])
    theirs, ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava"), load_trained(tmp_path / "ours")[0]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)


@pytest.mark.slow
def test_the_decoder_of_the_released_model_is_exported(tmp_path):
    main(["to_causal_lm", str(ROOT), "--out", str(tmp_path / "decoder"), "--verify"])
    assert "a tower of type 'resnet'" in fails(["to_llava", str(ROOT), "--out", str(tmp_path / "x")], tmp_path / "x")
