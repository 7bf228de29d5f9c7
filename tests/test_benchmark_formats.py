"""`minivlm benchmark-formats`: every format is asked the same questions, and what is counted is what was answered."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from helpers.data import row, write
from helpers.models import SIGLIP, save
from minivlm.benchmark import formats
from minivlm.benchmark.measure import clock, machine
from minivlm.benchmark.remote import Server
from minivlm.commands import benchmark_formats
from minivlm.convert.formats import make_formats
from minivlm.data.pictures import decode_image, from_data_url
from minivlm.data.rows import load_rows
from minivlm.hub.format_table import formats_table
from minivlm.model.loading import load_trained
from minivlm.resources import digest

ROWS = [
    row("What is it?", "dog", seed=1) | {"task": "name", "language": "en"},
    row("What is it now?", "cat", seed=2) | {"task": "name", "language": "en"},
    row("Describe it.", "a cat", seed=3) | {"task": "caption", "language": "en"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that every format can hold, and its formats."""
    folder = tmp_path_factory.mktemp("formats")
    save(folder / "model", vision=SIGLIP, vision_feature_layer=-1)
    made, refused = make_formats(folder / "model", folder / "made")
    assert not refused
    return SimpleNamespace(source=folder / "model", made=made)


@pytest.fixture
def rows(tmp_path):
    return load_rows([write(tmp_path / "rows.parquet", ROWS)])


def speaker(processor, answers, took):
    """Return a side that gives these answers in turn; the clock goes on by `took` seconds with each token."""
    turn = iter([answers[0], *answers])  # the first call does not count

    def side(question, most, note):
        for token in processor.tokenizer(next(turn))["input_ids"]:
            took()
            note(token)

    return side


def test_right_answers_same_answers_and_speed_are_counted(processor):
    now, asked = [0.0], []
    items = [{"task": task, "answer": answer, "box": None} for task, answer in
             (("name", "dog"), ("name", "cat"), ("caption", "a cat"))]  # fmt: skip

    def slow(name, seconds):
        def took():
            now[0] += seconds
            asked.append(name)

        return took

    answers = {"transformers": ["dog", "bird", "a cat"], "other": ["dog", "cat", "a cat"]}
    sides = {"transformers": speaker(processor, answers["transformers"], slow("transformers", 0.5)),
             "other": speaker(processor, answers["other"], slow("other", 0.25))}  # fmt: skip
    found = formats.measure(sides, items, processor, lambda: now[0])
    assert [row["right"]["hits"] for row in found.values()] == [1, 2]
    assert [row["right"]["count"] for row in found.values()] == [2, 2], "captions are no right or wrong"
    assert [row["same"] for row in found.values()] == [3, 2]
    assert [row["first_token"] for row in found.values()] == [0.5, 0.25]
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in answers["other"]]
    assert sum(lengths) > 3, "one answer has several tokens"
    assert [row["tokens_per_second"] for row in found.values()] == [2, 4]
    turns = [name for i, name in enumerate(asked) if not i or asked[i - 1] != name]
    assert turns == ["transformers", "other"] * 4, "a warm-up, then three questions, each put to both"


@torch.no_grad()
def test_sides_answer_as_their_engines_do(model, rows, monkeypatch):
    """The graphs hold the same weights in 16 bits, so their first tokens are those of our model."""
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    ours, processor = load_trained(model.source)
    sides = formats.open_sides(ours, model.made, [model.source / "model.safetensors"], threads=1)
    names = ["transformers, float32", "ONNX, 16 bits", "ONNX, 8 bits", "ONNX, multiplied in 8 bits"]
    names += ["GGUF, 16 bits", "GGUF, 8 bits"]
    assert list(sides) == names and ["side" in side for side in sides.values()] == [True] * 4 + [False] * 2
    assert all("llama-cpp-python" in sides[name]["why"] for name in names[4:])
    for files, graphs in (("ONNX, 16 bits", "fp16"), ("ONNX, 8 bits", "quantized|vision_encoder_fp16")):
        assert all(any(kind in path.name for kind in graphs.split("|")) for path in sides[files]["files"])
        assert len(sides[files]["files"]) == 3
    assert {path.name for path in sides["GGUF, 8 bits"]["files"]} == {"model-Q8_0.gguf", "mmproj-Q8_0.gguf"}
    for question in formats.make_questions(rows, processor):
        expected = ours.generate(**question["torch"], max_new_tokens=6, do_sample=False)
        expected = expected[0, question["torch"]["input_ids"].shape[1] :].tolist()
        for name in names[:2]:
            tokens = []
            sides[name]["side"](question, 6, tokens.append)
            assert tokens[:2] == expected[:2], name
        assert question["marked"].count(formats.MARKER) == 1 and len(question["pictures"]) == 1


