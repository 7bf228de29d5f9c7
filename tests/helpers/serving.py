"""Start servers in a process of their own, wait for them, and give them a model whose answers do not end."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from helpers.models import ROOT

NAME = "toy"  # of the model in requests
PATIENCE = 180  # seconds for what takes a second on an idle machine


def wait(condition, seconds=PATIENCE):
    """Wait until a function returns something true, and return it."""
    for _ in range(5 * seconds):
        if result := condition():
            return result
        time.sleep(0.2)
    pytest.fail(f"waited {seconds} seconds")


def free_port():
    """Return a port of this machine at which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def save_endless(folder):
    """Copy the root's model without an end token into `folder`: an answer is as long as it is allowed to be."""
    for path in [*ROOT.glob("*.json"), ROOT / "model.safetensors", ROOT / "chat_template.jinja"]:
        shutil.copy(path, folder)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@contextmanager
def serving(folder, model, *options, **variables):
    """Start `minivlm serve`; yield its address and process. Its output is in the file `log` of the folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    environment |= {"no_proxy": "127.0.0.1,localhost", "HF_HOME": str(folder / "no cache of the Hub")}
    port = free_port()
    command = [sys.executable, "-m", "minivlm", "serve", str(model), "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--name", NAME, *options], env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )  # fmt: skip
        try:
            wait(lambda: "startup complete" in (folder / "log").read_text() or server.poll() is not None)
            assert server.poll() is None, (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.terminate()
            server.wait(60)
