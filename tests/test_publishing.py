"""`--push_to_hub`: training uploads its model, and keeps it on the disk when the Hub refuses it."""

import json
import os
import subprocess
import sys

import pytest

from helpers.hub_server import HubServer
from helpers.models import ROOT
from helpers.training import TINY

TOKEN = "hf_" + "TestTokenThatMustNotShow"
OPTIONS = ["--max_steps", "4", "--save_every", "2", "--push_every", "1", "--batch_size", "8", "--run_name", "try-1"]


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


def train(hub, data, folder, **environment):
    command = [sys.executable, str(ROOT / "train_accelerate.py"), *TINY, *OPTIONS, "--data", data, "--eval_data", data]
    command += ["--output_dir", str(folder), "--push_to_hub", "jinv2/minivlm"]
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"),
    }
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=300)


def assert_no_token(done, folder):
    assert TOKEN not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_training_publishes_on_the_way_and_at_its_end(hub, data, tmp_path):
    done = train(hub, data, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["jinv2/minivlm"]
    assert "published: " in done.stdout and "try-1" in repo.tags
    assert len(hub.asked("commit")) == 2  # one at the checkpoint, one at the end
    files = repo.at(repo.resolve(None))
    assert files["model.safetensors"] == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert b"pipeline_tag: image-text-to-text" in files["README.md"] and b"model-index" in files["README.md"]
    assert_no_token(done, tmp_path)


def test_a_hub_that_refuses_costs_no_model(hub, data, tmp_path):
    hub.fail("create", *[403] * 20)
    done = train(hub, data, tmp_path / "run")
    assert done.returncode == 0 and json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert f"minivlm publish {tmp_path}/run/final --repo_id jinv2/minivlm" in done.stderr
    assert_no_token(done, tmp_path)


def test_who_is_not_logged_in_is_told_before_training(hub, data, tmp_path):
    done = train(hub, data, tmp_path / "run", HF_TOKEN="")
    assert done.returncode == 2 and "nobody is logged in" in done.stderr and not (tmp_path / "run").exists()
