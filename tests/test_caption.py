"""`minivlm caption`: every picture once, whatever the batches and stops; what is written trains a model."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from helpers.data import png
from helpers.models import ROOT
from minivlm.__main__ import main
from minivlm.asking import question_about
from minivlm.data.rows import load_rows
from minivlm.inference import Answer, Assistant, Decoding

NAMES = ["a.png", "b/c.PNG", "b/d.png", "z.png", "ü 图.png"]
BAD = {"b/broken.jpg": b"no picture", "cut.png": png(0)[:150], "empty.webp": b""}


@pytest.fixture
def caption(tiny, assistant, capsys, monkeypatch):
    """Return a function: `caption(*arguments)` runs the command with a model loaded once and returns its report."""
    monkeypatch.setattr("minivlm.commands.caption.open_engine", lambda args: assistant)

    def run(*arguments, code=0):
        assert main(["caption", *map(str, arguments), "--max_new_tokens", "6"]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def fill(folder, names=NAMES, bad=BAD):
    """Write pictures in this order, each drawn from its place in `NAMES`, and bad files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(NAMES.index(name)))
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "note.txt").write_text("no picture, and no name of one")
    return folder


def test_each_picture_gets_its_own_answer(caption, assistant, tmp_path):
    """Batches of any size and files in any order give the same lines: the answers of each picture alone."""
    question, wanted = "What is it?", []
    for seed, name in enumerate(NAMES):
        [answer] = assistant.answer([assistant.encode([question_about([png(seed)], question)])], Decoding(6))
        wanted.append({"file_name": name, "question": question, "answer": answer.text})
    assert len({row["answer"] for row in wanted}) == len(NAMES)
    for size, names in ((1, NAMES), (2, NAMES[::-1]), (16, NAMES[2:] + NAMES[:2])):
        folder, out = fill(tmp_path / f"pictures {size}", names), tmp_path / "new" / f"{size}.jsonl"
        caption(folder, "--out", out, "--batch_size", size, "--question", question)
        text = out.read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == wanted and text.endswith("\n")


def test_bad_files_are_counted_and_named(caption, tmp_path):
    folder, out = fill(tmp_path / "pictures"), tmp_path / "out.jsonl"
    report = caption(folder, "--out", out)
    assert "5 pictures, 5 of them from this call" in report and "3 pictures could not be read" in report
    assert [line.split(":")[0].strip() for line in report.splitlines()[2:]] == sorted(BAD)
    before = out.read_bytes()
    (folder / "cut.png").write_bytes(png(9))  # mended, the next call describes it
    report = caption(folder, "--out", out)
    assert "6 pictures, 1 of them from this call" in report and "2 pictures could not be read" in report
    assert out.read_bytes().startswith(before) and b"cut.png" in out.read_bytes()
    assert "0 of them from this call" in caption(fill(tmp_path / "good", bad={}), "--out", out)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_cut_anywhere_is_completed(form, caption, assistant, tmp_path, monkeypatch):
    """The answers have line breaks and quotes, so a line of the CSV file is several lines of text."""
    folder, out = fill(tmp_path / "pictures", NAMES[:3], {}), tmp_path / f"out.{form}"
    answers = []

    def answer(self, encoded, decoding):
        answers.extend(encoded)
        return [Answer('one,\n"two" 三\r\n', 3)] * len(encoded)

    monkeypatch.setattr(Assistant, "answer", answer)
    arguments = [folder, "--out", out, "--format", form, "--batch_size", "2", "--question", 'A "name"?\nBe brief.']
    caption(*arguments)
    whole = out.read_bytes()
    rows = load_csv(whole) if form == "csv" else [json.loads(line) for line in whole.splitlines()]
    assert [row["file_name"] for row in rows] == NAMES[:3]
    assert {row["answer"] for row in rows} == {'one,\n"two" 三\r\n'}
    for length in range(0, len(whole), 5):
        out.write_bytes(whole[:length])
        answers.clear()
        caption(*arguments)
        assert out.read_bytes() == whole
        assert len(answers) == 3 - len(rows_before(whole[:length], rows, form))


def load_csv(content: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def rows_before(content: bytes, rows: list[dict], form: str) -> list[dict]:
    """Return the rows whose line, the line break included, is in `content`."""
    ends = b'\r\n"\n' if form == "csv" else b"}\n"
    return rows[: content.count(ends)]


@pytest.mark.parametrize(
    "content, options, wanted",
    [
        (b'{"file_name": "a.png", "label": 3}\n', [], "file_name, question, answer"),
        (b'{"file_name": "a.png", "text": "mine"}\n', [], "file_name, question, answer"),
        (b"mine", [], "does not begin with"),
        (b"[1]\n", [], "file_name, question, answer"),
        (b"\xff\xfe\n", [], "codec"),
        (b"name,text\na,b\n", ["--format", "csv"], "columns are not"),
        (b"file_name,quest", ["--format", "jsonl"], "does not begin with"),
        (b'{"file_name": "a.png", "question": "Why?", "answer": "So."}\n', [], "another question, 'Why[?]'"),
    ],
)
def test_a_file_of_something_else_stays(content, options, wanted, caption, tmp_path):
    folder, out = fill(tmp_path / "pictures"), tmp_path / "out"
    out.write_bytes(content)
    err = caption(folder, "--out", out, *options, code=2)
    assert err.count("\n") == 1 and str(out) in err
    assert re.search(wanted, err), err
    assert out.read_bytes() == content


def test_metadata_is_read_for_training(caption, assistant, tmp_path):
    folder = fill(tmp_path / "pictures")
    for question in ("Describe this picture.", "What is it?"):
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        caption(folder, "--format", "metadata", "--question", question)
        rows = load_rows([str(folder)])
        assert len(rows) == len(NAMES)
        for seed, sample in enumerate(rows.samples()):
            [answer] = assistant.answer([assistant.encode([question_about([png(seed)], question)])], Decoding(6))
            assert sample["images"] == [(folder / NAMES[seed]).resolve()]
            user, model = sample["messages"]
            assert user["content"] == [{"type": "image"}, {"type": "text", "text": question}]
            assert model["content"] == [{"type": "text", "text": answer.text}]
    assert "--out" in caption(folder, "--format", "metadata", "--out", tmp_path / "metadata.jsonl", code=2)


def test_a_folder_without_pictures_is_one_line(caption, tmp_path):
    assert "no such folder" in caption(tmp_path / "gone", code=2)
    (tmp_path / "note.txt").touch()
    assert "no pictures in it" in caption(tmp_path, code=2)


def test_a_killed_call_is_continued(caption, tiny, tmp_path):
    """Kill a process of its own after its third line, run the same call again, and compare with one never killed."""
    folder, out, alone = tmp_path / "pictures", tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    folder.mkdir()
    for seed in range(40):
        (folder / f"{seed:02}.png").write_bytes(png(seed))
    arguments = ["caption", str(folder), "--model", tiny, "--batch_size", "1", "--max_new_tokens", "6", "--out"]
    slow = "import sys, time; from minivlm.__main__ import main; from minivlm.inference import Assistant as A; "
    slow += "answer = A.answer; A.answer = lambda *a: (time.sleep(0.2), answer(*a))[1]; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments, str(out)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= out.read_bytes().count(b"\n") < 20  # lines that wait in a buffer would come all at once, later
    caption(*arguments[1:-1], "--out", out)
    caption(*arguments[1:-1], "--out", alone)
    assert out.read_bytes() == alone.read_bytes()
    names = [json.loads(line)["file_name"] for line in out.read_text().splitlines()]
    assert names == [f"{seed:02}.png" for seed in range(40)]
