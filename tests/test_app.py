"""The page's logic: an answer streams and stops, users do not mix, names are ranked exactly."""

import copy
import re
from itertools import zip_longest
from math import exp

import pytest

from helpers.data import png
from helpers.models import ROOT
from minivlm.__main__ import main
from minivlm.app import names
from minivlm.app.names import Namer, beside, read_names
from minivlm.app.sentences import EXAMPLES, LANGUAGES, NAME_QUESTION, SENTENCES, preferred
from minivlm.app.talk import Talk
from minivlm.asking import question_about
from minivlm.commands.app import parse_args
from minivlm.inference import Decoding
from minivlm.reading import option_scores

# Conversations


@pytest.fixture
def pictures(tmp_path):
    """Write two pictures and return their paths."""
    for seed in (0, 1):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    return [tmp_path / f"{seed}.png" for seed in (0, 1)]


def reply(talk, assistant, shown, question, tokens=8):
    """Put a question and return all that `answer` yields."""
    talk.ask(shown, question)
    return list(talk.answer(assistant, Decoding(tokens)))


def test_an_answer_grows_and_the_next_question_knows_it(assistant, pictures):
    talk, messages = Talk(), []
    for shown, question in ((pictures, "What?"), ([], "And where?")):
        grown = reply(talk, assistant, shown, question)
        messages.append(question_about(shown, question))
        [answer] = assistant.answer([assistant.encode(messages)], Decoding(8))
        messages.append({"role": "assistant", "content": answer.text})
        assert grown[-1] == answer.text and len(grown) > 2
        assert all(longer.startswith(shorter) for shorter, longer in zip(grown, grown[1:]))
    contents = [row["content"] for row in talk.shown()]
    assert contents[:3] == [{"path": str(pictures[0])}, {"path": str(pictures[1])}, "What?"]
    assert [row["role"] for row in talk.shown()] == ["user"] * 3 + ["assistant", "user", "assistant"]
    assert talk.newest_picture() == pictures[1]


def begin(assistant, shown=()):
    """Ask, and take the first piece of a long answer; return the talk and the rest of the answer."""
    talk = Talk()
    talk.ask(list(shown), "What?")
    answer = talk.answer(assistant, Decoding(400))
    next(answer)
    return talk, answer


def test_two_users_do_not_mix(assistant, pictures):
    alone = [reply(Talk(), assistant, [picture], "What?") for picture in pictures]
    first = Talk()
    talks = [copy.deepcopy(first), copy.deepcopy(first)]  # as gradio does for each session
    for talk, picture in zip(talks, pictures):
        talk.ask([picture], "What?")
    answers = [talk.answer(assistant, Decoding(8)) for talk in talks]
    steps = list(zip_longest(*answers))  # in turn, a piece of each
    assert [[text for text in column if text is not None] for column in zip(*steps)] == alone and alone[0] != alone[1]
    assert not first.messages and len(talks[0].messages) == len(talks[1].messages) == 2


def test_stop_ends_the_computing_and_keeps_what_is_there(assistant):
    talk, answer = begin(assistant)
    stream = talk.stream
    talk.stop()
    assert not stream.thread.is_alive() and stream.tokens < 400
    *_, last = answer
    assert talk.shown()[-1] == {"role": "assistant", "content": last} and talk.stream is None
    assert reply(talk, assistant, [], "And?")


def test_a_forgotten_talk_shows_nothing_of_an_answer_that_just_ends(assistant, pictures):
    talk, answer = begin(assistant, pictures[:1])
    talk.forget()
    assert all(talk.shown(text) == [] for text in answer)
    assert talk.shown() == [] and talk.newest_picture() is None and talk.stream is None


def test_stop_in_the_queue_starts_nothing(assistant, monkeypatch):
    talk = Talk()
    talk.ask([], "What?")
    talk.stop()
    monkeypatch.setattr(assistant, "stream", lambda *_: pytest.fail("an answer was started"))
    assert not list(talk.answer(assistant, Decoding(8)))
    assert talk.waiting is None and [row["role"] for row in talk.shown()] == ["user", "assistant"]


def test_an_answer_that_nobody_reads_is_stopped(assistant):
    talk, answer = begin(assistant)
    stream = talk.stream
    answer.close()  # as when a browser is closed
    assert not stream.thread.is_alive() and stream.tokens < 400 and talk.stream is None


def test_a_wrong_file_is_an_error_and_the_talk_goes_on(assistant, pictures, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    talk = Talk()
    with pytest.raises(ValueError, match="unreadable picture: it is no PNG"):
        reply(talk, assistant, [tmp_path / "note.png"], "What?")
    assert not talk.shown() and talk.waiting is None
    assert reply(talk, assistant, pictures[:1], "What?") and talk.newest_picture() == pictures[0]


# Names


@pytest.mark.parametrize("language", NAME_QUESTION)
def test_the_names_are_those_of_the_table_in_exact_order(assistant, pictures, language):
    table = {
        "en": ["pig", "pig face", "red bus", "cat", "horse", "sun"],
        "zh": ["猪", "猪头", "马", "太阳", "猫", "狗"],
    }
    processor, messages = assistant.encoder.processor, [question_about(pictures[:1], NAME_QUESTION[language])]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    item = {"text": text, "images": pictures[:1], "options": table[language]}
    [scores] = option_scores(assistant.model, processor, [item])
    best = sorted(zip(scores, table[language]), reverse=True)[:4]
    found = Namer(assistant, table).likeliest(pictures[0], language, count=4)
    assert list(found) == [name for _, name in best]
    assert list(found.values()) == pytest.approx([exp(score) for score, _ in best], rel=1e-3)


def test_without_a_table_the_likeliest_answers_are_shown(assistant, pictures, tiny, monkeypatch):
    monkeypatch.setattr(names, "LONGEST", 2)
    table = read_names(beside(tiny, "data/concepts.json"))
    assert table == {"en": [], "zh": []}
    found = Namer(assistant, table).likeliest(pictures[0], "en")
    assert len(found) > 1 and list(found.values()) == sorted(found.values(), reverse=True)


def test_the_table_beside_a_model_is_read():
    table = read_names(beside(str(ROOT), "data/concepts.json"))
    assert "pig face" in table["en"] and "猪头" in table["zh"] and len(table["en"]) > 1000


# Words and options


def test_both_languages_have_the_same_sentences():
    assert SENTENCES["en"].keys() == SENTENCES["zh"].keys() and set(LANGUAGES.values()) == set(SENTENCES)
    assert all(re.search("[\u4e00-\u9fff]", text) for text in SENTENCES["zh"].values())
    assert not any(re.search("[\u4e00-\u9fff]", text) for text in SENTENCES["en"].values())
    assert all((ROOT / "data" / "examples" / name).is_file() for files, _ in EXAMPLES for name in files)


def test_the_language_of_the_browser_is_chosen():
    for header, language in {
        "zh-CN,zh;q=0.9,en": "zh",
        "en-US,zh;q=0.5": "en",
        "de": "en",
        "": "en",
        None: "en",
    }.items():
        assert preferred(header) == language


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("minivlm.commands.app.find_spec", lambda name: None)
    monkeypatch.setattr("minivlm.commands.app.load_assistant", lambda args: pytest.fail("a model was loaded"))
    assert main(["app"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install minivlm[app]" in error


def test_only_this_machine_is_served_unless_a_space_says_otherwise(monkeypatch):
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (parse_args([]).host, parse_args([]).port) == ("127.0.0.1", None)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7860")
    assert (parse_args([]).host, parse_args([]).port) == ("0.0.0.0", 7860)
