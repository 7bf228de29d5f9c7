"""Training on weights in shards: losses and gradients are those of one process."""

import json
import os
import subprocess
import sys

import pytest

from helpers.models import ROOT


def test_fully_sharded_training_is_that_of_one_process(tmp_path):
    """PyTorch's own FSDP 2: Accelerate's wrapper of it needs a GPU."""
    metrics = []
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
        command += [str(ROOT / "tests" / "helpers" / "fsdp_worker.py"), str(tmp_path / f"{world}.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
        metrics.append(json.loads((tmp_path / f"{world}.json").read_text()))
    for one, two in zip(*metrics):
        assert two == pytest.approx(one, abs=1e-5)
    assert metrics[0][0] != metrics[0][1]
