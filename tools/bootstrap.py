"""Make the project's virtual environment, or bring it up to date if it is not; `make` calls this.

It runs on any Python, which may turn out to be too old: standard library only, syntax of Python 3.6. setup.cfg says
what to install, constraints.txt in which versions. The stamp, a file in the environment, records the last complete
install: extras, Python, and a key of requirements and versions.
"""

import argparse
import configparser
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAMP, MARKER = "minivlm-stamp.json", "minivlm-unfinished"

# Measured: the CPU build of torch 2.13 and the rest take 1.6 GB installed; the CUDA build that PyPI has for Linux is
# 2.7 GB of wheels. The limits add a margin; pip's temporary folder and CUDA's installed size are estimates. Nobody
# knows which build pip will choose before it does.
VENV_GB, TEMPORARY_GB, CUDA_GB = 3, 1, 10
CPU_INDEX = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
PYTHON = "{}.{}".format(*sys.version_info[:2])
TARGET = os.environ.get("MAKE_TARGET", "venv")  # for the commands that messages name


class Stop(Exception):
    """The environment cannot be made; the message says what was found, what is needed, and what to do."""


def say(message):
    """Print a message to stderr at once."""
    print(message, file=sys.stderr, flush=True)


def requirements(extras):
    """Return the requirements in setup.cfg with `extras`, the oldest Python, and a key of all versions."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(os.path.join(ROOT, "setup.cfg"), encoding="utf-8")
    known = config["options.extras_require"]
    for extra in extras:
        if extra not in known:
            raise Stop("setup.cfg has no extra {!r}; it has: {}.".format(extra, ", ".join(known)))
    lines = config["options"]["install_requires"] + "".join("\n" + known[extra] for extra in extras)
    wanted = [line.strip() for line in lines.splitlines() if line.strip()]
    with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
        pins = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    key = hashlib.sha256(json.dumps([wanted, pins]).encode()).hexdigest()
    oldest = re.search(r">=\s*(\d+)\.(\d+)", config["options"]["python_requires"])
    return wanted, tuple(int(part) for part in oldest.groups()), key


def check_python(oldest):
    """Stop if this Python is older than `oldest`, (major, minor)."""
    if sys.version_info[:2] < oldest:
        raise Stop(
            f"Python {PYTHON} at {sys.executable} is too old: MiniVLM needs {oldest[0]}.{oldest[1]} or later.\n"
            "Install a newer one (https://www.python.org/downloads, your package manager, pyenv, conda or uv), and "
            f"name it:\n  make {TARGET} PYTHON=python3.12"
        )


def check_venv_module():
    """Stop if this Python cannot make virtual environments."""
    try:
        import ensurepip  # noqa: F401  (Debian and Ubuntu ship `venv` without it)
        import venv  # noqa: F401
    except ImportError as error:
        raise Stop(
            f"Python {PYTHON} at {sys.executable} cannot make virtual environments ({error}).\n"
            f"On Debian and Ubuntu: sudo apt install python{PYTHON}-venv\n"
            f"Elsewhere: install a complete Python and name it: make {TARGET} PYTHON=/path/to/python3"
        )


def check_disk(venv):
    """Stop if a disk has less free space than the environment and pip's temporary folder need on it."""
    temporary = tempfile.gettempdir()
    disks = {}  # device number -> [path, GB needed, remedy]
    remedies = (
        (venv, VENV_GB, "put the environment on another disk:\n  make {} VENV=/path/on/another/disk/env"),
        (temporary, TEMPORARY_GB, "give pip another folder for downloads:\n  TMPDIR=/path/on/another/disk make {}"),
    )
    for path, need, remedy in remedies:
        while not os.path.exists(path):
            path = os.path.dirname(path)
        entry = disks.setdefault(os.stat(path).st_dev, [path, 0, remedy])
        entry[1] += need
    for path, need, remedy in disks.values():
        free = shutil.disk_usage(path).free / 1e9
        if free < need:
            raise Stop(
                f"The disk of {path} is too full: {free:.1f} GB are free, about {need} GB are needed.\n"
                f"Make room there, or {remedy.format(TARGET)}"
            )
        if free < CUDA_GB and sys.platform == "linux":
            say(
                f"Note: {free:.1f} GB are free on the disk of {path}. That is enough for the CPU build of torch, not "
                f"for the CUDA build\n(about {CUDA_GB} GB). Without a GPU: {CPU_INDEX} make {TARGET}"
            )


