"""How a folder answers by default: in batches, to prompts with pictures, and from every command that writes one."""

import pytest
from transformers import AutoTokenizer, GenerationConfig, pipeline

from helpers.families import plain_tokenizer
from helpers.minimind import PICTURED, make
from helpers.models import ROOT
from helpers.training import run
from minivlm.commands.convert import main
from minivlm.data.pictures import decode_image
from minivlm.data.rows import load_rows
from minivlm.model.backbones import MAX_NEW_TOKENS, generation_defaults
from minivlm.model.loading import load_trained


@pytest.fixture(scope="module")
def questions():
    """24 conversations of the embedded test data, on pictures of their own, without the answers."""
    rows = load_rows([str(ROOT / "data" / "test.parquet")])
    samples = [rows.sample(i) for i in range(0, len(rows), len(rows) // 24)][:24]
    turns = []
    for sample in samples:
        pictures = iter(sample["images"])
        *asked, _ = sample["messages"]
        for message in asked:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = decode_image(next(pictures))
        turns.append(asked)
    return turns


def test_the_released_model_answers_in_a_batch_as_alone(questions):
    ask = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True, device="cpu")
    options = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}
    together = [answer[0]["generated_text"] for answer in ask(text=questions, batch_size=8, **options)]
    alone = [ask(text=[turns], **options)[0][0]["generated_text"] for turns in questions]
    assert together == alone and len(set(alone)) > 8


@pytest.mark.parametrize("width", [1, 2, 10])
def test_prompt_lookup_gives_the_greedy_answer(width, questions):
    """It drafts what follows a match in the prompt; with one token, often the pictures' placeholders."""
    model, processor = load_trained(ROOT)
    options = {"max_new_tokens": 32, "do_sample": False}
    for turns in questions:
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        drafted = model.generate(**inputs, **options, prompt_lookup_num_tokens=width)
        assert drafted.tolist() == model.generate(**inputs, **options).tolist()


def check(folder, pictures=True):
    """Assert what a prompt and its answer need from a saved folder."""
    tokenizer, defaults = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert (defaults.eos_token_id, defaults.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    if pictures:
        assert defaults.suppress_tokens == [tokenizer.convert_tokens_to_ids("<|image_pad|>")]
        assert defaults.max_new_tokens == MAX_NEW_TOKENS


def test_the_released_folder_answers_by_our_defaults():
    check(ROOT)
    model, processor = load_trained(ROOT)
    assert (
        model.generation_config.to_diff_dict() == generation_defaults(model.config, processor.tokenizer).to_diff_dict()
    )


def test_trained_folders_answer_by_our_defaults(data, tmp_path):
    plain_tokenizer().save_pretrained(tmp_path / "tokenizer")
    final = run(data, tmp_path / "run", "--tokenizer", str(tmp_path / "tokenizer"), "--max_steps", "1")
    check(final)
    check(run(data, tmp_path / "again", "--model_config", "{}", "--model", str(final), "--max_steps", "1"))


def test_joined_and_exported_folders_answer_by_our_defaults(published, tmp_path):
    parts = ["--vision_model", str(published("siglip_vision_model")), "--text_model", str(published("qwen3"))]
    main(["build", *parts, "--out", str(tmp_path / "ours"), "--model_config", '{"vision_feature_layer": -1}'])
    check(tmp_path / "ours")
    for command in ("to_llava", "to_causal_lm"):
        main([command, str(tmp_path / "ours"), "--out", str(tmp_path / command)])
        check(tmp_path / command)


@pytest.mark.parametrize("name", ["minimind-3v", "minimind2-v", "minimind2"])
def test_converted_folders_answer_by_our_defaults(name, parts, tmp_path):
    check(make(name, parts, tmp_path)[1], pictures=name in PICTURED)
