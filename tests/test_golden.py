"""Losses kept in git: the same recipe, seed and code give the same course of training, on every machine.

A difference means that training changed. If that is wanted: `python -m tools.golden --renew`, and say so in
the commit.
"""

import pytest

from tools import golden

HINT = "Training has changed. If that is wanted, renew the losses: python -m tools.golden --renew {name}"


@pytest.mark.parametrize("name", golden.RUNS)
def test_a_run_has_the_losses_that_are_kept(name, tmp_path):
    figures, kept = golden.train(name, tmp_path / name), golden.read(name)
    assert len(kept["loss"]) == golden.STEPS and kept["loss"][-1] < kept["loss"][0] - 1  # it learns
    for key, tolerance in (("lr", 1e-6), ("loss", golden.TOLERANCE)):
        assert figures[key] == pytest.approx(kept[key], abs=tolerance, rel=0), HINT.format(name=name)
