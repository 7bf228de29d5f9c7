"""`--schema`: answers fit a JSON Schema, alone, in a batch, streamed; what cannot work is refused before loading."""

import json
import math
import re
import sys
from dataclasses import replace
from time import perf_counter, process_time

import pytest
import torch

from helpers.data import png
from helpers.models import ROOT, make_model, make_processor
from helpers.schemas import make_schema
from minivlm.__main__ import main
from minivlm.asking import question_about
from minivlm.constrained import FollowGrammar, digits_of
from minivlm.inference import Assistant, Decoding
from minivlm.json_schema import MAX_BYTES, check_parts, closed, compile_schema, parse_schema, shortest_answer
from minivlm.model.loading import load_trained

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

NAMED = {
    "type": "object",
    "properties": {
        "名称": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["动物", "food"]},
        "n": {"type": "integer"},
    },
    "required": ["名称", "kind"],
}
LOOP = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}}
TREE = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}


def text(pattern) -> bytes:
    return json.dumps({"type": "string", "pattern": pattern}).encode()


def bomb(levels: int) -> dict:
    """Return a schema of a few hundred bytes whose shortest answer has 10 ** levels parts."""
    more = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 10} for i in range(levels)
    }  # fmt: skip
    return {"$defs": more | {f"d{levels}": {"type": "null"}}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "10,000 levels": (b'{"items":' * 10000 + b"true" + b"}" * 10000, "nested levels or more, more than 64"),
    "10,000 brackets": (b"[" * 10000, "10,000 nested levels or more, more than 64"),
    "1 MB": (json.dumps({"enum": ["word"] * 130_000}).encode(), "more than 65,536 bytes"),
    "no JSON": (b"name: string", "no JSON: Expecting value"),
    "no UTF-8": (b'{"title": "\xff"}', "no JSON: 'utf-8'"),
    "half a character": (b'{"const": "\\ud800"}', "surrogates not allowed"),
    "NaN": (b'{"minimum": NaN}', "no JSON: Out of range"),
    "a key twice": (b'{"type": "null", "type": "string"}', "the key 'type' stands twice"),
    "a list": (b"[1]", "[1] is no JSON Schema"),
    "explodes": (text("^(.{0,20}a.{0,20}b){20}$"), "b){20}$' is too costly to follow: lexer error"),
    "multiplies": (text("^(([ab]{1,30}c?){3,30}d?){3,30}$"), "multiply to 27,000, more than 10,000"),
    "long pattern": (text("a" * 501), "a pattern of 501 characters, more than 500"),
    "look-ahead": (text("^(?=a)b$"), "look-around"),
    "33 patterns": ({"anyOf": 33 * [{"pattern": "a"}]}, "33 patterns, more than 32"),
    "1,001 schemas": ({"properties": {str(i): {} for i in range(1000)}}, "more than 1,000 schemas"),
    "500 optional": ({"properties": {str(i): True for i in range(600)}, "type": "object"}, "too costly to follow"),
    "itself": ({"$ref": "#"}, "no answer has an end"),
    "itself inside": (LOOP | {"$ref": "#/$defs/n"}, "no answer has an end"),
    "each other": ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#"}}}, "no answer has an end"),
    "long answers": (bomb(6), "characters, more than 10,000"),
    "a million items": ({"type": "array", "minItems": 1_000_000}, "3,000,000 characters, more than 10,000"),
    "remote": ({"$ref": "http://127.0.0.1:9/s.json"}, "'http://127.0.0.1:9/s.json' is not in this file"),
    "a file": ({"items": {"$ref": "other.json"}}, "#/items: $ref 'other.json' is not in this file"),
    "nowhere": ({"$ref": "#/$defs/x"}, "'#/$defs/x' leads to no schema"),
    "bounds": ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable schema: minimum (5)"),
    "types": ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable schema"),
    "a refused part": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable schema"),
    "no choice": ({"enum": []}, "Unsatisfiable schema"),
    "misspelt": ({"properties": {"a": {"maxlength": 3}}}, "/a: the keyword 'maxlength' is not supported,"),
    "not supported": ({"uniqueItems": True}, "the keyword 'uniqueItems' is not supported. Leave it out"),
    "options of the library": ({"x-guidance": {"lenient": True}}, "'x-guidance' is not supported"),
    "a wrong type": ({"type": "strng"}, "strng"),
    "a text for a number": ({"maxLength": "3"}, 'maxLength is "3". It must be a whole number'),
    "true for a number": ({"minimum": True}, "minimum is true. It must be"),
    "no schema inside": ({"anyOf": [3]}, "#/anyOf/0 is 3. Write a schema there"),
}  # fmt: skip


