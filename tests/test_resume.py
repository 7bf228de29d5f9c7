"""A run that is killed, stopped or out of disk goes on as if nothing had happened, and says what it did."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from helpers.data import row, write
from helpers.models import ROOT
from helpers.processes import Run, finish
from helpers.serving import wait
from helpers.training import TINY, losses, run
from minivlm.training.checkpoints import STOPPED, newest_checkpoint

SCRIPT = ROOT / "train_accelerate.py"
STEPS = 6
KEPT = ("loss", "grad_norm", "row_checksum", "lr")


def command(data, folder, *options):
    """Return the arguments of a run of `STEPS` steps with a checkpoint at every second one."""
    base = ["--data", data, "--output_dir", str(folder), "--batch_size", "4", "--augment", "mild"]
    return [*TINY, *base, "--max_steps", str(STEPS), "--save_every", "2", *options]


# The steps behind the first checkpoint take their time, or a run ends before it is killed.
SLOWED = """
import sys, time
import train_accelerate
take_step = train_accelerate.take_step

def slow(run, *arguments, **options):
    time.sleep(0.5 if run.state.step >= 2 else 0)
    return take_step(run, *arguments, **options)

train_accelerate.take_step = slow
train_accelerate.main(sys.argv[1:])
"""


def start(data, folder, *options, script=SCRIPT, ranks=None, file_size=None):
    return Run(script, command(data, folder, *options), folder.with_suffix(".txt"), ranks, file_size)


def train(data, folder, *options, ranks=None):
    return finish(SCRIPT, command(data, folder, *options), folder.with_suffix(".txt"), ranks)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def wait_for(path, running):
    """Wait for a file; fail if a rank ends before it is there."""
    while not path.exists():
        assert all(process.is_alive() for process in running.processes), running.text
        time.sleep(0.01)


def kill_and_resume(data, folder, ranks, options):
    """Kill -9 the whole run once it has a checkpoint, then run it again."""
    script = folder.with_suffix(".py")
    script.write_text(SLOWED)
    running = start(data, folder, *options, script=script, ranks=ranks)
    wait_for(folder / "checkpoint-0000002" / "COMPLETE", running)
    running.kill()
    assert "continuing from" in train(data, folder, *options, ranks=ranks)
    return log(folder)


MATRIX = [
    pytest.param(ranks, workers, streaming, packing, marks=[] if quick else pytest.mark.slow)
    for ranks, workers, streaming, packing, quick in (
        (None, 0, False, False, False),
        (None, 2, False, True, True),
        (None, 0, True, True, False),
        (None, 2, True, False, False),
        (2, 0, False, True, False),
        (2, 2, False, False, False),
        (2, 0, True, False, False),
        (2, 2, True, True, True),
    )
]


@pytest.mark.parametrize(("ranks", "workers", "streaming", "packing"), MATRIX)
def test_a_killed_run_goes_on_exactly(tmp_path, ranks, workers, streaming, packing):
    rows = [row(question=f"What is {i}?", answer=f"thing {i}", seed=i // 3) for i in range(40)]
    data = write(tmp_path / "rows.parquet", rows)
    options = ["--workers", str(workers), "--streaming", str(streaming)]
    if packing:
        options += ["--packing", "true", "--pack_tokens", "128", "--max_length", "128"]
    train(data, tmp_path / "whole", *options, ranks=ranks)
    whole, resumed = log(tmp_path / "whole"), kill_and_resume(data, tmp_path / "killed", ranks, options)
    assert [entry["step"] for entry in resumed] == list(range(1, STEPS + 1))
    for one, other in zip(whole, resumed):
        assert {key: one[key] for key in KEPT} == {key: other[key] for key in KEPT}
    assert len({entry["row_checksum"] for entry in whole}) == STEPS  # the checksum tells steps apart


def test_a_stopped_run_saves_says_so_and_goes_on(data, tmp_path):
    running = start(data, tmp_path / "run", "--save_every", "1000", "--max_steps", "100000")
    wait_for(tmp_path / "run" / "log.jsonl", running)
    os.kill(running.processes[0].pid, signal.SIGTERM)
    assert running.wait() == [STOPPED] and "stopped by SIGTERM at step" in running.text
    last = log(tmp_path / "run")[-1]["step"]
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{last:07d}"


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data, tmp_path, capsys, monkeypatch):
    """The optimizer's file does not fit the first time; the later checkpoint does."""
    from accelerate import Accelerator

    save, calls = Accelerator.save_state, []

    def full(self, *args, **options):
        calls.append(args)
        path = save(self, *args, **options)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return path

    monkeypatch.setattr(Accelerator, "save_state", full)
    run(data, tmp_path / "run", "--max_steps", "5", "--save_every", "2")
    assert "no checkpoint at step 2" in (out := capsys.readouterr().out) and "No space left on device" in out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000004"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes here")
def test_files_that_cannot_be_written_are_reported(data, tmp_path):
    """The system itself refuses to write more than 100 kB into a file: checkpoints first, then the finished model."""
    running = start(data, tmp_path / "run", file_size=100_000)
    assert running.wait() == [2] and running.text.count("warning: no checkpoint at step") == 2
    assert "The finished model could not be written" in running.text and "Make room" in running.text
    assert not list((tmp_path / "run").glob("checkpoint-*")) and len(log(tmp_path / "run")) == STEPS


def test_ranks_stop_together(data, tmp_path):
    """One rank gets the signal; all of them save and end, and torchrun passes their exit code on."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    options = ["--save_every", "1000", "--max_steps", "100000", "--workers", "0"]
    process = subprocess.Popen(
        [*launch, *command(data, tmp_path / "run", *options)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait(lambda: (tmp_path / "run" / "log.jsonl").exists() or process.poll() is not None)
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert "stopped by a signal to another rank at step" in out and f"exitcode  : {STOPPED}" in out
    assert newest_checkpoint(tmp_path / "run") is not None


def test_too_little_disk_is_said_before_the_first_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"0.00 GiB free, but checkpoints .* take up to .* Make room"):
        run(data, tmp_path / "run", "--max_steps", "2")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_other_options_do_not_go_on_from_a_checkpoint(data, tmp_path):
    run(data, tmp_path / "run", "--max_steps", "3", "--save_every", "2")
    with pytest.raises(ValueError, match=r"seed 0 -> 1. Take them back, or start anew with --resume never"):
        run(data, tmp_path / "run", "--max_steps", "3", "--seed", "1")


def test_the_number_of_ranks_can_change(data, tmp_path):
    options = ("--workers", "0", "--max_steps", "6")
    run(data, tmp_path / "one", "--batch_size", "4", "--augment", "mild", "--max_steps", "6")
    train(data, tmp_path / "changed", *options)  # leaves the checkpoint of step 4
    assert "1 -> 2 process(es)" in train(data, tmp_path / "changed", *options, ranks=2)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert [e["row_checksum"] for e in log(tmp_path / "changed")] == [e["row_checksum"] for e in log(tmp_path / "one")]
