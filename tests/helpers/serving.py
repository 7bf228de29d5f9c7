"""Wait for servers that run in a process of their own, and give them a model whose answers do not end."""

import json
import shutil
import socket
import time

import pytest

from helpers.models import ROOT

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