@pytest.fixture(scope="module")
def talker():
    """Return an assistant with a model that draws any word, and whose answers can end."""
    model, processor = make_model(text={"vocab_size": 6400, "max_position_embeddings": 2048}), make_processor()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = processor.tokenizer.eos_token_id, 0
    return Assistant(model, processor)


def ask(assistant, schema, questions=("What?",), tokens=400, temperature=0.0):
    """Return the answers that fit a schema."""
    encoded = [assistant.encode([question_about([], question)]) for question in questions]
    return assistant.answer(encoded, Decoding(tokens, temperature, grammar=compile_schema(schema)))


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def check(schema, answer):
    """Assert that an answer has come to its end, is one JSON value, and fits."""
    assert answer.ended, answer.text
    value = json.loads(answer.text)
    jsonschema.Draft202012Validator(schema).validate(value)
    written = json.dumps(value, ensure_ascii=False)
    assert NUMBER.sub("0", answer.text) == NUMBER.sub("0", written)  # a number has several spellings, as 0 and -0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_one_line_before_the_model_is_loaded(name, tmp_path, capsys):
    schema, wanted = HOSTILE[name]
    path = tmp_path / "schema.json"
    path.write_bytes(schema if isinstance(schema, bytes) else json.dumps(schema).encode())
    start = process_time()
    assert main(["ask", "What?", "--schema", str(path), "--model", "nobody/no-such-model"]) == 2
    assert process_time() - start < 1
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {path}: ") and err.count("\n") == 1 and wanted in err


def test_all_other_parts_of_the_path_are_named(tmp_path, capsys, monkeypatch):
    assert main(["ask", "What?", "--schema", str(tmp_path / "gone.json")]) == 2
    assert "gone.json: No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("minivlm.json_schema.find_spec", lambda name: None)
    assert main(["ask", "What?", "--schema", str(tmp_path / "gone.json")]) == 2
    assert "pip install minivlm[schema]" in capsys.readouterr().err


def test_any_schema_of_the_size_limit_is_read_or_refused_in_time():
    words = parse_schema(json.dumps({"enum": [f"word{i}" for i in range(5400)]}).encode(), "words")
    assert MAX_BYTES * 0.9 < len(json.dumps(words)) <= MAX_BYTES
    start = process_time()
    compile_schema(words)
    assert process_time() - start < 1


@pytest.mark.parametrize("seed", range(24, 64))
def test_answers_fit(talker, seed):
    torch.manual_seed(seed)
    schema = make_schema(seed)
    for answer in ask(talker, schema, ["a", "b c"], temperature=1.0):
        check(schema, answer)


def test_nothing_follows_a_value_that_is_complete(talker, monkeypatch):
    """llguidance calls a matcher stopped before the end token, too; the mask is still needed there."""
    assert {answer.text for answer in ask(talker, {"enum": ["猪", "pig"]}, "abcdefgh")} <= {'"猪"', '"pig"'}


def test_each_mask_counts(talker, monkeypatch):
    """Without the mask of a single token answers do not fit: it is in force at each of them."""
    torch.manual_seed(0)
    real, calls = FollowGrammar.refused, []

    def leave_out(self, matcher, digits):
        calls.append(matcher)
        return real(self, matcher, digits) & (len(calls) != left_out)

    monkeypatch.setattr(FollowGrammar, "refused", leave_out)
    for left_out in (1, 3, 5):
        calls.clear()
        with pytest.raises(ValueError, match="too costly|Expecting value"):
            check(NAMED, ask(talker, NAMED)[0])


def test_a_number_ends_even_if_the_model_wants_nothing_but_digits(talker, monkeypatch):
    digits = torch.tensor([bool(count) for count in digits_of(talker.vocabulary)])
    real = FollowGrammar.__call__
    monkeypatch.setattr(FollowGrammar, "__call__", lambda self, ids, scores: real(self, ids, scores + 1e4 * digits))
    for schema in ({"type": "number"}, {"type": "integer", "minimum": 5}):
        [answer] = ask(talker, schema)
        assert answer.ended and json.loads(answer.text) >= 0 and answer.tokens < 100


def test_a_batch_gives_the_answers_of_each_alone(talker):
    questions = ["What?", "这是什么东西？", "a", "Is it one of the two or three kinds?"]
    together = ask(talker, NAMED, questions)
    assert together == [ask(talker, NAMED, [question])[0] for question in questions]
    assert len({answer.tokens for answer in together}) > 1
    for answer in together:
        check(NAMED, answer)


def test_a_stream_follows_the_schema(talker):
    decoding = Decoding(400, grammar=compile_schema(NAMED))
    encoded = talker.encode([question_about([], "What?")])
    assert "".join(talker.stream(encoded, decoding)) == talker.answer([encoded], decoding)[0].text


