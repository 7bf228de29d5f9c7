"""Train a tiny model with each example on a few rows, and check what the example promises."""

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.data import row, write
from helpers.models import ROOT, make_model, make_pixels, make_processor, make_prompt

sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = make_model(text={"vocab_size": 6400, "initializer_range": 0.02}), make_processor()
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tokenizer.eos_token_id, 0
    model.config.text_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def choices(tmp_path):
    """Write two questions with options, and one without; return the path."""
    rows = [row(question=f"{w} or {r}?", answer=w, seed=i) for i, (w, r) in enumerate([("dog", "cat"), ("红", "蓝")])]
    for r, options in zip(rows, (["dog", "cat"], ["红", "蓝"])):
        r |= {"task": "choice", "options": options}
    return write(tmp_path / "rows.parquet", [*rows, row(answer="yes") | {"task": "other", "options": None}])


def run(name, start, data, folder, *options):
    example = importlib.import_module(name)
    base = ["--model", str(start), "--data", data, "--output_dir", str(folder), "--batch_size", "2"]
    return example.main([*base, *options])


def weights(folder):
    return load_file(folder / "model.safetensors")


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def test_sft_learns_the_assistants_words_alone(start, choices, tmp_path):
    trainer = run("sft_trl", start, choices, tmp_path / "out", "--max_steps", "30", "--learning_rate", "1e-2")
    tokenizer = AutoProcessor.from_pretrained(start, trust_remote_code=True).tokenizer
    said = set()
    for batch in trainer.get_train_dataloader():
        for labels in batch["labels"]:
            said.add(tokenizer.decode(labels[labels != -100]))
    assert said == {"dog<|im_end|>", "红<|im_end|>", "yes<|im_end|>"}
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0] - 2
    assert loaded(tmp_path / "out").config.model_type == "minivlm"


def test_dpo_widens_the_margin(start, choices, tmp_path):
    trainer = run("dpo_trl", start, choices, tmp_path / "out", "--max_steps", "12", "--learning_rate", "1e-3")
    assert len(trainer.train_dataset) == 2  # rows without options teach no preference
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > max(0.05, margins[0])


def test_grpo_rewards_right_answers_and_moves_the_weights(start, choices, tmp_path, monkeypatch):
    example = importlib.import_module("grpo_trl")
    said = [[{"role": "assistant", "content": text}] for text in (" Dog.", "cat", "红。")]
    assert example.exact_match(said, ["dog", "dog", "红"]) == [1.0, 0.0, 1.0]
    # A tiny model is never right; rewarding the length of what it says lets it learn something all the same.
    monkeypatch.setattr(
        example, "exact_match", lambda completions, **_: [float(len(c[0]["content"])) for c in completions]
    )
    options = ("--max_steps", "2", "--num_generations", "2", "--max_new_tokens", "6", "--learning_rate", "1e-3")
    trainer = run("grpo_trl", start, choices, tmp_path / "out", *options)
    assert trainer.state.global_step == 2
    before, after = weights(start), weights(tmp_path / "out")
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_lora_merges_into_what_the_adapter_gives(start, choices, tmp_path):
    from peft import PeftModel

    options = ("--max_steps", "10", "--learning_rate", "1e-2", "--merge")
    trainer = run("lora_peft", start, choices, tmp_path / "out", *options)
    learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name and "language_model" in name for name in learning)
    ids = make_prompt(2, "image", 6)
    inputs = {"input_ids": ids, "pixel_values": make_pixels(1)}
    adapted = PeftModel.from_pretrained(loaded(start), tmp_path / "out").eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
        torch.testing.assert_close(
            loaded(tmp_path / "out" / "merged")(**inputs).logits, expected, atol=1e-5, rtol=1e-5
        )
        assert (loaded(start)(**inputs).logits - expected).abs().max() > 1e-3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
