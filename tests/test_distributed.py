"""Weights cut into shards give the losses and gradients of one process."""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT


def test_fully_sharded_training_is_that_of_one_process(tmp_path):
    """FSDP 2 as PyTorch has it; Accelerate's own wrapping of it wants a GPU."""
    figures = []
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
        command += [str(ROOT / "tests" / "fsdp_worker.py"), str(tmp_path / f"{world}.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
        figures.append(json.loads((tmp_path / f"{world}.json").read_text()))
    for one, two in zip(*figures):
        assert two == pytest.approx(one, abs=1e-5)
    assert figures[0][0] != figures[0][1]
