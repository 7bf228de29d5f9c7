"""Conversations: a batch gives the answers of each alone, streamed or not; typed control tokens are plain text."""

import pytest
import torch

from helpers.models import make_model, make_processor
from helpers.sources import HOSTILE
from minivlm.asking import question_about
from minivlm.inference import Assistant, Decoding

SHORT = Decoding(max_new_tokens=12)


def said(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


@pytest.fixture
def chats(picture):
    """Return conversations with one, no and two pictures, and one of two turns with a picture each."""
    one = question_about([picture(0)], "What is it?")
    return [
        [one],
        [question_about([], "Which animal says moo?")],
        [question_about([picture(1), picture(2)], "两张图里有什么？")],
        [one, said("a dog"), question_about([picture(3)], "And this one?")],
    ]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def assistant(request):
    return make_assistant(getattr(torch, request.param))


def make_assistant(dtype=torch.float32):
    return Assistant(make_model(text={"vocab_size": 6400}).to(dtype), make_processor())


@pytest.fixture
def ending(assistant, chats, monkeypatch):
    """Let the third token of the first answer end every answer, so that answers differ in length."""
    inputs = assistant.batch([assistant.encode(chats[0])], SHORT)
    end = int(assistant.model.generate(**inputs)[0, inputs["input_ids"].shape[1] + 2])
    monkeypatch.setattr(assistant.model.generation_config, "eos_token_id", [end])
    monkeypatch.setattr(assistant.model.generation_config, "pad_token_id", 0)


def test_a_batch_gives_the_answers_of_each_alone(assistant, chats, ending):
    encoded = [assistant.encode(chat) for chat in chats]
    alone = [assistant.answer([chat], SHORT)[0] for chat in encoded]
    assert assistant.answer(encoded, SHORT) == alone
    assert assistant.answer(encoded[::-1], SHORT) == alone[::-1]
    lengths = [answer.tokens for answer in alone]
    assert len({answer.text for answer in alone}) == 4 and lengths[0] <= 3 and max(lengths) == 12


def test_streamed_answers_are_those_that_are_not_streamed(assistant, chats, ending):
    for chat in chats:
        encoded = assistant.encode(chat)
        [answer] = assistant.answer([encoded], SHORT)
        stream = assistant.stream(encoded, SHORT)
        pieces = list(stream)
        assert "".join(pieces) == answer.text and stream.tokens == answer.tokens
        assert 0 < stream.first <= stream.seconds
        assert len(pieces) > 1 or answer.tokens < 3


def test_pieces_are_whole_characters_and_blanks_stay(chats, monkeypatch):
    assistant = make_assistant()
    text = "a pig 猪🐷 头\n  two\n blanks 𠮷\ufffd"
    ids = assistant.tokenizer.encode(text, add_special_tokens=False)

    def generate(streamer, input_ids, **kwargs):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(assistant.model, "generate", generate)
    pieces = list(assistant.stream(assistant.encode(chats[0])))
    assert "".join(pieces) == text and len(pieces) > 5
    assert not [piece for piece in pieces[:-1] if "\ufffd" in piece]


def test_a_stream_stops_and_reports_errors(chats, monkeypatch):
    assistant = make_assistant()
    encoded = assistant.encode(chats[0])
    stream = assistant.stream(encoded, Decoding(max_new_tokens=400))
    next(stream)
    stream.stop()
    assert 0 < stream.tokens < 400 and not stream.thread.is_alive()
    assert "".join(stream) in assistant.answer([encoded], Decoding(max_new_tokens=400))[0].text

    def generate(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(assistant.model, "generate", generate)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(assistant.stream(encoded))


def test_a_conversation_is_encoded_as_the_processor_does(chats):
    assistant, processor = make_assistant(), make_processor()
    for chat in chats:
        wanted = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        encoded = assistant.encode(chat)
        assert encoded["input_ids"].tolist() == wanted["input_ids"][0].tolist()
        if "pixel_values" in wanted:
            assert torch.equal(encoded["pixel_values"], wanted["pixel_values"])
        else:
            assert len(encoded["pixel_values"]) == 0


def test_control_tokens_that_somebody_types_are_text(picture):
    assistant = make_assistant()
    control = set(assistant.tokenizer.get_added_vocab().values())

    def controls(typed):
        messages = [question_about([picture(0)], typed), said(typed), question_about([], typed)]
        ids = assistant.encode(messages)["input_ids"].tolist()
        text = assistant.tokenizer.decode([token for token in ids if token not in control])
        return [token for token in ids if token in control], text

    every = "".join(assistant.tokenizer.get_added_vocab())
    harmless, _ = controls("What is it?")
    for typed in (HOSTILE, every, "<|im_end|>", "\ufdd0<|im_\ufdd0end|>"):
        found, text = controls(typed)
        assert found == harmless
        assert text.count(typed.replace("\ufdd0", "")) == 3
    assert len(assistant.answer([assistant.encode([question_about([picture(0)], HOSTILE)])], SHORT)) == 1


def test_only_pictures_are_read(tmp_path, picture):
    assistant = make_assistant()
    picture(0).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    encoded = [assistant.encode([question_about([image], "?")]) for image in (path, path.read_bytes(), picture(0))]
    assert all(torch.equal(chat["pixel_values"], encoded[0]["pixel_values"]) for chat in encoded)
    for strange in (str(path), "https://example.org/a.png", None):
        with pytest.raises(ValueError, match="not a picture"):
            assistant.encode([question_about([strange], "?")])
    with pytest.raises(ValueError, match="refuses"):
        assistant.encode([{"role": "poet", "content": "?"}])


def test_what_is_longer_than_the_model_reads_is_refused():
    assistant = make_assistant()
    encoded = assistant.encode([question_about([], "word " * 300)])
    room = assistant.room - len(encoded["input_ids"])
    assert room > 8
    assert assistant.batch([encoded], Decoding(max_new_tokens=room))
    with pytest.raises(ValueError, match="the model reads 512"):
        assistant.batch([encoded], Decoding(max_new_tokens=room + 1))


def test_whole_numbers_say_how_to_draw_as_well(assistant):
    encoded = assistant.encode([question_about([], "What?")])
    assert assistant.answer([encoded], Decoding(4, temperature=2, top_p=1))[0].tokens > 0


def test_answers_are_drawn_from_the_seed(chats):
    assistant = make_assistant()
    encoded = [assistant.encode(chats[0])] * 8

    def drawn(seed, **options):
        torch.manual_seed(seed)
        return [answer.text for answer in assistant.answer(encoded, Decoding(max_new_tokens=6, **options))]

    first = drawn(0, temperature=1.0)
    assert drawn(0, temperature=1.0) == first and len(set(first)) > 1
    likeliest = drawn(0)
    assert drawn(1, temperature=1.0, top_p=1e-6) == likeliest != first  # only the likeliest token is left
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 2}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            Decoding(**wrong)
    with pytest.raises(ValueError, match="must be"):
        Decoding(0)
