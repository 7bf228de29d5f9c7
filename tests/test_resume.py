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
from helpers.training import TINY, losses, run
from minivlm.training.checkpoints import STOPPED, newest_checkpoint

STEPS = 6
KEPT = ("loss", "grad_norm", "row_checksum", "lr")


def command(data, folder, ranks, *options):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    base = ["--data", data, "--output_dir", str(folder), "--batch_size", "4", "--augment", "mild"]
    base += ["--max_steps", str(STEPS), "--save_every", "2"]
    return [*launch, str(ROOT / "train_accelerate.py"), *TINY, *base, *options]


def environment():
    """One thread in every process, or sums differ in their last bits; where MKL is told a number, torch obeys that."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return os.environ | threads | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def kill_and_resume(data, folder, ranks, options):
    """Kill -9 the whole run once it has a checkpoint, then run it again."""
    process = subprocess.Popen(
        command(data, folder, ranks, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for(folder / "checkpoint-0000002" / "COMPLETE", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out = subprocess.run(
        command(data, folder, ranks, *options), env=environment(), check=True, capture_output=True, text=True
    ).stdout
    assert "continuing from" in out
    return log(folder)


MATRIX = [
    pytest.param(ranks, workers, streaming, packing, marks=[] if quick else pytest.mark.slow)
    for ranks, workers, streaming, packing, quick in (
        (1, 0, False, False, False),
        (1, 2, False, True, True),
        (1, 0, True, True, False),
        (1, 2, True, False, False),
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
    subprocess.run(
        command(data, tmp_path / "whole", ranks, *options), env=environment(), check=True, capture_output=True
    )
    whole, resumed = log(tmp_path / "whole"), kill_and_resume(data, tmp_path / "killed", ranks, options)
    assert [entry["step"] for entry in resumed] == list(range(1, STEPS + 1))
    for one, other in zip(whole, resumed):
        assert {key: one[key] for key in KEPT} == {key: other[key] for key in KEPT}
    assert len({entry["row_checksum"] for entry in whole}) == STEPS  # the checksum tells steps apart


def test_a_stopped_run_saves_says_so_and_goes_on(data, tmp_path):
    process = subprocess.Popen(
        command(data, tmp_path / "run", 1, "--save_every", "1000", "--max_steps", "100000"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "run" / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "stopped by SIGTERM at step" in out
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
    import resource

    process = subprocess.run(
        command(data, tmp_path / "run", 1),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert process.stdout.count("warning: no checkpoint at step") == 2 and process.returncode == 2
    assert "The finished model could not be written" in process.stderr and "Make room" in process.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*")) and len(log(tmp_path / "run")) == STEPS


def test_ranks_stop_together(data, tmp_path):
    """One rank gets the signal; all of them save and end."""
    process = subprocess.Popen(
        command(data, tmp_path / "run", 2, "--save_every", "1000", "--max_steps", "100000", "--workers", "0"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "run" / "log.jsonl", process)
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
    first = command(data, tmp_path / "changed", 1, *options)
    subprocess.run(first, env=environment(), check=True, capture_output=True)  # leaves the checkpoint of step 4
    second = subprocess.run(
        command(data, tmp_path / "changed", 2, *options), env=environment(), check=True, capture_output=True, text=True
    )
    assert "1 -> 2 process(es)" in second.stdout
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert [e["row_checksum"] for e in log(tmp_path / "changed")] == [e["row_checksum"] for e in log(tmp_path / "one")]
