"""The GGUF files hold the model: its tensors, its tokens and its prompts; what llama.cpp cannot express is refused."""

import re

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import minivlm.convert.to_gguf
from helpers.convert import fails
from helpers.gguf import CASES, TEXTS, WIDE, read, write
from helpers.models import ROOT, SIGLIP, make_config, make_processor, save
from minivlm.benchmark.llama import MARKER
from minivlm.commands.convert import main
from minivlm.convert.gguf_text import chat_template, read_tokenizer
from minivlm.convert.gguf_vision import beyond_preprocessing

gguf = pytest.importorskip("gguf", reason="needs the package gguf (the extra `gguf`)")


def expected_tensors(model):
    """Return the weights by the names that the package gguf gives to Qwen3's and CLIP's, for a text and a vision file.

    The package has no names for LLaVA's projector: clip.cpp reads it as `mm.0` and `mm.2`.
    """
    text, vision = {}, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.text_config.num_hidden_layers)
    for name, weight in model.model.language_model.state_dict().items():
        text[names.get_name(f"model.{name}", try_suffixes=(".weight",))] = weight
    if not model.config.tie_word_embeddings:
        text["output.weight"] = model.lm_head.weight
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.config.num_vision_layers)
    for name, weight in model.model.vision_tower.state_dict().items():
        vision[names.get_name(f"vision_tower.vision_model.{name}", try_suffixes=(".weight", ".bias"))] = weight
    for name, weight in model.model.multi_modal_projector.state_dict().items():
        vision[name.replace("linear_1", "mm.0").replace("linear_2", "mm.2")] = weight
    return text, vision


@pytest.mark.parametrize("case", CASES)
def test_f32_files_hold_the_weights_bit_for_bit(case, tmp_path):
    model, folder = write(tmp_path, "--outtype", "f32", **CASES[case])
    for name, expected in zip(("model-F32.gguf", "mmproj-F32.gguf"), expected_tensors(model)):
        _, tensors, kinds = read(folder / name)
        added = tensors.keys() - expected.keys()
        assert expected.keys() <= tensors.keys() and set(kinds.values()) == {"F32"}
        assert added == ({"mm.0.bias", "mm.2.bias"} if case == "untied, no bias" and "mmproj" in name else set())
        assert not any(tensors[bias].any() for bias in added)
        for key, weight in expected.items():
            assert torch.equal(tensors[key], weight), key


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
def test_half_and_8_bits_are_within_their_rounding(outtype, tmp_path):
    """A vector keeps all its bits; q8_0 rounds to 127 steps of the largest number among 32."""
    model, folder = write(tmp_path, "--outtype", outtype, text=WIDE, vision=WIDE)
    for name, expected in zip(("model", "mmproj"), expected_tensors(model)):
        metadata, tensors, kinds = read(folder / f"{name}-{outtype.upper()}.gguf")
        assert metadata["general.file_type"] == {"f16": 1, "q8_0": 7}[outtype]
        for key, weight in expected.items():
            error = (tensors[key] - weight).abs()
            if weight.ndim == 1 or key == "v.position_embd.weight":
                assert kinds[key] == "F32" and not error.any(), key
            elif outtype == "f16" or weight.ndim == 4:
                assert kinds[key] == "F16" and torch.equal(tensors[key], weight.half().float()), key
            else:
                step = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
                assert kinds[key] == "Q8_0" and (error.unflatten(-1, (-1, 32)) <= 0.57 * step).all(), key


def test_rows_that_hold_no_whole_blocks_stay_at_16_bits(tmp_path):
    _, folder = write(tmp_path, "--outtype", "q8_0")  # the tower of the tests is 16 wide
    _, _, kinds = read(folder / "mmproj-Q8_0.gguf")
    assert kinds["v.blk.0.attn_q.weight"] == "F16" and kinds["v.blk.0.ffn_down.weight"] == "Q8_0"


