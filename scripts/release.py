"""Publish a trained model on the Hugging Face Hub, where `from_pretrained` finds it.

    python -m scripts.release runs/train/final --repo_id jinv2/minivlm --tag v1.0

What could not be loaded is refused before anything is sent. Everything goes up in one commit, so the Hub never shows
half a model; weights there that transformers would load instead of these are deleted by it. README.md, the model card,
is written anew from run.json, recipe.yaml and loss.png of the run, unless it is your own. Log in first: `hf auth
login`, with a token that may write. After a failure the same command goes on: what is already up is not sent again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id

from scripts.model_card import read_header, read_run, scrub, secret, write_card

MESSAGE = "Upload model"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

TRANSIENT = (408, 409, 412, 429)  # and every 5xx. 409, 412: somebody else commits at this moment
WAITS = (1, 4, 16, 60)  # seconds before each further try
LONGEST_WAIT = 300  # seconds that a server may ask for; the Hub counts requests in windows of five minutes
TIMEOUT = 120.0  # seconds without a byte; huggingface_hub sets none: a dead connection would hold training for ever


class ReleaseError(RuntimeError):
    """A model that is not on the Hub, or without its tag: what happened, what to do, and the command to go on with."""


# ------------------------------------------------------------------------------------------------------ what goes up


def check(folder: str | Path, repo_id: str, tag: str | None = None) -> list[Path]:
    """The files that go up, relative to `folder`.

    Raises:
        ValueError: `from_pretrained(repo_id, trust_remote_code=True)` would fail on them; all reasons at once.
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
    problems = weight_problems(folder) + code_problems(folder)
    problems += [f"{file} is a pickle, which runs code when it is loaded" for file in files if file.suffix in PICKLES]
    if problems:
        raise ValueError(f"{folder} is not ready for the Hub:\n" + "\n".join(f"- {p}." for p in problems))
    return files


def files_of(folder: Path) -> list[Path]:
    """A checkout goes up as git tracks it; any other folder without hidden files (`.env` holds secrets) and caches."""
    if (folder / ".git").exists():
        listed = subprocess.run(["git", "-C", folder, "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = [*map(Path, filter(None, listed.stdout.split("\0")))]
    else:
        names = [path.relative_to(folder) for path in folder.rglob("*")]
        names = [n for n in names if not any(part[0] == "." or part == "__pycache__" for part in n.parts)]
    return sorted(name for name in names if (folder / name).is_file())


def weight_problems(folder: Path) -> list[str]:
    """Weights that are missing or cut short; transformers takes the single file before the index of several."""
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


def code_problems(folder: Path) -> list[str]:
    """Code that the Hub's loader would look for in vain, by `auto_map` and the imports of the files that it names."""
    problems, modules = [], set()
    for name, needed in (("config.json", "AutoConfig"), ("processor_config.json", "AutoProcessor")):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing: save the processor in this folder, too")
            continue
        auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
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


# ---------------------------------------------------------------------------------------------------------- the Hub


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    tag: str | None = None,
    message: str = MESSAGE,
    run: dict | None = None,
) -> str:
    """Put the model in `folder` on the Hub: repository (made if need be), one commit, tag.

    Args:
        run: content of run.json for the card. Default: that of the model's folder or the one above.

    Returns:
        URL of the commit; of the newest one if the Hub already has all of it.

    Raises:
        ValueError: the folder is not ready for the Hub; nothing was sent.
        ReleaseError: the Hub did not take it. The folder is as it was, but for its card.
    """
    folder, url = Path(folder), None
    check(folder, repo_id, tag)
    try:
        write_card(folder, repo_id, read_run(folder) if run is None else run)
        api, files = HfApi(), files_of(folder)
        # None, not False, so that an organisation whose repositories are private by default gets a private one.
        retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        commit = retry(lambda: commit_files(api, folder, files, repo_id, message))
        url = commit.commit_url
        if tag:
            retry(lambda: tag_commit(api, repo_id, tag, commit.oid))
        return url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        done = f"{repo_id} is uploaded ({url}) but not tagged {tag}" if url else f"{repo_id} is not uploaded"
        wrapped = not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError)
        cause = error.__cause__ if wrapped else error  # of "RuntimeError: Error while uploading 'model.safetensors'"
        problem = f"{done}: {describe(cause)}. {remedy(cause, repo_id)}".strip()
    command = ["python", "-m", "scripts.release", str(folder), "--repo_id", repo_id, *["--private"][: int(private)]]
    command += (["--tag", tag] if tag else []) + (["--message", message] if message != MESSAGE else [])
    # Outside of the handler, so that the first error, whose text is not ours, is no part of the traceback.
    raise ReleaseError(
        scrub(f"{problem}\nThe model itself is safe in {folder}. To go on later:\n    {shlex.join(command)}")
    )


