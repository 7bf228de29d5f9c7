"""Upload a trained model to the Hugging Face Hub: make the repository, commit all files at once, set a tag.

One commit holds everything, so that the Hub never shows half a model. It also deletes weights on the Hub that
transformers would load instead of the new ones. A failed upload can be repeated: large files that the Hub already has
are not sent again.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from minivlm.cli import UserError
from minivlm.hub.card import read_run, write_card
from minivlm.hub.check import WEIGHTS, check, files_of
from minivlm.hub.retries import describe, remedy, retry
from minivlm.hub.secrets import scrub

MESSAGE = "Upload model"
EXPORTED = re.compile(r".*\.(onnx|onnx\.data|gguf)")  # weights in the formats of other engines


class ReleaseError(UserError):
    """A model was not uploaded or not tagged; the message states the reason, a remedy, and the command to repeat."""


@dataclass(frozen=True)
class Release:
    """Say what one call of `minivlm publish` uploads, and how. `formats`: also the formats of other engines."""

    folder: Path
    repo_id: str
    private: bool = False
    tag: str | None = None
    message: str = MESSAGE
    formats: bool = False

    def command_line(self) -> str:
        """Return the command with these options, quoted for a shell."""
        command = ["minivlm", "publish", str(self.folder), "--repo_id", self.repo_id]
        command += (["--private"] if self.private else []) + (["--tag", self.tag] if self.tag else [])
        command += ["--message", self.message] if self.message != MESSAGE else []
        return shlex.join(command + (["--formats"] if self.formats else []))


def publish(folder: str | Path, repo_id: str, *, run: dict | None = None, **options) -> str:
    """Put the model in `folder` on the Hub: repository (made if need be), one commit, tag.

    Args:
        run: content of run.json for the card. Default: the file in the model's folder or the one above.
        options: the other fields of `Release`.

    Returns:
        URL of the commit; of the newest one if the Hub already has all of it.

    Raises:
        ValueError: the folder is not ready for the Hub; nothing was sent.
        ReleaseError: the upload failed. The folder is as it was, except for its card.
    """
    release = Release(Path(folder), repo_id, **options)
    check(release.folder, repo_id, release.tag)

    def prepare() -> list[Path]:
        write_card(release.folder, repo_id, read_run(release.folder) if run is None else run)
        return files_of(release.folder)

    return upload(release, release.folder, repo_id, prepare, WEIGHTS)


def upload(
    release: Release, folder: Path, repo_id: str, prepare: Callable[[], list[Path]], weights: re.Pattern
) -> str:
    """Make the repository if need be, commit files of `folder` to it, tag the commit, and return its URL.

    Args:
        release: what the user called for, for the options and the command to repeat.
        prepare: returns the files, relative to `folder`.
        weights: names of files that are deleted on the Hub unless they are among the files.

    Raises:
        ReleaseError: as for `publish`.
    """
    url, tag = None, release.tag
    try:
        files, api = prepare(), HfApi()
        # None, not False, so that an organisation whose repositories are private by default gets a private one.
        retry(lambda: api.create_repo(repo_id, private=release.private or None, exist_ok=True))
        commit = retry(lambda: commit_files(api, folder, files, repo_id, release.message, weights))
        url = commit.commit_url
        if tag:
            retry(lambda: tag_commit(api, repo_id, tag, commit.oid))
        return url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        state = f"{repo_id} is uploaded ({url}) but not tagged {tag}" if url else f"{repo_id} is not uploaded"
        problem = f"{state}: {explain(error, repo_id)}"
    # Raised after the handler: the first error may hold the token, and must not be part of the traceback.
    safe = f"The model itself is safe in {release.folder}. To go on later:\n    {release.command_line()}"
    raise ReleaseError(scrub(f"{problem}\n{safe}"))


def preview_upload(folder: str | Path, repo_id: str, tag: str | None = None) -> dict[Path, int]:
    """Check the folder, write its card, and return the size in bytes of each file that would go up. Nothing is sent.

    Raises:
        ValueError: the folder is not ready for the Hub.
    """
    folder = Path(folder)
    check(folder, repo_id, tag)
    write_card(folder, repo_id, read_run(folder))
    return sizes_of(folder)


def sizes_of(folder: Path) -> dict[Path, int]:
    """Return the size in bytes of each file of `folder` that goes up."""
    return {file: (folder / file).stat().st_size for file in files_of(folder)}


def explain(error: Exception, repo_id: str) -> str:
    """Return what happened and a remedy; huggingface_hub wraps some errors of the Hub in a RuntimeError."""
    wrapped = not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError)
    cause = error.__cause__ if wrapped else error
    return f"{describe(cause)}. {remedy(cause, repo_id)}".strip()


def commit_files(
    api: HfApi, folder: Path, files: list[Path], repo_id: str, message: str, weights: re.Pattern
) -> CommitInfo:
    """Make one commit of `files` on top of the newest one, and delete weights that are not among them.

    After a commit whose answer was lost, a second call finds no change and returns that commit.
    """
    operations = [CommitOperationAdd(file.as_posix(), str(folder / file)) for file in files]
    ours = {file.as_posix() for file in files}
    stale = [name for name in api.list_repo_files(repo_id) if weights.fullmatch(name) and name not in ours]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=message)


def tag_commit(api: HfApi, repo_id: str, tag: str, oid: str) -> None:
    """Name the commit `oid` by `tag`; raise ValueError if the tag names another commit already."""
    api.create_tag(repo_id, tag=tag, revision=oid, exist_ok=True)  # a repeated call may find the tag that it made
    if api.model_info(repo_id, revision=tag).sha != oid:
        raise ValueError(f"the tag {tag} already names another commit. Choose another --tag, or delete that one")
