"""vLLM serves the repository as it is, and answers as transformers does: `make test-vllm`.

vLLM has other versions of torch and transformers than we, so it runs in an environment of its own. The variable
MINIVLM_VLLM names the Python of that environment.
"""

import base64
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pyarrow.parquet as pq
import pytest

from helpers.models import ROOT
from helpers.serving import free_port, wait
from minivlm.asking import question_about
from minivlm.inference import Assistant, Decoding
from minivlm.model.loading import load_trained

PYTHON = os.environ.get("MINIVLM_VLLM")
ROWS = int(os.environ.get("MINIVLM_ROWS", 20))  # of the test's 8,282, evenly spread
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MINIVLM_VLLM names no Python with vLLM: make test-vllm"),
]


def copy_repository(folder: Path) -> Path:
    """Copy what is downloaded from the Hub: the files at the root that vLLM reads."""
    folder.mkdir()
    for path in [*ROOT.glob("*.json"), *ROOT.glob("*_minivlm.py"), *ROOT.glob("*.jinja"), ROOT / "model.safetensors"]:
        shutil.copy(path, folder)
    return folder


@contextmanager
def serving(folder: Path):
    """Start vLLM's server on the root's files; yield its address."""
    port, model = free_port(), copy_repository(folder / "minivlm")
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--trust-remote-code"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--limit-mm-per-prompt", '{"image": 4}', "--served-model-name", "minivlm"]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    variables |= {"no_proxy": "127.0.0.1", "HF_HOME": str(folder / "no cache of the Hub")}
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=variables, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait(lambda: "startup complete" in log.read_text() or server.poll() is not None, seconds=900)
            assert server.poll() is None, log.read_text()[-5000:]
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait(60)


def ask(url: str, pictures: list[bytes], question: str) -> str:
    """Return the server's greedy answer."""
    shown = [
        {"type": "image_url", "image_url": {"url": "data:image/webp;base64," + base64.b64encode(picture).decode()}}
        for picture in pictures
    ]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    body = {"model": "minivlm", "messages": messages, "temperature": 0, "max_tokens": 24}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def test_vllm_answers_as_transformers_does(tmp_path):
    """One by one, several at once, with two pictures and with none."""
    table = pq.read_table(ROOT / "data" / "test.parquet", columns=["image_bytes", "conversations"]).to_pylist()
    rows = table[:: len(table) // ROWS][:ROWS]
    asked = [
        ([row["image_bytes"]], json.loads(row["conversations"])[0]["content"].replace("<image>\n", "")) for row in rows
    ]
    asked += [([rows[0]["image_bytes"], rows[1]["image_bytes"]], "What is this?"), ([], "What is a cat?")]
    model, processor = load_trained(ROOT)
    ours = Assistant(model.float(), processor)
    expected = [
        ours.answer([ours.encode([question_about(*question)])], Decoding(24))[0].text.strip() for question in asked
    ]
    with serving(tmp_path) as url:
        assert [ask(url, *question).strip() for question in asked] == expected
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda question: ask(url, *question).strip(), asked))
    assert together == expected
