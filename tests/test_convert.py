"""Weights of MiniMind and MiniMind-V: in, out, and the same logits as their published formulas on either side."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_pixels, same
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)

import train_accelerate
from scripts.convert import formulas
from scripts.convert.__main__ import main
from scripts.convert.minimind import read_config
from scripts.evaluate import load_trained

# As published but for sizes: (projector, QK-norm, experts, key-value heads).
FORMATS = {
    "minimind-3v": ("mlp", True, 0, 4),
    "minimind-3v-moe": ("mlp", True, 4, 4),
    "minimind2-v": ("linear", False, 0, 2),
    "minimind-3": (None, True, 0, 4),
    "minimind-3-moe": (None, True, 4, 4),
    "minimind2": (None, False, 0, 2),
}
PICTURED = [name for name in FORMATS if FORMATS[name][0]]
PUBLISHED = {  # width, blocks, width of the MLP
    "minimind-3v": (768, 8, 2432),
    "minimind-3v-moe": (768, 8, 2432),
    "minimind2-v": (768, 16, 2048),
    "minimind2-small-v": (512, 8, 1408),
}


def make_source(name, hidden=32, layers=2, width=64, vocabulary=None, tower=16, dtype=torch.float32):
    """Random weights by MiniMind's names; the numbers of heads are those published."""
    projector, normed, experts, kv = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    vocabulary = vocabulary or (6400 if normed else 259)
    head = hidden // 8

    def matrix(*shape):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return (torch.randn(*shape, generator=generator) * scale + (len(shape) == 1)).to(dtype)

    def mlp(prefix):
        return {
            f"{prefix}gate_proj.weight": matrix(width, hidden),
            f"{prefix}up_proj.weight": matrix(width, hidden),
            f"{prefix}down_proj.weight": matrix(hidden, width),
        }

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "model.norm.weight": matrix(hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for part, rows in (("q", hidden), ("k", kv * head), ("v", kv * head), ("o", hidden)):
            tensors[f"{layer}self_attn.{part}_proj.weight"] = matrix(rows, hidden)
        for part in "qk" if normed else "":
            tensors[f"{layer}self_attn.{part}_norm.weight"] = matrix(head)
        for part in ("input", "post_attention"):
            tensors[f"{layer}{part}_layernorm.weight"] = matrix(hidden)
        if experts:
            tensors[f"{layer}mlp.gate.weight"] = matrix(experts, hidden)
        for expert in [f"experts.{e}." for e in range(experts)] or [""]:
            tensors |= mlp(f"{layer}mlp.{expert}")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    shapes = {
        "mlp": {"mlp.0": (tower,), "mlp.1": (hidden, tower), "mlp.3": (hidden, hidden)},
        "linear": {"vision_proj.0": (hidden, tower)},
    }.get(projector, {})
    for part, shape in shapes.items():
        tensors[f"vision_proj.{part}.weight"] = matrix(*shape)
        tensors[f"vision_proj.{part}.bias"] = matrix(shape[0]) - 1
    return tensors


def save(path, tensors):
    """By the format that the name asks for; a path without one is a transformers folder."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    elif path.suffix:
        torch.save(tensors, path)
    else:
        path.mkdir()
        torch.save(tensors, path / "pytorch_model.bin")
        hidden = tensors["model.embed_tokens.weight"].shape[1]
        (path / "config.json").write_text(json.dumps({"hidden_size": hidden, "num_attention_heads": 8}))
    return path


def options(name, parts, out):
    projector, normed, *_ = FORMATS[name]
    tower = ["--vision_model", str(parts["folder"] / parts[projector].config.model_type)] if projector else []
    return ["--tokenizer", str(parts["folder"] / ("third" if normed else "second")), *tower, "--out", str(out)]


def make(name, parts, tmp_path, file="weights.pth", **sizes):
    tensors = make_source(name, **sizes)
    source = save(tmp_path / file, tensors)
    main(["from_minimind", str(source), *options(name, parts, tmp_path / "out"), "--verify"])
    return tensors, tmp_path / "out"


def fails(command, out):
    """What is said, in one message and no traceback; nothing is left of what was begun."""
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert not out.exists() and not list(out.parent.glob("*.partial"))
    return str(stopped.value)


def expected_logits(name, tensors, parts, ids, image_token_id, pixels):
    """By the formulas, the picture's features by a tower that transformers built and nobody trimmed."""
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
def test_a_converted_language_model_gets_eyes(name, parts, tmp_path, data, picture):
    _, decoder = make(name, parts, tmp_path)
    tower = ["--vision_model", str(parts["folder"] / "siglip_vision_model")]
    main(["build", *tower, "--text_model", str(decoder), "--out", str(tmp_path / "joined")])
    train_and_ask(tmp_path / "joined", data, picture(), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", PICTURED)
def test_a_model_made_here_runs_there(name, parts, tmp_path):
    """Its tensors, by MiniMind's names and formulas, give its logits, though none of them came from there."""
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


def train_and_ask(folder, data, picture, tmp_path):
    """Two steps, and an answer to a question about a picture; returns the trained folder."""
    train = ["--model", str(folder), "--data", data, "--batch_size", "4", "--max_steps", "2", "--device", "cpu"]
    final = train_accelerate.main([*train, "--workers", "0", "--output_dir", str(tmp_path / "run")])
    before, _ = load_trained(folder)
    model, processor = load_trained(final)
    assert not torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 6 and model.config.image_token_id not in answer
    return final


@pytest.mark.parametrize("name", PICTURED)
def test_a_converted_model_can_be_trained_and_asked(name, parts, tmp_path, data, picture):
    _, out = make(name, parts, tmp_path)
    final = train_and_ask(out, data, picture(), tmp_path)
    main(["to_minimind", str(final), "--out", str(tmp_path / "back"), "--verify"])


@pytest.mark.parametrize("name", FORMATS)
def test_what_weights_do_not_show_is_as_published(name):
    """The formulas read these from the same configuration, so no comparison of logits would find one wrong."""
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