def commit_files(api: HfApi, folder: Path, files: list[Path], repo_id: str, message: str) -> CommitInfo:
    """One commit of `files`, on top of whatever is there now.

    Tried again after a commit whose answer was lost, it finds nothing left to do and returns that commit.
    """
    operations = [CommitOperationAdd(file.as_posix(), str(folder / file)) for file in files]
    ours = {file.as_posix() for file in files}
    stale = [name for name in api.list_repo_files(repo_id) if WEIGHTS.fullmatch(name) and name not in ours]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=message)


def tag_commit(api: HfApi, repo_id: str, tag: str, oid: str) -> None:
    api.create_tag(repo_id, tag=tag, revision=oid, exist_ok=True)  # a further try may find the tag that it made itself
    if api.model_info(repo_id, revision=tag).sha != oid:
        raise ValueError(f"the tag {tag} already names another commit. Choose another --tag, or delete that one")


def retry(call: Callable):
    """What `call` returns, after a few more tries if a failure is one that passes.

    huggingface_hub repeats file listing, preupload, LFS batch and PUT itself (`http_backoff`: six tries, Retry-After
    honoured whatever its length), but not the creation of repositories, card validation, commits and tags.
    """
    for wait in (*WAITS, None):
        session = get_session()
        if session.timeout.read is None:
            session.timeout = TIMEOUT
        try:
            return call()
        # A gateway's HTML in place of JSON is a JSONDecodeError: card validation reads the answer before its status.
        except (HTTPError, json.JSONDecodeError) as error:
            asked = seconds_asked(error)
            if wait is None or not passes(error) or asked > LONGEST_WAIT:
                raise
            print(scrub(f"{describe(error)}; trying again in {max(wait, asked)} s"), file=sys.stderr)
        time.sleep(max(wait, asked))


def passes(error: Exception) -> bool:
    """Whether a further try makes sense and is ours to make."""
    status, (method, path) = status_of(error), request_of(error)
    if method == "PUT" or method == "GET" and "/tree/" in path or re.search(r"/preupload/|\.git/info/lfs/", path):
        return False  # huggingface_hub has tried six times, or knows better
    return status is None or status >= 500 or status in TRANSIENT


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def request_of(error: Exception) -> tuple[str, str]:
    """Method and path: no query, which may hold a signature."""
    try:  # not error.request where there is a response: huggingface_hub's errors lose theirs
        request = error.response.request if hasattr(error, "response") else error.request
        return request.method, request.url.path
    except (AttributeError, RuntimeError):  # RuntimeError: httpx's error without a request
        return "", ""


