"""Weights of MiniMind and MiniMind-V keep the logits of their published formulas on the way in and out."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)

from helpers.convert import train_and_ask
from helpers.minimind import FORMATS, PICTURED, make, make_source, options
from helpers.models import make_pixels, same
from minivlm.commands.convert import main
from minivlm.convert import formulas
from minivlm.convert.minimind import read_config
from minivlm.model.loading import load_trained

PUBLISHED = {  # width, blocks, width of the MLP
    "minimind-3v": (768, 8, 2432),
    "minimind-3v-moe": (768, 8, 2432),
    "minimind2-v": (768, 16, 2048),
    "minimind2-small-v": (512, 8, 1408),
}


def expected_logits(name, tensors, parts, ids, image_token_id, pixels):
    """Return logits by the formulas; the picture's features come from the whole tower as transformers builds it."""
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    config = read_config(tensors, {}, multimodal=True)
    with torch.no_grad():
        features = parts[FORMATS[name][0]](pixels).last_hidden_state
    features = features[:, 1:] if FORMATS[name][0] == "linear" else features
    return formulas.logits(tensors, config, ids, image_token_id, features)


def prompt(model, pictures):
    ids = torch.arange(20, 60).remainder(200) + 3
    picture = torch.full((model.config.image_seq_length,), model.config.image_token_id)
    pieces = [piece for i in range(pictures) for piece in (picture, ids[i : i + 5])]
    return torch.cat([ids[:3], *pieces, ids[20:]])


@torch.no_grad()
@pytest.mark.parametrize("file", ["weights.pth", "weights.bin", "weights.safetensors", "folder"])
@pytest.mark.parametrize("name", PICTURED)
def test_minimind_v_gives_the_same_logits_and_goes_back_bit_for_bit(name, file, parts, tmp_path, capsys):
    tensors, out = make(name, parts, tmp_path, file)
    assert "picture and text: largest logit difference" in capsys.readouterr().out
    model, processor = load_trained(out)
    vocabulary, size = len(tensors["lm_head.weight"]), model.config.vision_config.image_size
    for pictures in (0, 1, 2):
        ids, pixels = prompt(model, pictures), make_pixels(pictures, size=size) if pictures else None
        expected = (
            expected_logits(name, tensors, parts, ids, model.config.image_token_id, pixels)
            if pictures
            else formulas.logits(tensors, read_config(tensors, {}, True), ids)
        )
        same(model(input_ids=ids[None], pixel_values=pixels).logits[0, :, :vocabulary], expected)
    main(["to_minimind", str(out), "--out", str(tmp_path / "back"), "--verify"])
    back = torch.load(next((tmp_path / "back").glob("*.pth")), weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PICTURED)
