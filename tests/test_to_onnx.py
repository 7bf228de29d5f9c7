"""The ONNX graphs answer as the model does, at batches, lengths and pictures that the exporter never saw."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_convert import fails
from test_exports import save
from tiny import ROOT, make_pixels, make_prompt, same

from data_minivlm import decode_image
from scripts.convert.__main__ import main
from scripts.convert.to_onnx import VisionEncoder, compare, generate
from scripts.evaluate import load_trained

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    model = save(folder / "ours")
    main(["to_onnx", str(folder / "ours"), "--out", str(folder / "out"), "--verify"])
    return model, folder / "out"


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


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_graphs_give_the_same_logits_and_answers(prompt, exported):
    model, folder = exported
    rows, pictures = PROMPTS[prompt]
    inputs = pad_left(rows) | ({"pixel_values": make_pixels(pictures)} if pictures else {})
    tokens, logits = generate(folder, {key: value.numpy() for key, value in inputs.items()}, 12)
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
        tokens, _ = generate(folder, {key: value.numpy() for key, value in inputs.items()}, 12)
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
    save(tmp_path / "ours")
    monkeypatch.setattr(
        VisionEncoder, "forward", lambda self, pixel_values: next(p for p in pixel_values if p.sum() > 1)
    )
    out = tmp_path / "out"
    said = fails(["to_onnx", str(tmp_path / "ours"), "--out", str(out)], out)
    assert "cannot trace the vision_encoder of type 'clip_vision_model'" in said


@pytest.mark.slow
def test_the_released_model_answers_the_same(tmp_path):
    main(["to_onnx", str(ROOT), "--out", str(tmp_path / "out"), "--verify"])
    model, processor = load_trained(ROOT)
    rows = pq.read_table(ROOT / "data" / "test.parquet").slice(0, 20).to_pylist()
    for row in rows:
        picture = row["image_bytes"][0] if isinstance(row["image_bytes"], list) else row["image_bytes"]
        content = [
            {"type": "image", "image": decode_image(picture)},
            {"type": "text", "text": "这是什么？只回答名称。"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        tokens, _ = generate(tmp_path / "out", {key: value.numpy() for key, value in inputs.items()}, 24)
        expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert tokens.tolist() == expected.tolist()
