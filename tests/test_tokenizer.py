"""Tokenizer and chat template: ids, exact round trip, token cost, assistant mask, and training from frequencies."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPImageProcessorPil

from processing_minivlm import MiniVLMProcessor
from tools.train_tokenizer import (
    ALPHABET,
    BYTE_OF,
    SPECIAL,
    VISIBLE,
    build_tokenizer,
    learn_merges,
    pieces_of,
    splits_a_character,
)

ROOT = Path(__file__).resolve().parent.parent
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
tokenizer = AutoTokenizer.from_pretrained(ROOT)

# Text written for this test, after the vocabulary was fixed. The counts are those of MiniMind's tokenizer.json (6,400
# entries, repository jingyaogong/minimind-v): len(tokenizer.encode(text, add_special_tokens=False).ids) with the
# library `tokenizers` 0.23.3.
COSTS = {
    "zh caption": (
        93,
        "照片里，一位老爷爷坐在公园的长椅上喂鸽子，身后是一排高大的梧桐树，树叶已经变黄了。他戴着一顶黑色的帽子，"
        "脚边放着一个布袋。右边的小路上有个小男孩正骑着滑板车，天色看起来快要下雨了。",
    ),
    "zh answer": (
        98,
        "做水煮蛋很容易。先把鸡蛋从冰箱里取出，放到室温；然后在锅里加入冷水，水面要没过鸡蛋。大火烧开以后转小火，"
        "再煮八分钟左右。最后把鸡蛋捞出来放进凉水里，这样壳会更好剥。如果你喜欢溏心蛋，可以把时间缩短到五分钟。",
    ),
    "zh news": (
        90,
        "据当地媒体报道，受强降雨影响，该市多条道路出现积水，部分地铁线路一度停运。市政府随即启动应急预案，组织消防"
        "人员和志愿者转移了三千多名居民。气象部门预计，未来两天降雨将逐渐减弱，但仍需防范山体滑坡等次生灾害。",
    ),
    "en caption": (
        104,
        "An old man sits on a park bench feeding pigeons, with a row of tall maple trees behind him whose leaves "
        "have already turned yellow. He is wearing a black hat, and a cloth bag lies at his feet. On the path to "
        "the right a small boy rides a scooter, and it looks as if it is about to rain.",
    ),
    "en answer": (
        96,
        "Boiling an egg is easy. Take the eggs out of the fridge first and let them reach room temperature, then "
        "place them in a pot and cover them with cold water. Once the water boils, turn down the heat and cook them "
        "for about eight minutes. Finally, put them in cold water; that makes them easier to peel.",
    ),
    "en news": (
        102,
        "Local media reported that several roads in the city were flooded after heavy rain and that parts of the "
        "subway were closed for hours. More than three thousand residents were moved to safety by firefighters and "
        "volunteers. Forecasters expect the storm to weaken over the next two days but warn of landslides in the "
        "hills.",
    ),
}  # fmt: skip
LIMIT = 1.15

PICTURE = {"type": "image"}
CONVERSATION = [
    {"role": "system", "content": "Be brief. 请简短回答。"},
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "这是什么？"}]},
    {"role": "assistant", "content": "一只猫。"},
    {"role": "user", "content": [PICTURE, PICTURE, {"type": "text", "text": "And these?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": " Two dogs,\n\tone 🐕 black."}]},
    {"role": "user", "content": "assistant\n"},
    {"role": "assistant", "content": ""},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}


def text(string) -> dict:
    return {"type": "text", "text": string}


def render(messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def spoken(messages, **options) -> list[str]:
    """Return the texts that the assistant mask covers, one string per stretch."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    stretches, previous = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not previous:
            stretches.append([])
        if mask:
            stretches[-1].append(token)
        previous = mask
    return [tokenizer.decode(stretch) for stretch in stretches]


# The vocabulary


