"""`minivlm ask` and `minivlm chat`: only answers on standard output, a mistake is one line, a saved chat trains."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys

import pytest

from helpers.data import png
from helpers.models import ROOT
from minivlm.__main__ import main
from minivlm.asking import question_about
from minivlm.data.rows import load_rows
from minivlm.inference import Assistant, Decoding
from minivlm.resources import HUB_MODEL, default_model
from minivlm.terminal import line_reader

FEW = ["--max_new_tokens", "8"]


@pytest.fixture
def files(tmp_path):
    """Write two pictures and return their names."""
    for seed in (0, 1):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    return [str(tmp_path / f"{seed}.png") for seed in (0, 1)]


def give(monkeypatch, data: bytes):
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def expected(assistant, *turns):
    """Return the greedy answers to questions, each with its pictures, in one conversation."""
    messages, answers = [], []
    for pictures, question in turns:
        messages.append(question_about(pictures, question))
        [answer] = assistant.answer([assistant.encode(messages)], Decoding(8))
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer)
    return answers


def test_ask_prints_the_answer_alone(tiny, assistant, files, capsys, monkeypatch):
    pictures = [png(0), png(1)]
    for names, shown in ((files[:1], pictures[:1]), (files, pictures), ([], []), (["-", files[1]], pictures)):
        give(monkeypatch, png(0))
        assert main(["ask", *names, "--model", tiny, "What is it?", *FEW]) == 0  # options may stand in between
        [answer] = expected(assistant, (shown, "What is it?"))
        assert capsys.readouterr().out == answer.text + "\n"


def test_ask_prints_json(tiny, assistant, files, capsys):
    assert main(["ask", *files, '"是什么"？', "--model", tiny, "--json", *FEW]) == 0
    result = json.loads(capsys.readouterr().out)
    [answer] = expected(assistant, ([png(0), png(1)], '"是什么"？'))
    assert result.pop("seconds") > 0
    assert result == {"pictures": files, "question": '"是什么"？', "answer": answer.text, "tokens": 8}


def test_a_wrong_picture_is_one_line(tiny, files, tmp_path, capsys, monkeypatch):
    (tmp_path / "note.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(png(0)[:200])
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "large.png").write_bytes(png(0, size=(40, 40)))
    monkeypatch.setattr("minivlm.data.pictures.MAX_PIXELS", 1200)
    monkeypatch.setattr("minivlm.asking.MAX_BYTES", 9000)
    give(monkeypatch, bytes(9001))

    def mistake(*arguments):
        try:
            code = main(["ask", *arguments, "--model", tiny])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    for name, wanted in {
        "gone.png": "No such file", "note.png": "unreadable picture: it is no PNG", "cut.png": "unreadable picture",
        "drawing.svg": "unreadable picture", "large.png": "too large", "": "directory",
    }.items():  # fmt: skip
        line = mistake(files[0], str(tmp_path / name), "What?")
        assert str(tmp_path / name) in line and wanted in line
    assert "more than 9,000 bytes" in mistake("-", "What?")
    assert "Write one behind it" in mistake(files[0])
    assert "stands twice" in mistake("-", "-", "What?")
    assert "temperature -1.0" in mistake("What?", "--temperature", "-1")
    assert "did you mean --temperature?" in mistake("What?", "--temprature", "1")
    assert "PICTURE" in mistake()


def test_a_model_that_is_not_there_is_one_line(capsys):
    assert main(["ask", "What?", "--model", "nobody/no-such-model"]) == 2
    assert "--model nobody/no-such-model" in capsys.readouterr().err


def test_without_a_name_the_nearest_model_is_asked(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    assert default_model() == "."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minivlm.resources.PACKAGE", tmp_path / "site-packages" / "minivlm")
    assert default_model() == HUB_MODEL
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "site-packages").mkdir(exist_ok=True)
        (tmp_path / "site-packages" / name).touch()
    assert default_model() == str(tmp_path / "site-packages")


# Chat


@pytest.fixture
def talk(tiny, capsys, monkeypatch):
    """Return a function: `talk(lines, *options)` gives the lines to `minivlm chat` and returns what it prints."""

    def run(lines, *options):
        give(monkeypatch, "\n".join(lines).encode())
        assert main(["chat", "--model", tiny, *FEW, *options]) == 0
        return capsys.readouterr().out

    return run


def test_a_chat_remembers_and_forgets(talk, assistant, files):
    first, second = expected(assistant, ([png(0)], "What?"), ([png(1)], "And this?"))
    [alone] = expected(assistant, ([], "And this?"))
    assert len({first.text, second.text, alone.text}) == 3
    lines = ["What?", "", f"/image {files[1]}", "And this?", "/reset", "And this?", "/quit", "What?"]
    out = talk(lines, files[0])
    answers = [answer.text + "\n[8 tokens, " for answer in (first, second, alone)]
    assert [out.count(text) for text in answers] == [1, 1, 1]
    assert out.index(answers[0]) < out.index(answers[1]) < out.index("Forgotten.") < out.index(answers[2])
    assert out.count("tokens/s, first after") == 3  # nothing behind /quit
    assert f"{files[1]}: 32 x 32\n" in out and "> " not in out


def test_a_chat_goes_on_after_a_mistake(talk, files, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    lines = ["/image", "/image gone.png", f"/image {tmp_path / 'note.png'}", "/image -", "/save", "/nope", "/lang fr"]
    out = talk([*lines, "/save a.json", "/help", "word " * 600, "What?"])
    for wanted in (
        "/image needs", "gone.png: No such file", "note.png: unreadable", "- is standard input", "/save needs",
        "/nope: no such", "/lang fr: languages", "no answer to save", "/reset        forget", "the model reads 512",
    ):  # fmt: skip
        assert wanted in out, wanted
    assert out.count("tokens/s") == 1


def test_a_chat_speaks_chinese(talk):
    out = talk(["/lang zh", "/reset", "/lang en", "/reset"])
    assert out == "提示用中文。\n已忘掉。\nLines are in English.\nForgotten.\n"
    assert talk(["/reset"], "--lang", "zh") == "已忘掉。\n"


def test_a_saved_chat_is_read_for_training(talk, assistant, files, tmp_path):
    path, text = tmp_path / "talk.json", tmp_path / "talk.txt"
    path.write_text("mine")
    out = talk(["What?", f"/save {path}", f"/save {text}"], files[0])
    assert path.read_text() == "mine" and f"{path} exists" in out and not text.exists() and ".json" in out
    path.unlink()
    talk(["What?", f"/save {path}", f"/image {files[1]}", "它呢？", f"/save {path}"], files[0])
    rows = load_rows([str(path)])
    first, second = expected(assistant, ([png(0)], "What?"), ([png(1)], "它呢？"))
    sample = rows.sample(0)
    assert len(rows) == 1 and sample["images"] == [png(0), png(1)]
    picture, said = {"type": "image"}, lambda text: {"type": "text", "text": text}
    assert [(m["role"], m["content"]) for m in sample["messages"]] == [
        ("user", [picture, said("What?")]), ("assistant", [said(first.text)]),
        ("user", [picture, said("它呢？")]), ("assistant", [said(second.text)]),
    ]  # fmt: skip


def test_ctrl_c_ends_an_answer_and_not_the_chat(talk, monkeypatch):
    real, calls = Assistant.stream, []

    def stream(self, *arguments):
        made = real(self, *arguments)
        take = type(made).__next__
        calls.append(made)

        def interrupted(self):
            if self is calls[0] and self.tokens > 2:
                raise KeyboardInterrupt
            return take(self)

        monkeypatch.setattr(type(made), "__next__", interrupted)
        return made

    monkeypatch.setattr(Assistant, "stream", stream)
    out = talk(["What?", "Really?"], "--max_new_tokens", "200")
    assert out.count("tokens/s") == 2 and calls[0].tokens < 200 == calls[1].tokens


def test_lines_can_be_edited_in_a_terminal(monkeypatch):
    toolkit = pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with toolkit.input.create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = line_reader()
        keys.send_text("whot\x08\x08at\r")  # backspaces
        assert read("> ") == "what"
        keys.send_text("\x1b[A?\r")  # arrow up: the line before
        assert read("> ") == "what?"
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read("> ")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert line_reader() is input


@pytest.mark.parametrize("columns, drawn", [(80, True), (0, False)])
def test_a_picture_is_shown_where_the_terminal_can(columns, drawn, files):
    """A terminal that answers no question about its abilities still shows coloured half blocks."""
    pytest.importorskip("textual_image")
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = "import sys; from PIL import Image; from minivlm.terminal import show_picture; "
    code += "show_picture(sys.argv[1], Image.open(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, files[0]], cwd=ROOT, env=os.environ | {"TERM": "xterm-256color"},
        stdin=terminal, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    out = b""
    with contextlib.suppress(OSError), open(screen, "rb", buffering=0) as screen:  # Linux ends a terminal by an error
        while piece := screen.read(65536):
            out += piece
    assert process.wait() == 0, out
    text = out.decode()
    assert text.endswith(f"{files[0]}: 32 x 32\r\n") and "Traceback" not in text
    assert (text.count("▀") > 100) == drawn