def interpreter(venv):
    """Return the path of the environment's Python."""
    return os.path.join(venv, "Scripts" if os.name == "nt" else "bin", "python")


def read_stamp(venv):
    """Return the stamp of the last complete install; None if there is none, or if a later install was cut short."""
    try:
        if os.path.exists(os.path.join(venv, MARKER)):
            return None
        with open(os.path.join(venv, STAMP), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def runs(venv):
    """Return True if the environment's Python starts and has pip."""
    try:
        command = [interpreter(venv), "-I", "-c", "import pip"]
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def clear(venv):
    """Remove an unusable environment; stop if `make` did not make it and it works or is no environment."""
    aside = venv + ".old"
    if os.path.isdir(aside):
        shutil.rmtree(aside)
    if not os.path.lexists(venv):
        return
    ours = any(os.path.exists(os.path.join(venv, name)) for name in (STAMP, MARKER))
    if not ours:
        looks = os.path.isdir(venv) and (not os.listdir(venv) or os.path.exists(os.path.join(venv, "pyvenv.cfg")))
        if not looks or runs(venv):
            raise Stop(
                f"{venv} exists and was not made by `make`.\n"
                f"Remove it, or choose another place: make {TARGET} VENV=.venv-minivlm"
            )
    say(f"Removing {venv}: it is unfinished, broken or of another Python.")
    os.rename(venv, aside)  # a removal that is cut short would leave a folder without marker, which is not removed
    shutil.rmtree(aside)


@contextlib.contextmanager
def lock(venv):
    """Let a second `make` wait until the first one has finished, since its environment looks abandoned until then."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    os.makedirs(os.path.dirname(venv), exist_ok=True)
    with open(venv + ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"Another `make` is working on {venv}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def clean_environment():
    """Return the variables without those by which Python finds other packages, or pip installs in other places."""
    strangers = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "__PYVENV_LAUNCHER__")
    environment = {name: value for name, value in os.environ.items() if name not in strangers}
    environment.update(PYTHONNOUSERSITE="1", PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return environment


def make_venv(venv):
    """Make an empty environment that is marked as unfinished."""
    say(f"Making {venv} with Python {PYTHON}")
    os.makedirs(venv)
    open(os.path.join(venv, MARKER), "w").close()
    command = [sys.executable, "-I", "-m", "venv", venv]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment())
    if done.returncode:
        raise Stop("`{}` failed:\n{}".format(" ".join(command), done.stdout.decode(errors="replace")[-2000:]))


def pip_install(venv, wanted):
    """Run pip, print large downloads as they start, and stop with the end of pip's log if it fails."""
    log = os.path.join(venv, "pip.log")
    command = [interpreter(venv), "-I", "-m", "pip", "install", "--progress-bar", "off"]
    command += ["--constraint", os.path.join(ROOT, "constraints.txt")] + wanted
    say("Installing {} and what they need".format(", ".join(re.split(r"[<>=!~; ]", name)[0] for name in wanted)))
    start, cuda, lines = time.time(), False, []
    pip = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean_environment()
    )
    with open(log, "w", encoding="utf-8") as file:
        for raw in iter(pip.stdout.readline, b""):
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            file.write(line + "\n")
            large = re.match(r"\s*(Downloading|Using cached) (\S+?)-(\d[^-]*)-\S+ \((\d\d+\.?\d* MB|.* GB)", line)
            if large:
                say("{:5.0f} s  {} {} {}, {}".format(time.time() - start, *large.groups()))
            elif line.startswith("Installing collected packages: "):
                count = line.count(",") + 1
                say(f"{time.time() - start:5.0f} s  Unpacking {count} packages; this takes a minute or two")
            if not cuda and re.match(r"Collecting (nvidia|cuda)-", line):
                cuda = True
                say(
                    "         This is the CUDA build of torch: 2.7 GB of downloads. If this machine has no GPU, stop "
                    f"here (Ctrl-C) and run\n         {CPU_INDEX} make {TARGET}"
                )
    if pip.wait():
        end, advice = "\n  ".join(lines[-15:]), explain("\n".join(lines))
        raise Stop(f"pip failed; its last lines:\n  {end}\n\n{advice}\n(pip's whole log: {log})")
    say(f"{time.time() - start:5.0f} s  Done")


