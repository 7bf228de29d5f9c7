"""Upload a model while training goes on: one upload at a time, and no failure of one stops the training."""

import os
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from minivlm.hub.publish import publish
from minivlm.hub.retries import describe
from minivlm.hub.secrets import scrub


@dataclass
class Upload:
    """An upload that waits: a copy of the model's folder, and what `publish` is called with."""

    copy: tempfile.TemporaryDirectory
    folder: Path  # the folder that was named, for messages
    repo_id: str
    options: dict


class BackgroundPush:
    """Upload models in a thread beside a running training; never raise an exception.

    `failures` holds the text of each upload that failed; it is also printed. The folder given to `submit` may be
    replaced or deleted at once: the upload reads hard links to its files, in a hidden folder beside it.
    """

    def __init__(self):
        self.failures: list[str] = []
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.waiting: Upload | None = None
        self.succeeded = True

    def submit(self, folder: str | Path, repo_id: str, **options) -> None:
        """Call `publish(folder, repo_id, **options)` in the thread after the upload that runs now.

        An upload that waits is replaced by this one.
        """
        disable_progress_bars()  # they would be drawn over training's own
        try:
            upload = Upload(link_tree(Path(folder)), Path(folder), repo_id, options)
            with self.lock:
                dropped, self.waiting = self.waiting, upload
                if self.thread is None:
                    # A daemon, so that a training that fails ends at once; an upload cut short leaves no trace.
                    thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                    thread.start()
                    self.thread = thread
            if dropped:
                dropped.copy.cleanup()
        except Exception as error:  # training goes on, whatever prevents an upload
            self._note(f"{folder} could not be prepared for upload: {describe(error)}")

    def finish(self) -> bool:
        """Wait until no upload runs; return False if the last one failed."""
        while (thread := self.thread) is not None:
            thread.join()
        return self.succeeded

    def _work(self) -> None:
        """Upload waiting models until none is left."""
        while True:
            with self.lock:
                upload, self.waiting = self.waiting, None
                if upload is None:
                    self.thread = None
                    return
            problem = None
            try:
                publish(upload.copy.name, upload.repo_id, **upload.options)
            except BaseException as error:  # training goes on; a panic in hf_xet is no Exception
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                problem = f"{kind}{error}".replace(upload.copy.name, str(upload.folder))
            shutil.rmtree(upload.copy.name, ignore_errors=True)
            self._note(problem)

    def _note(self, problem: str | None) -> None:
        """Record how an upload ended, and print a failure."""
        self.succeeded = problem is None
        if problem:
            self.failures.append(scrub(problem))
            print(f"warning: {self.failures[-1]}", file=sys.stderr)


def link_tree(folder: Path) -> tempfile.TemporaryDirectory:
    """Make a folder of hard links to the files of `folder`, or of copies if the file system has no hard links."""
    # In the same place, since links cannot leave a file system and the card looks for run.json one folder up.
    copy = tempfile.TemporaryDirectory(prefix=".push-", dir=folder.resolve().parent, ignore_cleanup_errors=True)
    shutil.copytree(folder, copy.name, copy_function=link_or_copy, dirs_exist_ok=True)
    return copy


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