def test_a_model_that_wants_to_end_ends_the_string(talker, monkeypatch):
    """Between the quotation marks of a string the end token is refused; its share goes to the mark."""
    free, ends = {"type": "string"}, torch.full((1, 6400), 0.0)
    ends[0, talker.ends()[0]] = 9.0
    step = FollowGrammar(compile_schema(free), talker.vocabulary)
    [quote] = talker.tokenizer.encode('"')
    ids = torch.tensor([[1]])
    for token in (quote, quote, talker.ends()[0]):
        scores = step(ids, ends)
        assert scores.argmax().item() == token
        ids = torch.tensor([[token]])
    assert ends[0, quote] == 0  # the scores that were given stay as they are


def test_a_model_without_an_end_token_is_refused(talker):
    other = Assistant(make_model(text={"vocab_size": 6400}), make_processor())
    with pytest.raises(ValueError, match="no end token"):
        ask(other, NAMED)


def test_objects_are_closed_where_that_keeps_answers():
    def close(schema):
        return closed(schema, check_parts(schema, "s"))

    one = {
        "type": "object",
        "properties": {"properties": {"properties": {"const": {}}}, "const": {"const": {"properties": {}}}},
    }
    inner = {"properties": {"const": {}}, "additionalProperties": False}
    assert close(one) == one | {
        "properties": {"properties": inner, "const": {"const": {"properties": {}}}}, "additionalProperties": False
    }  # fmt: skip
    for same in (
        {"properties": {"a": {}}, "required": ["b"]}, {"properties": {"a": {}}, "additionalProperties": True},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"enum": [{"properties": {}}]},
    ):  # fmt: skip
        assert close(same) == same


@pytest.mark.parametrize(
    "schema, least",
    [
        (TREE, 2), (LOOP | {"$ref": "#/$defs/n"}, math.inf), ({"type": ["string", "null"], "minLength": 5}, 1),
        ({"enum": ["猪猪", 10]}, 2), (bomb(2), 320), ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, 1),
    ],
)  # fmt: skip
def test_the_shortest_answer(schema, least):
    assert shortest_answer(schema, check_parts(schema, "s")) == least


# The command


@pytest.fixture(scope="module")
def folder(talker, tmp_path_factory):
    path = tmp_path_factory.mktemp("talker")
    talker.model.save_pretrained(path)
    talker.encoder.processor.save_pretrained(path)
    return str(path)


def test_the_command_prints_json_and_never_half_of_it(folder, tmp_path, capsys):
    path, picture = tmp_path / "schema.json", tmp_path / "a.png"
    path.write_text(json.dumps(NAMED), "utf-8")
    picture.write_bytes(png(0))
    asked = ["ask", str(picture), "What?", "--model", folder, "--schema", str(path)]
    assert main(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    jsonschema.validate(plain, NAMED)
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == plain
    assert main([*asked, "--max_new_tokens", "5"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("error: The answer was cut after 5 tokens") and "Raise --max_new_tokens 5" in err


@pytest.mark.slow
def test_a_thousand_answers_of_the_released_model_fit():
    """1,000 schemas, a picture each, drawn at temperature 1; and what the mask costs per token."""
    assistant = Assistant(*load_trained(str(ROOT)))
    pictures = sorted((ROOT / "data" / "examples").glob("*.png"))
    torch.manual_seed(0)
    for seed in range(1000):
        asked = question_about([pictures[seed % len(pictures)]], "What is this?")
        decoding = Decoding(400, 1.0, grammar=compile_schema(make_schema(seed)))
        [answer] = assistant.answer([assistant.encode([asked])], decoding)
        check(make_schema(seed), answer)


@pytest.mark.slow
def test_a_mask_costs_little():
    """The median of paired ratios: 64 tokens that follow a schema, and 64 that follow nothing."""
    assistant = Assistant(*load_trained(str(ROOT)))
    config, ratios = assistant.model.generation_config, []
    config.suppress_tokens = [*(config.suppress_tokens or []), *assistant.ends()]  # no answer ends before its time
    encoded = [assistant.encode([question_about([], "What is this?")])]
    free = Decoding(64)
    bound = replace(free, grammar=compile_schema({"type": "array", "items": make_schema(3), "minItems": 60}))
    for decoding in (free, bound):
        assistant.answer(encoded, decoding)
    for _ in range(15):
        seconds = []
        for decoding in (free, bound):
            start = perf_counter()
            [answer] = assistant.answer(encoded, decoding)
            seconds.append(perf_counter() - start)
            assert answer.tokens == 64
        ratios.append(seconds[1] / seconds[0])
    print(f"median ratio {sorted(ratios)[7]:.3f}")
    assert sorted(ratios)[7] < 1.1