def test_named_tokens_have_the_ids_of_minimind():
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert sorted(tokenizer.get_vocab().values()) == list(range(6400))
    assert tokenizer.convert_ids_to_tokens(list(range(36))) == SPECIAL + VISIBLE
    ids = {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
        "<|image_pad|>": 12,
        "<tool_call>": 21,
        "</think>": 26,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_nothing_is_added_to_a_text():
    assert tokenizer("").input_ids == []
    assert tokenizer("cat").input_ids == tokenizer("cat", add_special_tokens=False).input_ids
    assert tokenizer("cat").input_ids[0] != tokenizer.bos_token_id


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_every_text_comes_back_exactly(string):
    assert tokenizer.decode(tokenizer(string).input_ids) == string


@pytest.mark.parametrize(
    "string", ["  a  b ", "don 't . , !", "\r\n\t\n", "e\u0301 é ﬁ Ⅷ ㍿", "👩‍🚀🇨🇳", "\x00\x7f\ufeff", "<|im_end|>"]
)
def test_texts_that_normalizers_change_come_back_exactly(string):
    assert tokenizer.decode(tokenizer(string).input_ids) == string


def test_decoding_drops_control_tokens_and_keeps_thoughts_and_calls():
    ids = tokenizer("<|im_start|><think>a</think><tool_call>b</tool_call><|image_pad|><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"


def test_every_digit_is_a_token_of_its_own():
    assert len(tokenizer("20261123").input_ids) == 8


def test_no_token_holds_a_character_and_a_part_of_another():
    """Streaming then never shows a garbled character, and the encoder can remove a separator that it put in a text."""
    named = set(SPECIAL + VISIBLE)
    assert not [token for token in tokenizer.get_vocab() if token not in named and splits_a_character(token)]
    assert splits_a_character("".join(c for byte in "中".encode() + b"\xe4" for c, b in BYTE_OF.items() if b == byte))


@pytest.mark.parametrize("kind", COSTS)
def test_cost_against_minimind(kind):
    minimind, string = COSTS[kind]
    cost = len(tokenizer(string).input_ids)
    assert cost <= LIMIT * minimind, f"{cost} tokens, MiniMind {minimind}"


# The files


def test_one_copy_of_the_template_serves_tokenizer_and_processor(tmp_path):
    assert "chat_template" not in json.loads((ROOT / "tokenizer_config.json").read_text("utf-8"))
    template = (ROOT / "chat_template.jinja").read_text("utf-8")
    assert tokenizer.chat_template == template
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(CLIPImageProcessorPil().to_json_string())
    (tmp_path / "processor_config.json").write_text('{"processor_class": "MiniVLMProcessor", "image_seq_length": 4}')
    processor = MiniVLMProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == processor.tokenizer.chat_template == template
    processor.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir() if template[:40] in path.read_text("utf-8")] == [
        "chat_template.jinja"
    ]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_the_files_load_without_a_warning(tmp_path, caplog, recwarn):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    assert not caplog.records and not recwarn.list


# The chat template


def test_mask_is_what_the_assistant_says_and_its_end():
    assert spoken(CONVERSATION) == ["一只猫。<|im_end|>", " Two dogs,\n\tone 🐕 black.<|im_end|>", "<|im_end|>"]
    assert spoken(CONVERSATION, add_generation_prompt=True) == spoken(CONVERSATION)


# A line break at the start may become one token with that of the header; `Encoder` keeps the two apart.
ANSWER = st.text().filter(lambda text: not text.startswith("\n"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), ANSWER), min_size=1, max_size=3))
def test_mask_is_exact_for_any_words(turns):
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert spoken(messages) == [f"{answer}<|im_end|>" for _, answer in turns]


def test_mask_covers_thought_and_calls():
    messages = user("q") + [{"role": "assistant", "reasoning_content": "hm", "content": "", "tool_calls": [CALL]}]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert spoken(messages, tools=TOOLS) == [f"<think>\nhm\n</think>\n\n{call}<|im_end|>"]


def test_rendering_is_chatml():
    assert render(CONVERSATION[:3], add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief. 请简短回答。<|im_end|>\n<|im_start|>user\n<|image_pad|>\n这是什么？<|im_end|>\n"
        "<|im_start|>assistant\n一只猫。<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}])
def test_more_messages_only_append(options):
    messages = CONVERSATION + [{"role": "assistant", "tool_calls": [CALL]}] + 2 * [{"role": "tool", "content": "晴"}]
    for n in range(1, len(messages)):
        assert render(messages, **options).startswith(render(messages[:n], **options))


@pytest.mark.parametrize(
    "content, string",
    [
        ([text("Q")], "Q"),
        ([text("Q"), text("R")], "QR"),
        ([PICTURE, text("Q")], "<|image_pad|>\nQ"),
        ([PICTURE, text("\nQ")], "<|image_pad|>\nQ"),
        ([PICTURE, PICTURE, text("Q")], "<|image_pad|>\n<|image_pad|>\nQ"),
        ([text("Q"), PICTURE, text("R")], "Q\n<|image_pad|>\nR"),
        ([text("Q\n"), PICTURE], "Q\n<|image_pad|>"),
        ([PICTURE, text("")], "<|image_pad|>"),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, text("Q")], "<|image_pad|>\nQ"),
    ],
)
def test_parts_render_as_the_string_with_markers(content, string):
    assert render(user(content)) == render(user(string))


def test_system_turn_is_optional_and_holds_the_tools():
    assert render(user("q")).startswith("<|im_start|>user\n")
    schema = json.dumps(TOOLS[0], ensure_ascii=False)
    for messages, start in ((user("q"), ""), ([{"role": "system", "content": "Hi."}, *user("q")], "Hi.\n\n")):
        rendered = render(messages, tools=TOOLS)
        assert rendered.count("<|im_start|>system") == 1 and rendered.startswith(f"<|im_start|>system\n{start}These")
        assert f"<tools>\n{schema}\n</tools>" in rendered


