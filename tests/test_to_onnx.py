"""The ONNX graphs answer as the model does, at batches, lengths and pictures that the exporter never saw."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from helpers.convert import fails
from helpers.exports import answers, first_pictures, read
from helpers.models import ROOT, make_pixels, make_prompt, same, save
from minivlm.commands.convert import main
from minivlm.convert import transformers_js
from minivlm.convert.onnx_graphs import VisionEncoder
from minivlm.convert.quantize import DTYPES, shrink
from minivlm.convert.to_onnx import compare
from minivlm.data.pictures import decode_image
from minivlm.onnx_engine.graphs import SUFFIXES, Graphs

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize(("dtype", "bits", "error"), [("int8", 8, 0.04), ("int4", 4, 0.4)])
def test_int8_and_int4_graphs_compute_in_so_many_bits_and_come_close(dtype, bits, error, tmp_path, exported):
    model, folder = exported
    shutil.copytree(folder, tmp_path / "out")
    shrink(tmp_path / "out", dtype)
    [path] = (tmp_path / "out" / "onnx").glob("decoder*")
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == sum(isinstance(m, torch.nn.Linear) for m in model.model.language_model.modules()) + 1
    assert {a.i for node in nodes for a in node.attribute if a.name == "bits"} == {bits}
    rows, pictures = PROMPTS["a padded batch"]
    inputs = {name: value.numpy() for name, value in pad_left(rows).items()}
    inputs["pixel_values"] = make_pixels(pictures).numpy()
    shown = inputs["attention_mask"].astype(bool)
    [(_, exact), (_, close)] = [Graphs(place).generate(inputs, 1) for place in (folder, tmp_path / "out")]
    difference = np.linalg.norm((close - exact)[shown]) / np.linalg.norm(exact[shown])
    assert error / 4 < difference < error


def test_the_command_writes_the_data_type_that_it_is_given(tmp_path, capsys):
    save(tmp_path / "ours")
    main(["to_onnx", str(tmp_path / "ours"), "--out", str(tmp_path / "out"), "--dtype", "int8", "--verify"])
    graphs = {path.name for path in (tmp_path / "out" / "onnx").iterdir()}
    assert graphs == {f"{name}{SUFFIXES[dtype]}.onnx" for name, dtype in DTYPES["int8"].items()}
    assert "the same greedy answer" in (told := capsys.readouterr().out) and "transformers.js" not in told


def pad_left(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = {
    "text": ([make_prompt(9)], 0),
    "a picture": ([make_prompt(3, "image", 5)], 1),
    "two pictures": ([make_prompt(3, "image", 5, "image", 2)], 2),
    "a padded batch": ([make_prompt(2, "image", 6, "image", 7), make_prompt(4), make_prompt(1, "image", 3)], 3),
}


def test_an_export_names_no_path_of_this_machine(exported):
    _, folder = exported
    here = str(ROOT).encode()
    assert not [path for path in folder.rglob("*") if path.is_file() and here in path.read_bytes()]


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_graphs_give_the_same_logits_and_answers(prompt, exported):
    model, folder = exported
    rows, pictures = PROMPTS[prompt]
    inputs = pad_left(rows) | ({"pixel_values": make_pixels(pictures)} if pictures else {})
    tokens, logits = Graphs(folder).generate({key: value.numpy() for key, value in inputs.items()}, 12)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert tokens.tolist() == expected.tolist()
    real = inputs["attention_mask"].bool()
    same(torch.from_numpy(logits)[real], model(**inputs).logits[real], atol=1e-4)


@torch.no_grad()
def test_an_answer_ends_where_the_model_s_does(exported, tmp_path):
    """An end of sequence stops its row, and the others go on; a suppressed token is never said."""
    model, folder = exported
    inputs = pad_left(PROMPTS["a padded batch"][0]) | {"pixel_values": make_pixels(3)}
    config, greedy = type(model.generation_config)(pad_token_id=5), {"max_new_tokens": 12, "do_sample": False}

    def ours():
        answers = model.generate(**inputs, **greedy, generation_config=config)
        return answers[:, inputs["input_ids"].shape[1] :]

    config.suppress_tokens = [ours()[1, 0].item()]
    said = ours()
    config.eos_token_id = [said[0, 3].item()]
    kept = (folder / "generation_config.json").read_text()
    config.save_pretrained(folder)
    try:
        tokens, _ = Graphs(folder).generate({key: value.numpy() for key, value in inputs.items()}, 12)
    finally:
        (folder / "generation_config.json").write_text(kept)
    assert tokens.tolist() == ours().tolist()
    assert config.suppress_tokens[0] not in tokens and (tokens[0] == 5).sum() >= 8


@pytest.mark.parametrize("decoder", [pytest.param("gemma3_text", marks=pytest.mark.slow), "qwen3_moe"])
def test_decoders_of_other_families(decoder, published, tmp_path):
    parts = ["--vision_model", str(published("dinov2")), "--text_model", str(published(decoder))]
    main(["build", *parts, "--out", str(tmp_path / "ours")])
    main(["to_onnx", str(tmp_path / "ours"), "--out", str(tmp_path / "out"), "--verify"])


def test_graphs_that_do_not_verify_are_refused(exported, monkeypatch):
    monkeypatch.setattr(np, "maximum", lambda positions, _: positions * 0)  # every token at position 0
    with pytest.raises(ValueError, match="Our logits and the graphs' differ"):
        compare(*exported)


def test_what_the_exporter_cannot_trace_is_said_and_not_kept(tmp_path, monkeypatch):
    save(tmp_path / "ours", text={"num_hidden_layers": 1})  # no other test has traced this one
    monkeypatch.setattr(
        VisionEncoder, "forward", lambda self, pixel_values: next(p for p in pixel_values if p.sum() > 1)
    )
    out = tmp_path / "out"
    said = fails(["to_onnx", str(tmp_path / "ours"), "--out", str(out)], out)
    assert "cannot trace the vision_encoder of type 'clip_vision_model'" in said


def test_transformers_js_finds_what_it_looks_for(exported, picture):
    """Its file names, a model class that it has, its count of image tokens, and the axis that it fills in."""
    model, folder = exported
    config, pictures = read(folder / "config.json"), read(folder / "preprocessor_config.json")
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llava", "qwen3")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == model.config.image_token_id
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert (pictures["processor_class"], pictures["image_processor_type"]) == ("LlavaProcessor", "CLIPImageProcessor")
    template = read(folder / "tokenizer_config.json")["chat_template"]
    assert template == (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    processor = read(folder / "processor_config.json")
    side = pictures["size"]["height"] // processor["patch_size"]
    assert side**2 + processor["num_additional_image_tokens"] == model.config.image_seq_length
    graphs = {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    assert {path.name for path in (folder / "onnx").iterdir()} == graphs
    for slot in onnx.load(folder / "onnx" / "decoder_model_merged.onnx").graph.input:
        assert slot.type.tensor_type.shape.dim[0].dim_param == "batch_size", slot.name
    # Python's processor of the same folder counts as many, though it reads the strategy, too.
    ids = AutoProcessor.from_pretrained(folder)(images=picture(), text="<|image_pad|>")["input_ids"][0]
    assert list(ids).count(model.config.image_token_id) == model.config.image_seq_length


def test_what_transformers_js_cannot_run_is_said_and_runs_in_onnxruntime(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers_js, "DECODERS", ["llama"])
    save(tmp_path / "ours", projector_layer_norm=True)
    main(["to_onnx", str(tmp_path / "ours"), "--out", str(tmp_path / "out"), "--verify"])
    said = [line for line in capsys.readouterr().out.splitlines() if "transformers.js" in line]
    assert len(said) == 1 and "cannot run it" in said[0] and "decoder of type 'qwen3'" in said[0]
    assert read(tmp_path / "out" / "config.json")["model_type"] == "minivlm"
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "out"
    main(["to_onnx", str(ROOT), "--out", str(folder), "--verify"])
    return folder


@pytest.mark.slow
def test_the_released_model_answers_the_same(released):
    for inputs, expected in answers(ROOT, first_pictures(), "这是什么？只回答名称。"):
        tokens, _ = Graphs(released).generate({key: value.numpy() for key, value in inputs.items()}, 24)
        assert tokens.tolist() == expected


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js and npm")
def test_transformers_js_answers_as_our_model_does(released, tmp_path):
    """The npm package itself, in Node: processor, prompt, graphs and loop are all its own."""
    environment = os.environ | {"ONNXRUNTIME_NODE_INSTALL": "skip"}  # a GPU's libraries, which are not needed
    subprocess.run(["npm", "install", "@huggingface/transformers@4.3"], cwd=tmp_path, env=environment, check=True)
    script = shutil.copy(Path(__file__).with_name("transformers_js.mjs"), tmp_path)
    files, text = sorted((ROOT / "data" / "examples").glob("*.png")), "What is this? Answer with the name."
    for i, picture in enumerate(first_pictures()):
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"picture": str(path), "text": text} for path in files]), encoding="utf-8")
    run = subprocess.run(["node", script, released, questions], cwd=tmp_path, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    shown = [decode_image(path.read_bytes()) for path in files]
    expected = [answer[0] for _, answer in answers(ROOT, shown, text)]
    assert (
        len(files) == 24
        and len({tuple(answer) for answer in expected}) > 8
        and json.loads(run.stdout.splitlines()[-1]) == expected
    )