def test_half_precision_stays_as_it_is(name, dtype, parts, tmp_path):
    tensors, out = make(name, parts, tmp_path, dtype=dtype)
    assert load_trained(out)[0].dtype == dtype
    main(["to_minimind", str(out), "--out", str(tmp_path / "back"), "--verify"])
    back = torch.load(next((tmp_path / "back").glob("*.pth")), weights_only=True)
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == dtype for key in tensors)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, kind", [("minimind-3", "Qwen3"), ("minimind-3-moe", "Qwen3Moe"), ("minimind2", "Llama")]
)
def test_a_language_model_becomes_a_decoder_that_transformers_knows(name, kind, parts, tmp_path):
    tensors, out = make(name, parts, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert type(model).__name__ == f"{kind}ForCausalLM"
    ids = torch.arange(3, 40)
    same(model(input_ids=ids[None]).logits[0], formulas.logits(tensors, read_config(tensors, {}, False), ids))
    before = AutoTokenizer.from_pretrained(parts["folder"] / ("third" if FORMATS[name][1] else "second"))
    after = AutoTokenizer.from_pretrained(out)
    assert after.get_vocab() == before.get_vocab() and after.chat_template == before.chat_template


@pytest.mark.parametrize("name", ["minimind-3", "minimind-3-moe", "minimind2"])
def test_a_converted_language_model_is_joined_to_a_tower(name, parts, tmp_path, data, picture):
    _, decoder = make(name, parts, tmp_path)
    tower = ["--vision_model", str(parts["folder"] / "siglip_vision_model")]
    main(["build", *tower, "--text_model", str(decoder), "--out", str(tmp_path / "joined")])
    train_and_ask(tmp_path / "joined", data, picture(), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", PICTURED)
def test_a_model_made_here_runs_there(name, parts, tmp_path):
    """Changed weights under MiniMind's names give the same logits by MiniMind's formulas."""
    make(name, parts, tmp_path)
    model, processor = load_trained(tmp_path / "out")
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    main(["to_minimind", str(tmp_path / "trained"), "--out", str(tmp_path / "there"), "--verify"])
    tensors = torch.load(next((tmp_path / "there").glob("*.pth")), weights_only=True)
    kind = FORMATS[name][0]
    tower = type(parts[kind]).from_pretrained(tmp_path / "there" / "vision_model").eval()
    size = model.config.vision_config.image_size
    ids, pixels = prompt(model, 1), make_pixels(1, size=size)
    expected = expected_logits(name, tensors, {kind: tower}, ids, model.config.image_token_id, pixels)
    same(model(input_ids=ids[None], pixel_values=pixels).logits[0, :, : len(tensors["lm_head.weight"])], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, parts, tmp_path):
    hidden, layers, width = PUBLISHED[name]
    sizes = {"hidden": hidden, "layers": layers, "width": width, "vocabulary": 6400}
    tensors = make_source(name.replace("-small", ""), **sizes)
    torch.save(tensors, tmp_path / "weights.pth")
    base = name.replace("-small", "")
    main(["from_minimind", str(tmp_path / "weights.pth"), *options(base, parts, tmp_path / "out"), "--verify"])
    main(["to_minimind", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--verify"])
    back = torch.load(next((tmp_path / "back").glob("*.pth")), weights_only=True)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", PICTURED)
def test_prompts_and_pictures_are_minimind_s(name, parts, tmp_path, picture):
    make(name, parts, tmp_path)
    _, processor = load_trained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "What is me@here.org?"}]
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    question = "<|im_start|>user\n<|image_pad|>\nWhat is me@here.org?<|im_end|>\n<|im_start|>assistant\n"
    if FORMATS[name][0] == "linear":
        assert text == "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n" + question
    else:
        assert text == question + "<think>\n\n</think>\n\n"
    system = [{"role": "system", "content": "Be brief."}]
    assert processor.apply_chat_template(system + turns).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    answered = processor.apply_chat_template([*turns, {"role": "assistant", "content": "a cat"}])
    assert answered == text + "a cat<|im_end|>\n"  # a conversation goes on where the answer was
    inputs = processor(text=[text], images=[picture()], return_tensors="pt")
    tokens = {"mlp": 64, "linear": 196}[FORMATS[name][0]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    kind = {"mlp": SiglipImageProcessorPil, "linear": CLIPImageProcessorPil}[FORMATS[name][0]]
    theirs = kind.from_pretrained(parts["folder"] / parts[FORMATS[name][0]].config.model_type)
    same(inputs["pixel_values"], theirs(picture(), return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("name", PICTURED)
def test_a_converted_model_can_be_trained_and_asked(name, parts, tmp_path, data, picture):
    _, out = make(name, parts, tmp_path)
    final = train_and_ask(out, data, picture(), tmp_path)
    main(["to_minimind", str(final), "--out", str(tmp_path / "back"), "--verify"])


@pytest.mark.parametrize("name", FORMATS)
def test_what_weights_do_not_show_is_as_published(name):
    """The formulas read these from the same configuration, so comparing logits cannot find a wrong one."""
    config = read_config(make_source(name), {}, multimodal=True)
    assert config.rms_norm_eps == (1e-6 if FORMATS[name][1] else 1e-5)
    assert config.rope_parameters["rope_theta"] == 1e6 and config.hidden_act == "silu"
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, FORMATS[name][3])
    if FORMATS[name][2]:
        assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 1, True)
    stated = {"rms_norm_eps": 1e-4, "rope_theta": 5e5, "max_position_embeddings": 64}
    config = read_config(make_source(name), stated, multimodal=True)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-4, 5e5)
    assert config.max_position_embeddings == 64