def test_calls_and_results():
    same = {"name": "weather", "arguments": '{"city": "北京"}'}  # without the wrapper, arguments as JSON text
    messages = user("q") + [
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, same]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    block = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    rendered = render(messages, tools=TOOLS)
    assert f"<|im_start|>assistant\nWait.\n{block}\n{block}<|im_end|>\n" in rendered
    assert "<|im_start|>user\n<tool_response>\n晴\n</tool_response><|im_end|>\n" in rendered
    assert spoken(messages, tools=TOOLS)[1] == "It is sunny.<|im_end|>"


def test_thinking():
    start = render(user("q"), add_generation_prompt=True)
    assert start.endswith("<|im_start|>assistant\n")
    assert render(user("q"), add_generation_prompt=True, enable_thinking=True) == start + "<think>\n"
    empty = render(user("q"), add_generation_prompt=True, enable_thinking=False)
    assert empty == start + "<think>\n\n</think>\n\n"
    answered = user("q") + [{"role": "assistant", "reasoning_content": "hm", "content": "a"}]
    assert render(answered) == start + "<think>\nhm\n</think>\n\na<|im_end|>\n"


@pytest.mark.parametrize("content", ["It is a", [text("It is a")]])
def test_the_final_message_can_be_continued(content):
    messages = user("q") + [{"role": "assistant", "content": content}]
    assert render(messages, continue_final_message=True).endswith("<|im_start|>assistant\nIt is a")


@pytest.mark.parametrize(
    "messages, named",
    [
        ([{"role": "narrator", "content": "q"}], "'narrator'"),
        (user([{"type": "video", "video": "a.mp4"}]), "'video'"),
        (user(["q"]), "content part"),
        (user({"text": "q"}), "a list of parts"),
        ([{"role": "user"}], "role 'user' has no content"),
        (user("q") + [{"role": "system", "content": "late"}], "Message 2 has role 'system'"),
        (user("q") + [{"role": "assistant", "content": [PICTURE]}], "holds an image"),
    ],
)
def test_what_cannot_be_rendered_is_named(messages, named):
    with pytest.raises(TemplateError, match=named):
        render(messages)


# Training

CORPUS = ["the cat sat on the mat.", "the dog sat on the cat.", "这是一只猫。", "这是一只狗。", "那是一只猫。"] * 3


def test_training_is_deterministic_and_ignores_the_order_of_texts():
    size = 20
    first = learn_merges(pieces_of(CORPUS), set(), size, min_support=1)
    again = learn_merges(pieces_of(CORPUS[::-1]), set(), size, min_support=1)
    assert first == again
    one, other = build_tokenizer(first), build_tokenizer(again)
    assert one.to_str() == other.to_str()
    assert one.get_vocab_size() == len(SPECIAL) + len(VISIBLE) + len(ALPHABET) + size
    assert one.decode(one.encode("the 狗 on ☃").ids) == "the 狗 on ☃"


def test_merges_are_those_of_byte_pair_encoding():
    """The example of Gage (1994), aaabdaaabac."""
    merges = learn_merges(Counter({"aaabdaaabac": 1}), set(), 3, min_support=1)
    assert [left + right for left, right in merges] == ["aa", "ab", "aaab"]


def test_a_frequency_counts_as_that_many_occurrences():
    counted = learn_merges(pieces_of({"low": 5, "lower": 2, "newest": 6, "widest": 3}), set(), 8, min_support=1)
    texts = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    assert counted == learn_merges(pieces_of(texts), set(), 8, min_support=1)


def test_a_frequent_sentence_is_not_learned_by_heart():
    counts = Counter({"abcdefgh": 1000, "xya": 1, "xyb": 1, "xyc": 1, "xyd": 1})
    assert learn_merges(counts, set(), 1, min_support=1) == [("a", "b")]
    assert learn_merges(counts, set(), 1, min_support=4) == [("x", "y")]
    assert learn_merges(counts, {"ab"}, 1, min_support=4) == [("a", "b")]  # unless a word list has it


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="allows 1 merges, 5 are wanted"):
        learn_merges(Counter({"ab": 3}), set(), 5, min_support=1)


def test_the_file_is_plain_byte_level_bpe():
    """It has no normalizer and no post-processor: the library `tokenizers` alone reads the same tokenizer."""
    plain = Tokenizer.from_file(str(ROOT / "tokenizer.json"))
    assert plain.normalizer is None and plain.post_processor is None
    assert plain.encode("A cat. 一只猫。").ids == tokenizer("A cat. 一只猫。").input_ids
