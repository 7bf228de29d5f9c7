"""A Hub on loopback, a client of it, and a finished run: what the tests of publishing share.

HF_ENDPOINT is read when huggingface_hub is imported, so each client is a process of its own. In it `time.sleep` is
recorded and returns at once, and huggingface_hub logs everything; no log may hold the token.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from helpers.hub_server import HubServer
from helpers.models import ROOT, make_model, make_processor
from minivlm.hub.check import files_of

REPO = "jinv2/minivlm"
TOKEN = "hf_" + "NotARealToken" * 2  # in two parts, or scanners for leaked secrets report this file
CELL = {"match": 0.5, "hits": 10, "count": 20, "low": 0.2993, "high": 0.7007}
RUN = {
    "options": {
        "data": ["data/train.parquet", "hub:someone/pictures", "/data/private/more.parquet"],
        "eval_data": ["data/test.parquet"],
        "learning_rate": 0.001,
        "seed": 0,
        "output_dir": "/data/private/out",
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "0123456789ab",
    "device": "cpu (x86_64)",
    "processes": 2,
    "precision": "bf16",
    "metrics": {
        "overall": CELL,
        "tasks": {"name": {"en": CELL, "zh": CELL | {"match": 0.25, "hits": 5}}},
        "ranked": {"choice": {"en": CELL | {"match": 0.9, "hits": 18}}},
    },
    "steps": 1234,
    "tokens": 56789,
    "seconds": 90.0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a folder as a training run leaves it."""
    out = tmp_path_factory.mktemp("a run")
    make_model(text={"vocab_size": 6400}).save_pretrained(out / "final")
    make_processor().save_pretrained(out / "final")
    (out / "run.json").write_text(json.dumps(RUN))
    (out / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (out / "recipe.yaml").write_text("data: [/data/private/more.parquet]\nlearning_rate: 1e-3\n")
    Image.new("RGB", (8, 8)).save(out / "loss.png")
    return out


@pytest.fixture
def out(trained, tmp_path):
    """Return a copy of that folder, which a test may change."""
    return shutil.copytree(trained, tmp_path / "a run")


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


PATIENCE = """
import json, sys, time
naps, sleep = [], time.sleep
time.sleep = lambda seconds: (naps.append(seconds), sleep(min(seconds, 0.01)))
from minivlm.__main__ import main
from minivlm.hub import publish, retries
from minivlm.hub.background import BackgroundPush
"""
COMMAND = """
try:
    code = main(["publish", *sys.argv[1:]])
finally:
    print("naps", naps)
sys.exit(code)
"""


@pytest.fixture
def client(hub, tmp_path):
    """Return a function: `client(*arguments)` runs `minivlm publish`, or other `code`, in a process of its own.

    It asserts that neither the output nor any file written holds the token.
    """
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    fresh |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1"}

    def run(*arguments, code=PATIENCE + COMMAND, cwd=ROOT, **environment):
        environment = fresh | {"HF_TOKEN": TOKEN} | environment
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        sent = environment["HF_TOKEN"] or TOKEN
        assert sent not in done.stdout + done.stderr
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
        assert not [path for path in files if sent.encode() in path.read_bytes()]
        assert sent not in repr(hub.requests)
        return done

    return run


def naps(done):
    return json.loads(re.search(r"^naps (.*)$", done.stdout, re.MULTILINE)[1])


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("README.md", "loss.png")
    }


def assert_published(hub, folder, commits=1):
    repo = hub.repos[REPO]
    assert len(repo.commits) == 1 + commits  # the first one made the repository
    for name in files_of(folder):
        assert repo.files[name.as_posix()] == (folder / name).read_bytes(), name
