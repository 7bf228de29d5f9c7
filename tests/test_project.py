"""Properties of the repository: what it declares is there, what it ships is clean, `make` works or says why not."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from minivlm.hub.secrets import HOMES

ROOT = Path(__file__).resolve().parents[1]
REMOTE = ("configuration_minivlm", "modeling_minivlm", "processing_minivlm")
CONFIG = configparser.ConfigParser(interpolation=None)
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
MODULES = CONFIG["options"]["py_modules"].split()
# What `import x` needs, where the distribution has another name.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def names(requirements):
    """The distributions in a block of requirements, spelt as pip compares them."""
    found = (re.match(r"[\w.-]+", line.strip()) for line in requirements.splitlines())
    return {match.group().lower().replace("_", "-") for match in found if match}


def imports(path, inside=True):
    """The top-level packages that a Python file imports, inside of functions too unless `inside` is False."""

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module.split(".")[0]
            elif inside or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def repository_files():
    """The files that are or would be committed; without git (a download from the Hub) all that are not generated."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        generated = ("runs", "build", "dist", "__pycache__")
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [str(path) for path in paths if not any(p in generated or p[:2] == ".v" for p in path.parts)]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def python_files():
    return [path for path in repository_files() if path.suffix == ".py"]


# What is declared


def test_modules_of_setup_cfg_are_those_at_the_root():
    at_the_root = {path.stem for path in ROOT.glob("*.py")} - {"app"}
    assert set(MODULES) == at_the_root


