"""Upload a trained model to the Hugging Face Hub: make the repository, commit all files at once, set a tag.

One commit holds everything, so that the Hub never shows half a model. It also deletes weights on the Hub that
transformers would load instead of the new ones. A failed upload can be repeated: large files that the Hub already has
are not sent again.
"""

import shlex
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from minivlm.cli import UserError
from minivlm.hub.card import read_run, write_card
from minivlm.hub.check import WEIGHTS, check, files_of
from minivlm.hub.retries import describe, remedy, retry
from minivlm.hub.secrets import scrub

MESSAGE = "Upload model"


class ReleaseError(UserError):
    """A model was not uploaded or not tagged; the message states the reason, a remedy, and the command to repeat."""


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
        run: content of run.json for the card. Default: the file in the model's folder or the one above.

    Returns:
        URL of the commit; of the newest one if the Hub already has all of it.

    Raises:
        ValueError: the folder is not ready for the Hub; nothing was sent.
        ReleaseError: the upload failed. The folder is as it was, except for its card.
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
        state = f"{repo_id} is uploaded ({url}) but not tagged {tag}" if url else f"{repo_id} is not uploaded"
        problem = f"{state}: {explain(error, repo_id)}"
    # Raised after the handler: the first error may hold the token, and must not be part of the traceback.
    again = command_line(folder, repo_id, private, tag, message)
    raise ReleaseError(scrub(f"{problem}\nThe model itself is safe in {folder}. To go on later:\n    {again}"))


def preview_upload(folder: str | Path, repo_id: str, tag: str | None = None) -> dict[Path, int]:
    """Check the folder, write its card, and return the size in bytes of each file that would go up. Nothing is sent.

    Raises:
        ValueError: the folder is not ready for the Hub.
    """
    folder = Path(folder)
    check(folder, repo_id, tag)
    write_card(folder, repo_id, read_run(folder))
    return {file: (folder / file).stat().st_size for file in files_of(folder)}


def command_line(folder: Path, repo_id: str, private: bool, tag: str | None, message: str) -> str:
    """Return the command that publishes with these options, quoted for a shell."""
    command = ["minivlm", "publish", str(folder), "--repo_id", repo_id]
    command += (["--private"] if private else []) + (["--tag", tag] if tag else [])
    return shlex.join(command + (["--message", message] if message != MESSAGE else []))


def explain(error: Exception, repo_id: str) -> str:
    """Return what happened and a remedy; huggingface_hub wraps some errors of the Hub in a RuntimeError."""
    wrapped = not isinstance(error, HTTPError) and isinstance(error.__cause__, HTTPError)
    cause = error.__cause__ if wrapped else error
    return f"{describe(cause)}. {remedy(cause, repo_id)}".strip()


def commit_files(api: HfApi, folder: Path, files: list[Path], repo_id: str, message: str) -> CommitInfo:
    """Make one commit of `files` on top of the newest one, and delete weights that are not among them.

    After a commit whose answer was lost, a second call finds no change and returns that commit.
    """
    operations = [CommitOperationAdd(file.as_posix(), str(folder / file)) for file in files]
    ours = {file.as_posix() for file in files}
    stale = [name for name in api.list_repo_files(repo_id) if WEIGHTS.fullmatch(name) and name not in ours]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=message)


def tag_commit(api: HfApi, repo_id: str, tag: str, oid: str) -> None:
    """Name the commit `oid` by `tag`; raise ValueError if the tag names another commit already."""
    api.create_tag(repo_id, tag=tag, revision=oid, exist_ok=True)  # a repeated call may find the tag that it made
    if api.model_info(repo_id, revision=tag).sha != oid:
        raise ValueError(f"the tag {tag} already names another commit. Choose another --tag, or delete that one")
