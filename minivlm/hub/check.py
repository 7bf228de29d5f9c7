"""Decide which files of a folder go to the Hub, and refuse a folder that could not be loaded from there."""

import json
import re
import subprocess
import zipfile
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
RESULTS = Path(".eval_results", "benchmarks.yaml")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def check(folder: str | Path, repo_id: str, tag: str | None = None) -> list[Path]:
    """Return the files that go up, relative to `folder`. Nothing is sent.

    Raises:
        ValueError: the names are not allowed on the Hub, or `from_pretrained(repo_id, trust_remote_code=True)` would
            fail on the files. All reasons are named at once.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json. Name a folder as save_pretrained leaves it, as runs/train/final.")
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id {repo_id!r} lacks its namespace: write owner/name, as jinv2/minivlm.")
    if tag and not re.fullmatch(r"\w[\w.-]*(?<!\.)(?<!\.lock)", tag, re.ASCII) or ".." in (tag or ""):
        raise ValueError(f"tag {tag!r}: use letters, digits, dots and hyphens only, as v1.0.")
    files = files_of(folder)
    if problems := loading_problems(folder, files):
        raise ValueError(f"{folder} is not ready for the Hub:\n" + "\n".join(f"- {p}." for p in problems))
    return files


def loading_problems(folder: Path, files: list[Path]) -> list[str]:
    """Name each reason why `from_pretrained` would fail on the files or must not read them."""
    problems = weight_problems(folder) + code_problems(folder)
    named = [f"{file} is a pickle, which runs code when it is loaded" for file in files if is_pickle(folder / file)]
    return problems + named


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle by its suffix, or by its first bytes whatever its name."""
    if path.suffix in PICKLES:
        return True
    with path.open("rb") as file:
        if re.match(rb"\x80[\x02-\x05]", start := file.read(4)):
            return True
    if start != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip file with a pickle in it
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def files_of(folder: Path) -> list[Path]:
    """List the files to upload, relative to `folder`.

    A git checkout goes up as git tracks it. Any other folder goes up without hidden files, since `.env` may hold
    secrets, and without `__pycache__`; of hidden files it keeps the results that the card's writer makes.
    """
    if (folder / ".git").exists():
        names = tracked_files(folder)
    else:
        names = [path.relative_to(folder) for path in folder.rglob("*")]
        names = [n for n in names if n == RESULTS or not any(p[0] == "." or p == "__pycache__" for p in n.parts)]
    return sorted(name for name in names if (folder / name).is_file())


def tracked_files(folder: Path) -> list[Path]:
    """List the files that git tracks in `folder`; raise ValueError if git cannot read the checkout."""
    listed = subprocess.run(["git", "-C", folder, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        raise ValueError(
            f"{folder} has a .git, but git cannot list its files: {' '.join(listed.stderr.split())}. Mend that, "
            "or publish a copy of the folder without .git."
        )
    return [Path(name) for name in listed.stdout.split("\0") if name]


def weight_problems(folder: Path) -> list[str]:
    """Name weights that are missing or cut short; transformers takes the single file before the index of several."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        return ["model.safetensors is missing (pickled weights are not published: save_pretrained writes safetensors)"]
    try:
        names = [single.name] if single.is_file() else json.loads(index.read_text())["weight_map"].values()
        for name in sorted(set(names)):
            read_header(folder / name)
    except (OSError, ValueError, KeyError) as error:
        return [str(error)]
    return []


def read_header(path: Path) -> dict[str, dict]:
    """Return type, shape and place of each tensor of a safetensors file.

    Raises:
        ValueError: the file ends before its tensors do, or is git-lfs's pointer to them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if 8 + length <= size else None
    if header is not None:
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if header is None or size != end:
        raise ValueError(f"{path.name} is no whole safetensors file ({size:,} bytes). Save or copy it again")
    return header


def code_problems(folder: Path) -> list[str]:
    """Name code that the Hub's loader would not find, by `auto_map` and the imports of the files in it."""
    problems, modules = [], set()
    for name, needed in (("config.json", "AutoConfig"), ("processor_config.json", "AutoProcessor")):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing: save the processor in this folder, too")
            continue
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
        except ValueError as error:
            problems.append(f"{name} is not JSON ({error})")
            continue
        if needed not in auto_map:
            problems.append(f"{name} has no {needed} in its auto_map: save it by a class that is registered for it")
        values = [v for value in auto_map.values() for v in (value if isinstance(value, list) else [value])]
        modules |= {value.rsplit(".", 1)[0] for value in values if value and "--" not in value}  # owner/name--module
    seen = set()
    while waiting := sorted(modules - seen):
        seen.add(waiting[0])
        path = folder / f"{waiting[0]}.py"
        if path.is_file():
            modules |= set(re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
        else:
            problems.append(f"{path.name} is missing, code that the model is loaded by")
    return problems
