"""VLMEvalKit asks a model through `minivlm serve`: `VLMEVALKIT=/path/to/its/checkout make test-benchmarks`.

No package registry has VLMEvalKit, so the variable MINIVLM_VLMEVALKIT names its checkout. The rows come from our test
data, and VLMEvalKit makes the prompts and the scores.
"""

import base64
import csv
import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.models import ROOT
from helpers.serving import NAME, serving
from minivlm.asking import question_about
from minivlm.inference import Assistant, Decoding
from minivlm.model.loading import load_trained

KIT = os.environ.get("MINIVLM_VLMEVALKIT")
NEEDED = "fastapi openai uvicorn".split()  # the server needs them, and VLMEvalKit the others
NEEDED += "nltk num2words portalocker rouge_score sty tabulate termcolor timeout_decorator validators".split()
MISSING = [name for name in NEEDED if find_spec(name) is None]
ROWS = 12
CLIENTS = ("LMDeployAPI", "GPT4V")  # two classes of VLMEvalKit that send requests in OpenAI's format
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KIT, reason="MINIVLM_VLMEVALKIT names no checkout of VLMEvalKit"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def rows_of(task: str) -> list[dict]:
    """Return questions in English of the test data, evenly spread, as rows of VLMEvalKit."""
    columns = ["image_bytes", "conversations", "task", "language", "options"]
    table = pq.read_table(ROOT / "data" / "test.parquet", columns=columns).to_pylist()
    chosen = [row for row in table if (row["task"], row["language"]) == (task, "en")]
    rows = []
    for index, row in enumerate(chosen[:: len(chosen) // ROWS][:ROWS]):
        question, answer = (turn["content"] for turn in json.loads(row["conversations"]))
        picture = base64.b64encode(row["image_bytes"]).decode()
        rows.append({"index": index, "image": picture, "question": question.removeprefix("<image>\n")})
        if task == "choice":
            rows[-1] |= dict(zip("ABCD", row["options"])) | {"answer": "ABCD"[row["options"].index(answer)]}
        else:
            rows[-1]["answer"] = answer.capitalize()
    return rows


def write_tsv(path: Path, rows: list[dict]) -> None:
    """Write rows as a file of VLMEvalKit."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def read_tsv(path: Path, delimiter: str = "\t") -> list[dict]:
    """Return the rows of a file of VLMEvalKit."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


@contextmanager
def recording(address: str):
    """Stand before a server; yield an address, and a list that gets each request with the status of its answer."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = Request(address + self.path, body, {"Content-Type": "application/json"})
            try:
                with urlopen(request, timeout=300) as response:
                    status, kind, answer = response.status, response.headers["Content-Type"], response.read()
            except HTTPError as error:
                status, kind, answer = error.code, error.headers["Content-Type"], error.read()
            seen.append((json.loads(body), status))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def run_kit(folder: Path, address: str) -> None:
    """Let VLMEvalKit evaluate the model behind an address on our rows; its results go to `out` in the folder."""
    client = {"model": NAME, "api_base": f"{address}/v1/chat/completions", "max_tokens": 256, "retry": 1}
    config = {
        "model": {name: {"class": name, **client} for name in CLIENTS},
        "data": {
            "choice": {"class": "CustomMCQDataset", "dataset": "choice"},
            "yes_no": {"class": "ImageYORNDataset", "dataset": "yes_no"},
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "vlmevalkit.py"), str(Path(KIT).resolve())]
    command += ["--config", "config.json", "--judge", "exact_matching", "--api-nproc", "4", "--work-dir", "out"]
    variables = os.environ | {"LMUData": str(folder), "PRED_FORMAT": "tsv", "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= {"no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "no cache of the Hub")}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    print(done.stdout[-5000:], done.stderr[-5000:])  # its status is 0 also where a benchmark failed
    assert done.returncode == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of VLMEvalKit's run on both tasks, their rows, and the requests with their statuses."""
    folder, rows = tmp_path_factory.mktemp("kit"), {task: rows_of(task) for task in ("choice", "yes_no")}
    for task in rows:
        write_tsv(folder / f"{task}.tsv", rows[task])
    with serving(tmp_path_factory.mktemp("server"), ROOT) as (server, _), recording(server) as (address, seen):
        run_kit(folder, address)
    return folder / "out", rows, seen


def parts_of(body: dict) -> tuple[bytes, str]:
    """Return the picture and the words of a request."""
    [message] = body["messages"]
    picture, words = message["content"]
    return base64.b64decode(picture["image_url"]["url"].partition(",")[2]), words["text"]


def is_right(task: str, row: dict, said: str) -> bool:
    """Return whether VLMEvalKit has to count an answer: the right word, or the text of the right option alone."""
    if task == "yes_no":
        return said.lower().strip(".") == row["answer"].lower()
    named = [letter for letter in "ABCD" if said.strip(".") == letter or row[letter].lower() in said.lower()]
    return named == [row["answer"]]


def test_each_question_is_asked_once_and_answered(run):
    """The guard takes each request: VLMEvalKit's fields, its pictures, which are JPEG, and its prompts."""
    _, rows, seen = run
    assert [status for _, status in seen] == [200] * (ROWS * len(rows) * len(CLIENTS))
    fields = {"model", "messages", "max_tokens", "temperature"}
    assert {frozenset(body) for body, _ in seen} == {frozenset(fields), frozenset(fields | {"n"})}
    pictures, words = zip(*(parts_of(body) for body, _ in seen))
    assert {Image.open(io.BytesIO(picture)).format for picture in pictures} == {"JPEG"}
    for row in rows["choice"]:
        asked = [text for text in words if f"Question: {row['question']}\nOptions:\nA. {row['A']}\n" in text]
        assert len(asked) == len(CLIENTS) and "Please select the correct answer" in asked[0]
    for row in rows["yes_no"]:
        assert words.count(row["question"]) == len(CLIENTS)


def test_answers_are_those_of_minivlm_and_scores_follow_from_them(run):
    """VLMEvalKit keeps the greedy answer to each prompt, and its score is the share of right ones."""
    out, rows, seen = run
    model, processor = load_trained(ROOT)
    ours, wanted = Assistant(model.float(), processor), {}
    for body, _ in seen:
        picture, words = parts_of(body)
        encoded = ours.encode([question_about([picture], words)])
        wanted[words] = ours.answer([encoded], Decoding(body["max_tokens"]))[0].text.strip()
    scores = {}
    for name in CLIENTS:
        for task, result in (("choice", "acc"), ("yes_no", "score")):
            found = read_tsv(out / name / f"{name}_{task}.tsv")
            right = []
            for row, line in zip(rows[task], found, strict=True):
                [words] = [text for text in wanted if row["question"] in text]
                assert line["index"] == str(row["index"]) and line["prediction"] == wanted[words]
                right.append(is_right(task, row, line["prediction"]))
            [score] = read_tsv(out / name / f"{name}_{task}_{result}.csv", ",")
            scores[name, task] = float(score["Overall"]) / (1 if task == "choice" else 100)
            assert scores[name, task] == pytest.approx(sum(right) / ROWS, abs=1e-4)
    print(scores)
