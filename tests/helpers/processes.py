"""Run a script in processes of its own, on one rank or several, without waiting for the imports of torch each time.

A server imports them once; each process is forked from it. So a script starts in a tenth of a second, where an import
of torch and transformers takes five. `python train_accelerate.py` itself is started by the tests of publishing and
recipes, torchrun by one of `test_resume.py`.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from helpers.serving import free_port

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_accelerate"])
SECONDS = 300  # that a script may take


def run_script(script: str, arguments: list[str], environment: dict[str, str], output: str, file_size: int | None):
    """Be the process: run `script` as Python would; standard output and errors go to the end of the file `output`."""
    if "train_accelerate" not in sys.modules:
        raise ImportError("the server that forks processes could not import train_accelerate")
    multiprocessing.set_start_method(None, force=True)  # of the workers that load data: the usual one, not this server
    os.setsid()  # a kill reaches the workers that load data, too
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.update(environment)
    torch.set_num_threads(1)  # or sums differ in their last bits
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Run:
    """Hold the processes of a run, one for each rank.

    Args:
        output: file for what all of them print.
        ranks: how many; without it there is one process and no rank, as after `python SCRIPT`.
        file_size: most bytes of a file that they write.

    Attributes:
        processes: of `multiprocessing`, in the order of the ranks.
    """

    def __init__(self, script, arguments, output: Path, ranks: int | None = None, file_size: int | None = None):
        self.output, self.processes = output, []
        output.unlink(missing_ok=True)
        together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(ranks or 1):
            environment = {"ACCELERATE_USE_CPU": "true"}
            if ranks:
                environment |= together | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            given = (str(script), list(map(str, arguments)), environment, str(output), file_size)
            # The server that forks them starts with the first one, and finds these.
            with patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
                self.processes.append(CONTEXT.Process(target=run_script, args=given))
                self.processes[-1].start()

    @property
    def text(self) -> str:
        """Return what all ranks have printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def wait(self) -> list[int]:
        """Return the exit codes of the ranks once all have ended; kill those that take too long."""
        end = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise TimeoutError(f"a rank has not ended after {SECONDS} seconds:\n{self.text}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End all ranks and the processes that they have started, by SIGKILL."""
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def finish(script, arguments, output: Path, ranks: int | None = None) -> str:
    """Run a script to its end and return what it prints; each rank must end without an error."""
    run = Run(script, arguments, output, ranks)
    codes = run.wait()
    assert not any(codes), f"{codes}\n{run.text}"
    return run.text
