"""Train a tiny model with each example on a few rows, and check what the example promises."""

import importlib
import json
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig

from helpers.data import ENCODER, row, write
from helpers.models import ROOT, make_model, make_pixels, make_processor, make_prompt, same
from minivlm.data.encoder import IGNORE
from minivlm.data.rows import load_rows
from minivlm.model.packed_attention import NAME

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


@pytest.fixture
def unequal(tmp_path):
    """Write eight rows of unequal lengths with 0 to 2 pictures, and one that is too long; return the path."""
    rows = [row("word " * 7 * i, f"answer {i}. " * i, images=(0, 1, 2)[i % 3], seed=3 * i) for i in range(1, 9)]
    return write(tmp_path / "unequal.parquet", [*rows, row("word " * 400)])


def pack_without_learning(start, data, folder, *options):
    """Run the packed example at a learning rate of 0; return its trainer."""
    options = ("--max_steps", "-1", "--learning_rate", "0", "--pack_tokens", "256", "--max_length", "256", *options)
    return run("sft_trl_packed", start, data, folder, *options)


def loss_and_gradients(trainer, batch, answers):
    """Return TRL's loss of a batch, divided by `answers`, and the gradients."""
    trainer.model.zero_grad()
    batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(answers))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_packs_have_the_loss_and_gradients_of_their_rows_padded_and_alone(start, unequal, tmp_path):
    packed = pack_without_learning(start, unequal, tmp_path / "packed", "--max_steps", "1")
    assert packed.model.model.language_model.config._attn_implementation == NAME
    options = ("--max_steps", "1", "--learning_rate", "0")
    padded = run("sft_trl", start, unequal, tmp_path / "padded", *options)
    rows = [padded.train_dataset[i] for i in range(8)]
    batch = packed.data_collator(list(packed.train_dataset))
    answers = int((batch["labels"] != IGNORE).sum())
    loss, slopes = loss_and_gradients(packed, batch, answers)
    together = padded.data_collator(rows)
    assert int((together["labels"] != IGNORE).sum()) == answers
    assert together["input_ids"].numel() > batch["input_ids"].numel() == int(together["attention_mask"].sum())
    alone = [loss_and_gradients(padded, padded.data_collator([r]), answers) for r in rows]
    sums = {name: sum(found[name] for _, found in alone if name in found) for name in slopes}
    for wanted, found in (loss_and_gradients(padded, together, answers), (sum(part for part, _ in alone), sums)):
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert slopes.keys() == found.keys()
        for name, slope in slopes.items():
            same(slope, found[name], atol=1e-5)


def rows_of(batch) -> list[tuple[int, ...]]:
    """Return the token ids of each row in a batch of packs; rows begin where positions do."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
    return [tuple(part.tolist()) for part in torch.tensor_split(batch["input_ids"][0], starts)]


def test_packs_have_every_row_once_an_epoch_and_count_what_is_left_out(start, unequal, tmp_path, capsys):
    trainer = pack_without_learning(start, unequal, tmp_path / "out")
    out = capsys.readouterr().out
    assert "8 of 9 rows in" in out and "  1 x too long\n" in out
    samples = [ENCODER(load_rows([unequal]).sample(i)) for i in range(8)]
    wanted = Counter(tuple(sample["input_ids"].tolist()) for sample in samples)
    loader = trainer.get_train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert Counter(ids for batch in batches for ids in rows_of(batch)) == wanted
        assert sum(len(batch["pixel_values"]) for batch in batches) == sum(len(s["pixel_values"]) for s in samples)
    assert trainer.state.global_step == len(loader) > 1


def test_a_damaged_picture_is_named_and_packs_without_pictures_train(start, tmp_path, capsys):
    rows = [row(images=0), {**row(), "image_bytes": [b"damaged"]}]
    pack_without_learning(start, write(tmp_path / "rows.parquet", rows), tmp_path / "out")
    assert "rows.parquet, row 1: unreadable picture" in capsys.readouterr().out


def test_trl_itself_refuses_to_pack_pictures(start, choices, tmp_path, monkeypatch):
    example = importlib.import_module("sft_trl")
    for option, said in (
        ("packing", "Packing is not supported for"),
        ("padding_free", "Padding-free .* yet not supported"),
    ):
        monkeypatch.setattr(example, "SFTConfig", lambda o=option, **kw: SFTConfig(**kw, **{o: True}))
        with pytest.raises(ValueError, match=said):
            run("sft_trl", start, choices, tmp_path / "out", "--max_steps", "1")


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