def explain(output):
    """Return what to do next, by what pip printed."""
    if re.search(r"No space left|Errno 28|Disk quota", output):
        return (
            f"The disk is full. Make room, or use another one: make {TARGET} VENV=/other/disk/env\n"
            "TMPDIR and PIP_CACHE_DIR say where pip puts its downloads."
        )
    if re.search(
        r"new connection|Connection\w*Error|\w+Timeout|SSLError|ProxyError|name resolution|timed out", output
    ):
        return (
            "The package index was not reached. Behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL; for a "
            f"slow line\nset PIP_DEFAULT_TIMEOUT=180. Then call make {TARGET} again: finished downloads come from "
            "pip's cache."
        )
    if re.search(r"No matching distribution|ResolutionImpossible|Failed to build|building wheel", output):
        return (
            f"A package of constraints.txt has no build for Python {PYTHON} on this system, or your index lacks it.\n"
            f"Try another Python (make {TARGET} PYTHON=python3.12), or the default index (unset PIP_INDEX_URL and "
            "PIP_NO_INDEX)."
        )
    return f"Call make {TARGET} again; if it fails in the same way, open an issue with the log."


def main(argv=None):
    """Make or update the environment; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="where the environment is, relative to the repository")
    parser.add_argument("--extras", default="", help="extras of setup.cfg, separated by commas")
    parser.add_argument("--python-chosen", action="store_true", help="make it anew if it has another Python than this")
    parser.add_argument("--check", action="store_true", help="only look whether it could be made; install nothing")
    options = parser.parse_args(argv)
    venv = os.path.realpath(os.path.join(ROOT, os.path.expanduser(options.venv)))
    extras = {extra for extra in options.extras.split(",") if extra}

    def plan():
        """Return the extras to install, their requirements, and whether the environment is usable and complete."""
        stamp = read_stamp(venv) or {}
        everything = sorted(extras | set(stamp.get("extras", ())))
        wanted, oldest, key = requirements(everything)
        usable = bool(stamp) and runs(venv) and not (options.python_chosen and stamp["python"] != PYTHON)
        return everything, wanted, oldest, key, usable, usable and stamp["key"] == key

    try:
        if options.check:
            _, _, oldest, _, usable, complete = plan()
            if not usable:
                check_python(oldest)
                check_venv_module()
                check_disk(venv)
            state = "is up to date" if complete else "would be brought up to date" if usable else "would be made"
            say(f"{venv} {state}.")
            return 0
        if plan()[-1]:
            return 0
        with lock(venv):
            everything, wanted, oldest, key, usable, complete = plan()
            if complete:
                return 0
            if not usable:
                check_python(oldest)
                check_venv_module()
                clear(venv)
                check_disk(venv)
                make_venv(venv)
            # The environment counts as unfinished while the marker is there. If pip fails on an environment that was
            # complete before, pip leaves it as it was, and the marker is removed.
            marker, stamp = os.path.join(venv, MARKER), os.path.join(venv, STAMP)
            python = (read_stamp(venv) or {}).get("python", PYTHON)
            open(marker, "w").close()
            try:
                pip_install(venv, wanted)
            except Stop:
                if usable:
                    os.remove(marker)
                raise
            with open(stamp, "w", encoding="utf-8") as file:
                json.dump({"key": key, "extras": everything, "python": python}, file)
            os.remove(marker)
    except Stop as stop:
        say(f"\n{stop}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted. The next call of make starts again; finished downloads come from pip's cache.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