def test_version_stands_in_one_place():
    version = CONFIG["metadata"]["version"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.group(1) == version, "the newest entry of CHANGELOG.md is of another version than setup.cfg"
    declares = re.compile(r"^(__version__|version)\s*=", re.MULTILINE)
    elsewhere = [
        p for p in [*python_files(), ROOT / "pyproject.toml"] if declares.search(p.read_text(encoding="utf-8"))
    ]
    assert not elsewhere


def test_every_import_is_declared():
    """What is installed needs install_requires alone; an extra is imported in a function, by a tool or by a test."""
    base = names(CONFIG["options"]["install_requires"])
    extras = set().union(*(names(lines) for lines in CONFIG["options.extras_require"].values()))
    ours = {
        *MODULES,
        "minivlm",
        "tools",
        "tests",
        "helpers",
        "conftest",
        "app",
        "gradio",
    }  # a Space brings gradio itself
    missing = []
    for path in python_files():
        installed = path.stem in MODULES or path.is_relative_to(ROOT / "minivlm")
        installed = installed and path.name != "lmms_adapter.py"  # lmms-eval loads it
        siblings = set() if installed else {other.stem for other in path.parent.glob("*.py")}
        for inside, allowed in ((True, base | extras), (False, base if installed else base | extras)):
            for package in set(imports(path, inside)) - set(sys.stdlib_module_names) - ours - siblings:
                if DISTRIBUTIONS.get(package, package).lower().replace("_", "-") not in allowed:
                    missing.append(f"{path.relative_to(ROOT)} imports {package}")
    assert not missing, missing


def test_every_requirement_is_pinned_on_every_python():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', line) for line in pins)
    wanted = names(CONFIG["options"]["install_requires"])
    wanted = wanted.union(*(names(extra) for extra in CONFIG["options.extras_require"].values()))
    assert wanted <= names("\n".join(pins))
    # A pin with `python_version >= x` leaves older Pythons unpinned unless there is one with `< x`.
    newer, older = ({pin.split("==")[0] for pin in pins if f"version {sign} " in pin} for sign in (">=", "<"))
    assert newer <= older


def test_other_files_name_the_same_versions():
    """`version` stands in setup.cfg, ruff's in constraints.txt; these files cannot read them there."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for key, name in (("version", "version"), ("license", "license"), ("url", "url")):
        assert citation[key] == CONFIG["metadata"][name]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [ruff] = [repository["rev"] for repository in hooks if repository["repo"].endswith("/ruff-pre-commit")]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ruff=={ruff.removeprefix('v')}" in pins


def test_forms_for_issues_have_what_github_asks_for():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for form in map(yaml.safe_load, (path.read_text(encoding="utf-8") for path in forms)):
        assert {"name", "description", "body"} <= set(form)
        fields = [field for field in form["body"] if field["type"] in ("input", "textarea")]
        assert fields == form["body"] and all(field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE).group(1).split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, env=outside_make(), capture_output=True, text=True)
    assert not [name for name in targets if name != "help" and not re.search(rf"make {name}(:| )", shown.stdout)]
    # Without a rule of its own `make` would take the name of a file for done.
    rules = set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))
    assert rules == set(targets)


@pytest.mark.parametrize("name", REMOTE)
def test_remote_file_imports_what_the_hub_loader_can_provide(name):
    allowed = {"torch", "transformers", "PIL", "huggingface_hub", *REMOTE, *sys.stdlib_module_names}
    assert not set(imports(ROOT / f"{name}.py")) - allowed


# What is shipped


def test_no_file_names_a_path_of_somebodys_machine():
    found = []
    for file in repository_files():
        content = file.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{file.relative_to(ROOT)}: {match.group().decode()}" for match in HOMES.finditer(content)]
    assert not found, found


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=("lint", "format"))
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`make format` repairs most of this"


# The environment that make sets up


def make_project(path, requires="", constraints=""):
    """A project in which `make` works as in this one, but that needs little or nothing."""
    (path / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", path)
    shutil.copy(ROOT / "tools" / "bootstrap.py", path / "tools")
    write_needs(path, requires, constraints)
    return path


def write_needs(path, requires, constraints=""):
    options = f"[options]\npython_requires = >=3.10\ninstall_requires =\n    {requires}\n"
    (path / "setup.cfg").write_text(options + "[options.extras_require]\ntest =\n    minivlm-dummy\ndata =\n")
    (path / "constraints.txt").write_text(constraints)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "a path with spaces")


def write_wheel(folder, name, version):
    """A wheel without content that pip can install from a folder."""
    folder.mkdir(exist_ok=True)
    info, module = f"{name}-{version}.dist-info", f"{name}.py"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(module, f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/RECORD", "".join(f"{file},,\n" for file in (module, f"{info}/METADATA", f"{info}/RECORD"))
        )


def outside_make():
    """The variables without those by which a `make` that runs these tests would steer the one that they start."""
    ours = ("MFLAGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MAKE_TARGET", "PYTHON", "VENV", "ARGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def make(project, *arguments, **variables):
    environment = {name: value for name, value in outside_make().items() if not name.startswith("PIP_")}
    environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=(project / "wheels").as_uri(), PIP_CONFIG_FILE=os.devnull)
    environment.update(variables)
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def bootstrap(project, fake, *arguments):
    """Run bootstrap.py in a fresh interpreter after the statements of `fake`."""
    script = str(project / "tools" / "bootstrap.py")
    code = (
        f"import runpy, shutil, sys\n{fake}\nsys.argv = [{script!r}, *{arguments!r}]\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    environment = {**os.environ, "MAKE_TARGET": "demo"}
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment)


def test_make_alone_prints_every_target(project):
    done = make(project)
    assert done.returncode == 0, done.stderr
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert all(f"make {target} " in done.stdout or f"make {target}:" in done.stdout for target in targets[1:])


def test_too_old_python_is_refused_with_remedy(project):
    done = bootstrap(project, "sys.version_info = (3, 8, 18, 'final', 0)")
    assert done.returncode == 1
    assert "Python 3.8" in done.stderr and "needs 3.10" in done.stderr and "make demo PYTHON=" in done.stderr
    assert not (project / ".venv").exists()


def test_full_disk_is_refused_with_remedy(project):
    done = bootstrap(project, "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9e9, 8e9, 1_250_000_000)")
    assert done.returncode == 1
    assert "1.2 GB are free" in done.stderr and re.search(r"about \d GB are needed", done.stderr)
    assert "make demo VENV=" in done.stderr
    assert not (project / ".venv").exists()


def test_python_without_venv_is_refused_with_remedy(project):
    done = bootstrap(project, "sys.modules['ensurepip'] = None")
    version = "{}.{}".format(*sys.version_info)
    assert done.returncode == 1 and f"apt install python{version}-venv" in done.stderr and "make demo" in done.stderr
    assert not (project / ".venv").exists()


def test_missing_python_is_named(project):
    done = make(project, "venv", "PYTHON=no-such-python")
    assert done.returncode != 0 and "no 'no-such-python' here" in done.stderr and "make venv PYTHON=" in done.stderr


def test_check_installs_nothing(project):
    done = bootstrap(project, "", "--check")
    assert done.returncode == 0 and "would be made" in done.stderr
    assert not (project / ".venv").exists()


@pytest.mark.slow
def test_environment_is_made_once_kept_and_repaired(project):
    """In a path with spaces, offline: made, left alone, brought up to date, kept on a failure, rebuilt when broken."""
    wheels, venv = project / "wheels", project / ".venv"
    stamp, log = venv / "minivlm-stamp.json", venv / "pip.log"
    write_wheel(wheels, "minivlm_dummy", "1.0")
    write_wheel(wheels, "minivlm_dummy", "2.0")
    write_needs(project, "minivlm-dummy", "minivlm-dummy==1.0\n")

    def version():
        command = [venv / "bin" / "python", "-c", "import minivlm_dummy as m; print(m.version)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # The user's own packages neither count as installed nor are seen.
    (project / "stray").mkdir()
    (project / "stray" / "minivlm_dummy.py").write_text("version = 'stray'\n")
    done = make(project, "venv", PYTHONPATH=str(project / "stray"), PIP_USER="1", PIP_TARGET=str(project / "stray"))
    assert done.returncode == 0, done.stderr
    assert version() == "1.0"

    log.unlink()
    start = time.monotonic()
    assert make(project, "venv").returncode == 0
    assert time.monotonic() - start < 3 and not log.exists(), "the second call installed again"

    (project / "setup.cfg").write_text((project / "setup.cfg").read_text() + "[tool:pytest]\n")
    assert make(project, "venv").returncode == 0
    assert not log.exists(), "an edit that changes no requirement installed again"

    write_needs(project, "minivlm-dummy", "minivlm-dummy==3.0\n")
    before = stamp.read_text()
    done = make(project, "venv")
    assert done.returncode != 0 and "has no build for Python" in done.stderr and "make venv PYTHON=" in done.stderr
    assert stamp.read_text() == before and version() == "1.0"

    done = make(project, "venv", PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="1")
    assert done.returncode != 0 and "index was not reached" in done.stderr

    write_needs(project, "minivlm-dummy", "minivlm-dummy==2.0\n")
    assert make(project, "venv").returncode == 0
    assert version() == "2.0"

    # An install that was killed leaves its marker; a removed Python leaves an interpreter that does not start.
    (venv / "minivlm-unfinished").touch()
    (venv / "left-over").touch()
    assert make(project, "venv").returncode == 0
    assert version() == "2.0" and not (venv / "left-over").exists()
    (venv / "bin" / "python").unlink()
    assert make(project, "venv").returncode == 0
    assert version() == "2.0" and json.loads(stamp.read_text())["extras"] == []


def test_environment_of_somebody_else_is_not_touched(project):
    (project / ".venv").mkdir()
    (project / ".venv" / "thesis.txt").touch()
    done = make(project, "venv")
    assert done.returncode != 0 and "not made by `make`" in done.stderr and "VENV=" in done.stderr
    assert (project / ".venv" / "thesis.txt").exists()


@pytest.mark.slow
def test_real_install_in_a_path_with_spaces(tmp_path):
    """Needs the network, about 2 GB and a few minutes."""
    project = tmp_path / "a path with spaces"
    make_project(project)
    for name in ("setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    command = ["make", f"PYTHON={sys.executable}", "venv"]
    subprocess.run(command, cwd=project, env=outside_make(), check=True)
    start = time.monotonic()
    subprocess.run(command, cwd=project, env=outside_make(), check=True)
    assert time.monotonic() - start < 3
    code = "import accelerate, datasets, torch, transformers; print(transformers.__version__)"
    subprocess.run([project / ".venv" / "bin" / "python", "-I", "-c", code], check=True)
