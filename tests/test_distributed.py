"""Training on weights in shards: losses and gradients are those of one process."""

import json

import pytest

from helpers.models import ROOT
from helpers.processes import finish


def test_fully_sharded_training_is_that_of_one_process(tmp_path):
    """PyTorch's own FSDP 2: Accelerate's wrapper of it needs a GPU."""
    metrics = []
    for world in (1, 2):
        file = tmp_path / f"{world}.json"
        finish(ROOT / "tests" / "helpers" / "fsdp_worker.py", [file], tmp_path / "out.txt", ranks=world)
        metrics.append(json.loads(file.read_text()))
    for one, two in zip(*metrics):
        assert two == pytest.approx(one, abs=1e-5)
    assert metrics[0][0] != metrics[0][1]