def test_llama_cpp_is_given_its_files_marker_and_suppressed_tokens(model, rows, monkeypatch):
    opened, read = [], []

    class Engine:
        def __init__(self, folder, threads, outtype):
            opened.append((folder.name, threads, outtype))

        def stream(self, prompt, pictures, length, suppress):
            read.append((prompt, [picture.size for picture in pictures], length, suppress))
            yield from (5, 2)

    monkeypatch.setattr(formats, "LlamaCpp", Engine)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: object())
    ours, processor = load_trained(model.source)
    ours.generation_config.suppress_tokens = [12]
    sides = formats.open_sides(ours, {"GGUF": model.made["GGUF"]}, [], threads=3)
    assert opened == [("GGUF", 3, "f16"), ("GGUF", 3, "q8_0")]
    tokens, times = formats.ask(sides["GGUF, 16 bits"]["side"], formats.make_questions(rows, processor)[0], clock)
    assert tokens == [5, 2] and len(times) == 2
    [(prompt, sizes, length, suppressed)] = read
    assert formats.MARKER + "\nWhat is it?" in prompt and sizes == [(32, 32)] and length == 64 and suppressed == [12]


def test_the_command_prints_the_table_and_writes_the_record(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        benchmark_formats, "make_formats", lambda source, place: (model.made, {"Q4": f"{source} is too wide."})
    )
    data, threads = write(tmp_path / "rows.parquet", ROWS), torch.get_num_threads()
    try:
        benchmark_formats.main([str(model.source), "--data", data, "--rows", "2",
                        "--json", str(tmp_path / "formats.json")])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    record, out = json.loads((tmp_path / "formats.json").read_text()), capsys.readouterr().out
    assert record["rows"] == 2 and record["weights_sha256"] == digest(model.source / "model.safetensors")
    assert machine().items() <= record["machine"].items() and "onnxruntime" in record["machine"]
    first = record["formats"][0]
    assert first["format"] == "transformers, float32" and first["same"] == 2 == len(first["answers"])
    assert first["bytes"] == (model.source / "model.safetensors").stat().st_size
    assert formats_table(record) in out and "No Q4: " in out
    assert str(tmp_path) not in json.dumps(record) and str(model.source) not in json.dumps(record), (
        "paths of a machine"
    )


def serve(answers):
    """Return a server of OpenAI's kind that streams these answers, its URL, and the bodies it was sent."""
    bodies, turn = [], iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(json.dumps({"data": [{"id": "tiny"}]}).encode())

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = next(turn)
            if isinstance(said, int):
                self.send_error(said)
                return
            deltas = [{"role": "assistant"}, *({"content": piece} for piece in said), {}]
            events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas] + ['{"choices": []}', "[DONE]"]
            self.reply("".join(f"data: {event}\n\n" for event in events).encode())

        def reply(self, content):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/v1", bodies


def test_a_server_is_asked_the_same_and_its_text_is_counted_in_tokens(model, rows, processor):
    server, url, bodies = serve([["a ", "small", " dog"], ["狗"], 400])
    questions = formats.make_questions(rows, processor)
    with server:
        side = formats.server_side(Server(url), processor)
        tokens, times = formats.ask(side, questions[0], clock)
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True) == "a small dog"
        assert tokens[-1] == processor.tokenizer.eos_token_id and len(times) == len(tokens) and times == sorted(times)
        full = []
        side(questions[2], len(processor.tokenizer("狗")["input_ids"]), full.append)
        assert processor.tokenizer.decode(full) == "狗", "an answer that was cut has no end token"
        with pytest.raises(ValueError, match="answers 400"):
            side(questions[1], 6, full.append)
        server.shutdown()
    assert [body["max_tokens"] for body in bodies] == [64, len(full), 6]
    assert all(body["model"] == "tiny" and body["temperature"] == 0 and body["stream"] for body in bodies)
    picture, text = bodies[0]["messages"][-1]["content"]
    assert text["text"].strip() == "What is it?"
    assert from_data_url(picture["image_url"]["url"]) and "data:image/png" in picture["image_url"]["url"]
    shown = decode_image(from_data_url(picture["image_url"]["url"]))
    assert shown.tobytes() == questions[0]["pictures"][0].tobytes(), "the picture that the others are shown"


@pytest.mark.parametrize("text", ["http://127.0.0.1:8000/v1", "=http://127.0.0.1/v1", "vLLM=127.0.0.1:8000"])
def test_a_server_needs_a_name_and_a_url(text, capsys):
    with pytest.raises(SystemExit):
        benchmark_formats.parse_args(["--server", text])
    assert f"{text}: must be NAME=URL" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named_before_any_work():
    with pytest.raises(ValueError, match=r"^http://127\.0\.0\.1:9/v1: no server with a model"):
        Server("http://127.0.0.1:9/v1")