def test_numbers_beyond_16_bits_are_refused(tmp_path):
    model = save(tmp_path / "ours", vision=SIGLIP)
    model.model.multi_modal_projector.linear_1.weight.data[3, 5] = 7e4
    model.save_pretrained(tmp_path / "ours")
    said = fails(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")], tmp_path / "out")
    assert "mm.0.weight" in said and "--outtype f32" in said
    main(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out"), "--outtype", "f32"])


def test_sizes_are_those_of_the_model(tmp_path):
    model, folder = write(tmp_path, text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    text, vision = model.config.text_config, model.config.vision_config
    metadata, _, _ = read(folder / "model-F16.gguf")
    keys, attention = gguf.Keys.LLM, gguf.Keys.Attention
    assert metadata["general.architecture"] == "qwen3" and metadata["general.type"] == "model"
    expected = {
        keys.BLOCK_COUNT: text.num_hidden_layers,
        keys.CONTEXT_LENGTH: text.max_position_embeddings,
        keys.EMBEDDING_LENGTH: text.hidden_size,
        keys.FEED_FORWARD_LENGTH: text.intermediate_size,
        keys.VOCAB_SIZE: 6400,
        attention.HEAD_COUNT: text.num_attention_heads,
        attention.HEAD_COUNT_KV: text.num_key_value_heads,
        attention.KEY_LENGTH: text.head_dim,
        attention.VALUE_LENGTH: text.head_dim,
        attention.LAYERNORM_RMS_EPS: pytest.approx(text.rms_norm_eps),
        gguf.Keys.Rope.FREQ_BASE: 1e4,
    }
    for key, value in expected.items():
        assert metadata[key.format(arch="qwen3")] == value, key
    assert metadata["general.sampling.temp"] == 0
    metadata, tensors, _ = read(folder / "mmproj-F16.gguf")
    keys = gguf.Keys.ClipVision
    assert metadata["general.architecture"] == "clip" and metadata["general.type"] == "mmproj"
    expected = {
        gguf.Keys.Clip.HAS_VISION_ENCODER: True,
        gguf.Keys.Clip.PROJECTOR_TYPE: "mlp",
        gguf.Keys.ClipVision.USE_GELU: True,
        keys.IMAGE_SIZE: 32,
        keys.PATCH_SIZE: 16,
        keys.EMBEDDING_LENGTH: vision.hidden_size,
        keys.FEED_FORWARD_LENGTH: vision.intermediate_size,
        keys.PROJECTION_DIM: text.hidden_size,
        keys.Attention.HEAD_COUNT: vision.num_attention_heads,
        keys.Attention.LAYERNORM_EPS: pytest.approx(vision.layer_norm_eps),
        keys.IMAGE_MEAN: pytest.approx([0.48145466, 0.4578275, 0.40821073]),
        keys.IMAGE_STD: pytest.approx([0.26862954, 0.26130258, 0.27577711]),
    }
    for key, value in expected.items():
        assert metadata[key] == value, key
    # All blocks of the file are read: the graph would leave out the last one without the list.
    blocks = {name.split(".")[2] for name in tensors if name.startswith("v.blk.")}
    assert blocks == {"0", "1"} and metadata[keys.BLOCK_COUNT] == 2 and metadata["clip.vision.feature_layer"] == [2]


def test_a_square_mlp_has_its_matrices_swapped(tmp_path):
    """clip.cpp takes an `ffn_down` with as many inputs as the tower is wide for an old file's, and swaps the two."""
    model, folder = write(tmp_path, "--outtype", "f32", vision={"intermediate_size": 16}, vision_feature_layer=-1)
    _, tensors, _ = read(folder / "mmproj-F32.gguf")
    block = model.model.vision_tower.encoder.layers[0].mlp
    assert torch.equal(tensors["v.blk.0.ffn_down.weight"], block.fc1.weight)
    assert torch.equal(tensors["v.blk.0.ffn_up.bias"], block.fc2.bias)


def test_a_tokenizer_made_from_the_file_gives_the_same_ids(tmp_path):
    _, folder = write(tmp_path)
    metadata, _, _ = read(folder / "model-F16.gguf")
    keys = gguf.Keys.Tokenizer
    tokens, types = metadata[keys.LIST], metadata[keys.TOKEN_TYPE]
    assert len(tokens) == 6400 and metadata[keys.MODEL] == "gpt2" and metadata[keys.PRE] == "qwen2"
    merges = [tuple(merge.split(" ")) for merge in metadata[keys.MERGES]]
    rebuilt = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # The pattern of LLAMA_VOCAB_PRE_TYPE_QWEN2 in llama.cpp's src/llama-vocab.cpp.
    pattern = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    rebuilt.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    for token, kind in zip(tokens, types):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            rebuilt.add_tokens([AddedToken(token, special=kind == gguf.TokenType.CONTROL, normalized=False)])
    ours = make_processor().tokenizer
    for text in TEXTS:
        assert rebuilt.encode(text).ids == ours.encode(text, add_special_tokens=False), text


def test_special_tokens_end_answers_and_are_not_added(tmp_path):
    model, folder = write(tmp_path)
    metadata, _, _ = read(folder / "model-F16.gguf")
    keys = gguf.Keys.Tokenizer
    tokens, types = metadata[keys.LIST], metadata[keys.TOKEN_TYPE]
    assert tokens[metadata[keys.EOS_ID]] == "<|im_end|>" and tokens[metadata[keys.BOS_ID]] == "<|im_start|>"
    assert not metadata[keys.ADD_BOS] and not metadata[keys.ADD_EOS]
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"):
        assert types[tokens.index(token)] == gguf.TokenType.CONTROL
    assert types[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED and types[100] == gguf.TokenType.NORMAL


def test_what_is_never_said_is_never_said_there(tmp_path):
    model = save(tmp_path / "ours", vision=SIGLIP)
    model.generation_config.suppress_tokens = [12]
    model.generation_config.save_pretrained(tmp_path / "ours")
    main(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
    metadata, _, _ = read(tmp_path / "out" / "model-F16.gguf")
    assert metadata["tokenizer.ggml.suppress_tokens"] == [12]


def test_embeddings_without_a_token_are_unused(tmp_path):
    model = save(tmp_path / "ours", vision=SIGLIP)
    model.resize_token_embeddings(6410)
    model.save_pretrained(tmp_path / "ours")
    main(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
    metadata, tensors, _ = read(tmp_path / "out" / "model-F16.gguf")
    assert len(tensors["token_embd.weight"]) == len(metadata["tokenizer.ggml.tokens"]) == 6410
    assert set(metadata["tokenizer.ggml.token_type"][6400:]) == {gguf.TokenType.UNUSED}


IMAGE = {"type": "image"}
SERVED = {"type": "media_marker", "text": MARKER}  # as llama-server gives a picture to the template


@pytest.mark.parametrize("thinking", [True, False, None])
def test_prompts_are_ours_whatever_llama_cpp_says_about_thoughts(thinking):
    processor = make_processor()
    template, ours = chat_template(processor.chat_template)
    assert ours
    question = {"type": "text", "text": "What is this?"}
    for content in ("Hello", [question], [IMAGE, question], [question, IMAGE], [IMAGE, IMAGE, question]):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        turns += [{"role": "assistant", "content": "A pig."}, {"role": "user", "content": "Sure?"}]
        expected = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if not isinstance(content, str):
            turns[1]["content"] = [SERVED if part is IMAGE else part for part in content]
        prompt = processor.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        assert prompt == expected.replace("<|image_pad|>", MARKER)


def test_llama_cpp_finds_that_the_template_reads_parts():
    """It renders an empty list of parts, and looks whether the template walked through it."""
    import jinja2

    class Parts(list):
        def __iter__(self):
            walked.append(True)
            return super().__iter__()

    walked = []
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = re.sub(r"\{%-? (end)?generation %\}", "", chat_template(make_processor().chat_template)[0])
    environment.from_string(template).render(messages=[{"role": "user", "content": Parts()}])
    assert walked


def test_another_template_is_kept_and_said(tmp_path, capsys):
    save(tmp_path / "ours", vision=SIGLIP)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "ours" / "chat_template.jinja").write_text(template)
    main(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
    assert "not ours" in capsys.readouterr().out
    metadata, _, _ = read(tmp_path / "out" / "model-F16.gguf")
    assert metadata["tokenizer.chat_template"].endswith(template)


def test_ollama_s_modelfile_names_the_files(tmp_path):
    _, folder = write(tmp_path, "--outtype", "q8_0")
    text = (folder / "Modelfile").read_text()
    names = re.findall(r"^FROM \./(.+)$", text, re.M)
    assert names == ["model-Q8_0.gguf", "mmproj-Q8_0.gguf"] and {*names, "Modelfile"} == {
        p.name for p in folder.iterdir()
    }
    turn = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
    assert turn in text and text.count('PARAMETER stop "<|im_end|>"') == 1


DINO = {"model_type": "dinov2", "image_size": 28, "patch_size": 14}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"vision": DINO}, "a tower of type 'dinov2'"),
        ({"projector_layer_norm": True}, "projector_layer_norm=True"),
        ({"projector_type": "linear"}, "projector_type='linear'"),
        ({"pixel_shuffle_factor": 2}, "pixel_shuffle_factor=2"),
        ({"projector_hidden_act": "silu"}, "projector_hidden_act='silu'"),
        ({"vision": {"hidden_act": "relu"}}, "hidden_act='relu' in the tower"),
        ({"vision": {"model_type": "clip_vision_model"}}, "issue 25814"),
        ({"text": {"rope_parameters": YARN}}, "rope_type='yarn'"),
        ({"text": {"attention_bias": True}}, "attention_bias=True"),
        ({"text": {"hidden_act": "gelu"}}, "hidden_act='gelu'"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_before_any_work(options, said, tmp_path, monkeypatch):
    options = dict(options)
    save(tmp_path / "ours", vision=SIGLIP | options.pop("vision", {}), **options)
    monkeypatch.setattr(minivlm.convert.to_gguf, "load_trained", lambda source: pytest.fail("the weights were loaded"))
    message = fails(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")], tmp_path / "out")
    assert said in message and ("to_causal_lm" if "text" in options else "--text_only") in message


def test_another_decoder_is_refused(published, tmp_path):
    parts = ["--vision_model", str(published("siglip_vision_model")), "--text_model", str(published("llama"))]
    main(["build", *parts, "--out", str(tmp_path / "ours")])
    command = ["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out"), "--text_only"]
    message = fails(command, tmp_path / "out")
    assert "a decoder of type 'llama'" in message and "to_causal_lm" in message


def test_a_qwen3_with_another_tokenizer_is_written(published, tmp_path):
    """Decoders that were joined by name are Qwen3 itself; this one splits texts as GPT-2 does."""
    parts = ["--vision_model", str(published("siglip_vision_model")), "--text_model", str(published("qwen3"))]
    main(["build", *parts, "--out", str(tmp_path / "ours")])
    main(["to_gguf", str(tmp_path / "ours"), "--out", str(tmp_path / "out")])
    metadata, _, _ = read(tmp_path / "out" / "model-F16.gguf")
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"


def test_a_tokenizer_that_splits_in_another_way_is_refused():
    processor = make_processor()
    processor.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="llama.cpp has no name for how this tokenizer splits a text"):
        read_tokenizer(processor)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"do_normalize": False}, "do_normalize=False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor="),
        ({"size": {"height": 48, "width": 48}}, "another size than the tower's 32 pixels"),
        (
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
            "another size",
        ),
    ],
)
def test_other_preprocessing_is_refused(changes, said):
    processor = make_processor()
    vision = make_config(vision=SIGLIP).vision_config
    assert not beyond_preprocessing(processor, vision)
    for name, value in changes.items():
        setattr(processor.image_processor, name, value)
    [problem] = beyond_preprocessing(processor, vision)
    assert said in problem


