"""Look at the files that would be published: sizes, licences, card, tokens and paths, and loading by a stranger.

Each check returns a `Finding`. The limits on sizes and the licence files are rules of our own release. For a model of
somebody else they are notes.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from minivlm.hub.background import link_or_copy
from minivlm.hub.card import beside, read_run, write_card
from minivlm.hub.check import files_of, loading_problems, read_header
from minivlm.hub.format_table import RECORD
from minivlm.hub.secrets import leaks, scrub

MEGABYTE = 10**6
MOST_OF_A_FILE = 50 * MEGABYTE
MOST_OF_WEIGHTS = 32 * MEGABYTE
MOST_PARAMETERS = 15 * 10**6
CARD_KEYS = ("license", "language", "library_name", "pipeline_tag", "tags")
LOADER = Path(__file__).with_name("load_remote.py")


@dataclass(frozen=True)
class Finding:
    """Hold the result of one check; `state` is "right", "wrong" or "note"."""

    name: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<7}{self.name:<12}{self.text}"


def finding(name: str, problems: list[str], good: str, rule: bool = True) -> Finding:
    """Return a finding: right without problems, else wrong, or a note where the check is no `rule` for this model."""
    state = "right" if not problems else "wrong" if rule else "note"
    return Finding(name, state, "; ".join(problems) or good)


def stage(folder: Path, target: Path, repo_id: str | None) -> Path:
    """Copy the files that would go up into `target`, write their card as `publish` does, and return the copy's folder.

    The folder itself stays as it is.
    """
    model = target / "model"
    for name in files_of(folder):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(folder / name, model / name)
    for name in ("recipe.yaml", "loss.png", RECORD):
        if path := beside(folder, name):
            link_or_copy(path, target / name)
    write_card(model, repo_id or "owner/name", read_run(folder))
    return model


def inspect_files(folder: Path, ours: bool) -> Iterator[Finding]:
    """Yield the findings on a staged folder that need no model to be loaded.

    Args:
        ours: True if the folder is our own release, whose sizes and licence files have rules.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    sizes = {name: (folder / name).stat().st_size for name in files}
    total = f"{len(files)} files, {sum(sizes.values()) / MEGABYTE:.1f} MB"
    yield finding("files", loading_problems(folder, files), f"{total}; weights and code are complete, no pickle")
    large = [f"{n.as_posix()} has {s / MEGABYTE:.1f} MB, at most 50" for n, s in sizes.items() if s > MOST_OF_A_FILE]
    yield finding("size", large, f"the largest file has {max(sizes.values(), default=0) / MEGABYTE:.1f} MB", ours)
    yield inspect_weights(folder, ours)
    yield finding(
        "licences", licence_problems(folder), "LICENSE and NOTICE are there, the card names the licence", ours
    )
    yield finding("card", card_problems(folder), "README.md has a valid header, and what it links to is there")
    told = [f"{name.as_posix()} holds {leak}" for name in files for leak in leaks((folder / name).read_bytes())]
    yield finding("secrets", told, f"no token, key or path of this machine in {len(files)} files")


def inspect_weights(folder: Path, ours: bool) -> Finding:
    """Compare the weights with the limits of our release."""
    paths, problems = sorted(folder.glob("*.safetensors")), []
    try:
        tensors = [tensor for path in paths for tensor in read_header(path).values()]
    except (OSError, ValueError) as error:
        return Finding("weights", "wrong", str(error))
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors)
    size = sum(path.stat().st_size for path in paths)
    if parameters > MOST_PARAMETERS:
        problems.append(f"{parameters / 1e6:.1f} M parameters, at most {MOST_PARAMETERS / 1e6:.0f} M in our release")
    if size > MOST_OF_WEIGHTS:
        problems.append(
            f"{size / MEGABYTE:.1f} MB, at most {MOST_OF_WEIGHTS / MEGABYTE:.0f}. Save them as bf16 or fp16"
        )
    types = ", ".join(sorted({tensor["dtype"] for tensor in tensors})) or "none"
    good = f"{parameters / 1e6:.1f} M parameters, {size / MEGABYTE:.1f} MB, safetensors of type {types}"
    return finding("weights", problems, good, ours)


def licence_problems(folder: Path) -> list[str]:
    """Name what is missing of the licences: the files, or the card's agreement with LICENSE."""
    absent = [name for name in ("LICENSE", "NOTICE") if not (folder / name).is_file()]
    if absent:
        return [f"{' and '.join(absent)} missing. Copy the files of MiniVLM: its code goes up with the weights"]
    text = (folder / "LICENSE").read_text(encoding="utf-8")
    named = read_card_header(folder).get("license")
    if ("Apache License" in text) != (named == "apache-2.0"):
        return [
            f"the card says license: {named}, LICENSE begins with {text.split(maxsplit=1)[0] if text else 'nothing'}"
        ]
    return []


def read_card_header(folder: Path) -> dict:
    """Return the YAML header of README.md; an empty dict if there is none that can be read."""
    path = folder / "README.md"
    match = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.DOTALL) if path.is_file() else None
    try:
        header = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        header = {}
    return header if isinstance(header, dict) else {}


def card_problems(folder: Path) -> list[str]:
    """Name what is wrong with README.md as a model card: header, results, links to files that are not there."""
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing"]
    text = path.read_text(encoding="utf-8")
    try:
        ModelCard(text, ignore_metadata_errors=False)  # the library's own check of header and model-index
    except (ValueError, yaml.YAMLError) as error:
        return [f"README.md: {' '.join(str(error).split())[:200]}"]
    header = read_card_header(folder)
    problems = [f"no {key} in the header of README.md" for key in CARD_KEYS if not header.get(key)]
    if header and header.get("pipeline_tag") != "image-text-to-text":
        problems.append(f"pipeline_tag is {header.get('pipeline_tag')}, not image-text-to-text")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", prose) if not re.match(r"[a-z]+:", link)}
    return problems + [
        f"README.md links to {x}, which is not there" for x in sorted(links) if not (folder / x).exists()
    ]


def load_by_stranger(folder: Path) -> Finding:
    """Load a staged folder in a process of its own, offline, with an empty cache and away from this checkout."""
    with tempfile.TemporaryDirectory() as place:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
        environment |= {"HF_HOME": place, "HF_MODULES_CACHE": str(Path(place, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", LOADER.read_text(encoding="utf-8"), str(folder.resolve())]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Finding("loading", "wrong", scrub(f"with its own code it does not load: {lines[-1][:300]}"))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    problems = [f"{len(found['misfits'])} weights do not fit: {', '.join(found['misfits'][:3])}"] * bool(
        found["misfits"]
    )
    if not found["finite"]:
        problems.append("its logits are not finite")
    foreign = [name for name in found["code"] if not name.startswith("transformers_modules.")]
    problems += [f"{name} was loaded, not the code in the folder" for name in foreign]
    good = f"with its own code from an empty cache, offline: {found['parameters'] / 1e6:.1f} M parameters"
    return finding("loading", problems, f"{good}, {found['dtype']}, answers {found['answer']!r}")
