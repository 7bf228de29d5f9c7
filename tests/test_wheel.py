"""The wheel works alone: built, installed and used from an empty folder, without checkout and network."""

import configparser
import filecmp
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivlm"
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
MODULES = CONFIG["options"]["py_modules"].split()
TINY = {
    "vision_config": {
        "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    },
    "text_config": {
        "model_type": "minivlm_text", "vocab_size": 6400, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512,
    },
}  # fmt: skip
ASK = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.open("red.png")}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print("code:", type(model).__module__)
print("new tokens:", output.shape[1] - inputs["input_ids"].shape[1])
"""


# What setup.cfg and the folders say


def test_packages_of_setup_cfg_are_the_folders():
    mapped = dict(line.split(" = ") for line in CONFIG["options"]["package_dir"].strip().splitlines())
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    assert set(CONFIG["options"]["packages"].split()) == folders | {"minivlm.assets"} | set(mapped)
    for package, folder in mapped.items():
        # Without this the root's folder would be the second home of the same files.
        assert (ROOT / folder).is_dir() and not (PACKAGE / package.rpartition(".")[2]).exists()


def test_new_models_start_from_what_the_published_model_has():
    """Those at the root are the published model's: copies that change with new weights only (CONTRIBUTING.md)."""
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        same = filecmp.cmp(PACKAGE / "assets" / name, ROOT / name, shallow=False)
        assert same, f"minivlm/assets/{name} differs from {name}: see CONTRIBUTING.md, Assets"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of what it is made of."""
    source = tmp_path_factory.mktemp("source")
    beside = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    for name in (*(f"{module}.py" for module in MODULES), *beside):
        shutil.copy(ROOT / name, source)
    for folder in ("minivlm", "recipes", "configs", "web"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(command, cwd=source, check=True, timeout=300, capture_output=True)
    [path] = source.glob("minivlm-*.whl")
    return path


def test_the_wheel_carries_every_file_and_no_other_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {f"{module}.py" for module in MODULES}
    wanted |= {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (PACKAGE / "assets").iterdir()}
    wanted |= {f"minivlm/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    wanted |= {f"minivlm/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    wanted |= {f"minivlm/web/{path.name}" for path in (ROOT / "web").iterdir()}
    assert carried == wanted


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(...)` runs `minivlm` in an empty folder and an environment with the wheel and its dependencies."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", with_pip=False)
    scheme = {"base": str(root / "venv"), "platbase": str(root / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    bin = Path(sysconfig.get_path("scripts", "venv", vars=scheme))
    # The dependencies of the tests' environment, but not its hooks: an editable install would lead to the checkout.
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(outer))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    install = [str(bin / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    install += ["--ignore-installed", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, env=environment, timeout=300, capture_output=True)
    (root / "empty").mkdir()
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1"}

    def call(*arguments, python=False, code=0):
        command = [str(bin / ("python" if python else "minivlm")), *arguments]
        done = subprocess.run(
            command, cwd=root / "empty", env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    call.folder = root / "empty"
    return call


@pytest.fixture(scope="module")
def data(installed):
    """A parquet file of eight rows, a model configuration and a picture, as a user would bring them."""
    Image.new("RGB", (40, 30), "red").save(installed.folder / "red.png")
    (installed.folder / "model.json").write_text(json.dumps(TINY))
    picture = (installed.folder / "red.png").read_bytes()
    rows = []
    for answer in ("red", "a red square") * 4:
        turns = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": answer}]
        rows.append({"conversations": json.dumps(turns), "image_bytes": picture})
    pq.write_table(pa.Table.from_pylist(rows), installed.folder / "rows.parquet")
    return "rows.parquet"


OPTIONS = ["--max_steps", "2", "--batch_size", "4", "--workers", "0", "--mixed_precision", "no", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(installed, data):
    config = (installed.folder / "model.json").read_text()
    installed("train", "--model_config", config, "--data", data, "--output_dir", "run", *OPTIONS)
    assert json.loads((installed.folder / "run" / "run.json").read_text())["steps"] == 2
    return "run/final"


def test_the_code_is_that_of_the_wheel(installed):
    code = "from importlib.util import find_spec as f; print(f('minivlm').origin, f('train_accelerate').origin)"
    found = installed("-c", code, python=True)
    assert str(ROOT) not in found and found.count(f"{os.sep}venv{os.sep}") == 2


def test_the_command_lists_commands(installed):
    from minivlm.__main__ import COMMANDS

    assert all(f"  {name} " in installed() for name in COMMANDS)


def test_a_trained_model_is_evaluated(installed, data, trained):
    installed("evaluate", trained, "--data", data, "--device", "cpu", "--json", "metrics.json")
    assert json.loads((installed.folder / "metrics.json").read_text())["overall"]["count"] == 8


def test_a_trained_model_is_converted(installed, trained):
    installed("convert", "to_llava", trained, "--out", "llava")
    assert json.loads((installed.folder / "llava" / "config.json").read_text())["model_type"] == "llava"


def test_a_trained_model_answers_by_the_code_beside_it(installed, trained):
    out = installed("-c", ASK, trained, python=True)
    assert "code: transformers_modules." in out and "new tokens: 4" in out


def test_a_recipe_is_found_in_the_package(installed, data):
    config = (installed.folder / "model.json").read_text()
    options = [*OPTIONS, "--max_steps", "1", "--model_config", config, "--data", data, "--output_dir", "micro"]
    installed("train", "--recipe", "micro", *options)
    options = json.loads((installed.folder / "micro" / "run.json").read_text())["options"]
    assert options["optimizer"] == "muon"  # as recipes/micro.yaml says
    message = installed("train", "--recipe", "mikro", *OPTIONS, code=2)
    assert "Did you mean micro?" in message and "Traceback" not in message