def seconds_asked(error: Exception) -> int:
    """How long the server asks to wait: by Retry-After, or by the Hub's RateLimit once no request is left."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    after = headers.get("retry-after", "")
    window = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return int(after) if after.isdigit() else int(window[1]) if window and status_of(error) == 429 else 0


def describe(error: Exception) -> str:
    """What happened, on one line."""
    request, status = " ".join(request_of(error)).strip(), status_of(error)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    text = (getattr(error, "server_message", None) or "") if status else f"{kind}{error}"
    text = " ".join(text.split())[:300].rstrip(".")
    happened = f"{status} {error.response.reason_phrase}".strip() if status else ""
    return ": ".join(filter(None, [f"{happened} ({request})" if happened else request, text]))


def remedy(error: Exception, repo_id: str) -> str:
    """What the user can do about it."""
    status, owner = status_of(error), repo_id.split("/")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE."
    if status == 401:
        reason = "Its token was refused, which may have expired" if secret() else "There is no token on this machine"
        return f"{reason}: log in with `hf auth login` and a token that has write access."
    if status in (402, 403):
        return (
            f"Your token has not enough rights in {owner!r}: log in with `hf auth login` and one that has write "
            "access there, or choose a --repo_id in a namespace of your own."
        )
    if status == 404:
        return f"Check the spelling of {repo_id!r}, and that your token may see {owner!r}."
    if status == 413:
        return "A file is too large for the Hub: save smaller ones, by save_pretrained(folder, max_shard_size='5GB')."
    if status == 429:
        asked = seconds_asked(error)
        return f"Too many requests: wait {asked} s." if asked else "Too many requests: wait a few minutes."
    if status in TRANSIENT:
        return "Somebody else commits to this repository: wait until they are done."
    if isinstance(error, (HTTPError, json.JSONDecodeError)) and (status is None or status >= 500):
        return "The Hub does not answer as it should: look at your network, then at its status page."
    return ""


# --------------------------------------------------------------------------------------------------- while training


class BackgroundPush:
    """Uploads beside a running training: one at a time, never an exception.

    `failures` holds the text of each one that failed; it is also printed. What `submit` is given may be replaced or
    deleted at once: the upload reads hard links of it in a hidden folder beside it.
    """

    def __init__(self):
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.waiting: tuple | None = None
        self.succeeded = True

    def submit(self, folder: str | Path, repo_id: str, **options) -> None:
        """`publish(folder, repo_id, **options)` in a thread, next after one that runs; replaces one that waits."""
        disable_progress_bars()  # they would be drawn over training's own
        try:
            copy = link_tree(Path(folder))
            with self.lock:
                dropped, self.waiting = self.waiting, (copy, Path(folder), repo_id, options)
                if self.thread is None:
                    # A daemon, so that a training that fails ends at once; an upload cut short leaves no trace.
                    thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                    thread.start()
                    self.thread = thread
            if dropped:
                dropped[0].cleanup()
        except Exception as error:  # no upload is worth a training
            self._note(f"{folder} could not be prepared for upload: {describe(error)}")

    def finish(self) -> bool:
        """Wait for what is under way; whether the last upload succeeded (also if there was none)."""
        while (thread := self.thread) is not None:
            thread.join()
        return self.succeeded

    def _work(self) -> None:
        while True:
            with self.lock:
                job, self.waiting = self.waiting, None
                if job is None:
                    self.thread = None
                    return
            copy, folder, repo_id, options = job
            problem = None
            try:
                publish(copy.name, repo_id, **options)
            except BaseException as error:  # no upload is worth a training; a panic in hf_xet is no Exception
                kind = "" if isinstance(error, (ReleaseError, ValueError)) else f"{type(error).__name__}: "
                problem = f"{kind}{error}".replace(copy.name, str(folder))
            shutil.rmtree(copy.name, ignore_errors=True)
            self._note(problem)

    def _note(self, problem: str | None) -> None:
        self.succeeded = problem is None
        if problem:
            self.failures.append(scrub(problem))
            print(f"warning: {self.failures[-1]}", file=sys.stderr)


def link_tree(folder: Path) -> tempfile.TemporaryDirectory:
    """A folder of hard links to the files of `folder`, or copies where the file system has none."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    # In the same place, since links cannot leave a file system and the card looks for run.json one folder up.
    copy = tempfile.TemporaryDirectory(prefix=".push-", dir=folder.resolve().parent, ignore_cleanup_errors=True)
    shutil.copytree(folder, copy.name, copy_function=link, dirs_exist_ok=True)
    return copy


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of a finished model, as runs/train/final.")
    parser.add_argument("--repo_id", required=True, help="Where to: owner/name, as jinv2/minivlm. Made if need be.")
    parser.add_argument("--private", action="store_true", help="Make a new repository a private one.")
    parser.add_argument("--tag", help="Also give the commit this name, as v1.0, to be loaded by revision='v1.0'.")
    parser.add_argument("--message", default=MESSAGE, help=f"First line of the commit. Default: {MESSAGE}.")
    parser.add_argument("--dry_run", action="store_true", help="Write the card, list what would go up, send nothing.")
    args = parser.parse_args(argv)
    try:
        check(args.folder, args.repo_id, args.tag)
        if args.dry_run:
            write_card(args.folder, args.repo_id, read_run(args.folder))
            sizes = {file: (args.folder / file).stat().st_size for file in files_of(args.folder)}
            print("".join(f"{size:>15,}  {file.as_posix()}\n" for file, size in sizes.items()), end="")
            print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {args.repo_id}")
            return
        print(publish(args.folder, args.repo_id, private=args.private, tag=args.tag, message=args.message))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    except ReleaseError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
