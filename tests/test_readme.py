"""What the READMEs show is what happens: every snippet and every command runs, and prints what stands below it."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

READMES = ("README.md", "README_zh.md")
# A command is run as it stands, cut short by these options; one that is not listed fails the test.
SHORTER = {
    "python -m scripts.evaluate": ["--limit", "12"],
    "python train_accelerate.py --recipe": ["--max_steps", "1", "--max_rows", "16"],
    "python -m scripts.pretrain_tower": ["--minutes", "0.05", "--batch_size", "4"],
    "accelerate launch": ["--max_steps", "1", "--max_rows", "64", "--batch_size", "2", "--eval_limit", "4"],
    "python train_accelerate.py --model": [],
    "python -m scripts.preview": ["--rows", "20"],
    "python -m scripts.convert": [],
}


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, since the commands write into `runs/`."""
    folder = tmp_path_factory.mktemp("a clone") / "minivlm"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def run(command: list[str], folder) -> str:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("readme", READMES)
def test_snippets_print_what_stands_below_them(readme, checkout):
    ask, make_rows = blocks(readme, "python")
    assert run([sys.executable, "-c", ask], checkout) == blocks(readme, "text")[0]
    run([sys.executable, "-c", make_rows], checkout)
    assert (checkout / "runs" / "mine.parquet").is_file()


def test_both_readmes_name_the_same_commands():
    assert blocks(READMES[0], "bash") == blocks(READMES[1], "bash")


def test_commands_run(checkout):
    run([sys.executable, "-c", blocks("README.md", "python")[1]], checkout)
    commands = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    for line in commands:
        if line.startswith("make "):  # test_project.py runs make; this test runs under `make test`
            assert line in ("make demo", "make test")
            continue
        start = next((start for start in SHORTER if line.startswith(start)), None)
        assert start, f"{line!r} stands in README.md but no test runs it"
        run([*shlex.split(line), *SHORTER[start]], checkout)
    assert (checkout / "runs" / "mine" / "final" / "model.safetensors").is_file()


def test_results_are_those_of_the_released_weights():
    """The table is what `scripts.evaluate . --json data/results.json` found for the weights of the root."""
    results = json.loads((ROOT / "data" / "results.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest()
    assert results["weights_sha256"] == weights, "new weights: run scripts.evaluate with --json data/results.json"
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        ranked = {f"{task}, likeliest of four": languages for task, languages in results["ranked"].items()}
        for task, languages in (results["tasks"] | ranked).items():
            for language, cell in languages.items():
                share, low, high = (f"{cell[key]:.1%}" for key in ("match", "low", "high"))
                row = f"| {task} | {language} | {share} | {low} - {high} | {cell['count']} |"
                assert row in text, f"{readme}: no row {row!r}"