def test_a_tower_with_a_class_token_is_written_by_force(tmp_path, capsys):
    vision = {"model_type": "clip_vision_model"}
    model, folder = write(tmp_path, "--force", "--outtype", "f32", vision=vision)
    assert "issue 25814" in capsys.readouterr().out
    metadata, tensors, _ = read(folder / "mmproj-F32.gguf")
    assert "clip.use_gelu" not in metadata  # CLIP has quick GELU
    for key, weight in expected_tensors(model)[1].items():
        assert torch.equal(tensors[key], weight), key
    assert {"v.class_embd", "v.pre_ln.weight"} <= tensors.keys()


def test_the_decoder_of_the_released_model_is_written_alone(tmp_path, capsys):
    message = fails(["to_gguf", str(ROOT), "--out", str(tmp_path / "out")], tmp_path / "out")
    assert "a tower of type 'resnet'" in message and "--text_only" in message
    main(["to_gguf", str(ROOT), "--out", str(tmp_path / "out"), "--text_only"])
    assert "without pictures" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-F16.gguf", "Modelfile"}
    assert "mmproj" not in (tmp_path / "out" / "Modelfile").read_text()


def test_without_the_package_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails(["to_gguf", str(ROOT), "--out", str(tmp_path / "out")], tmp_path / "out")
    assert "pip install gguf" in message
