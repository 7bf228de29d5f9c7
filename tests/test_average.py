"""The average of two models: each weight once, shared ones too, and refusals."""

import pytest
import torch

from helpers.models import make_model, make_processor
from minivlm.model.loading import load_trained, save_model
from tools import average


def save(folder, seed, **options):
    model = make_model(seed=seed, **options)
    save_model(model, make_processor(), folder)
    return model


@pytest.mark.parametrize("tied", (True, False))
def test_each_weight_is_the_average_also_a_shared_one(tied, tmp_path):
    first, second = (save(tmp_path / str(seed), seed, tie_word_embeddings=tied) for seed in (1, 2))
    paths = [str(tmp_path / name) for name in ("1", "2")]
    average.main([*paths, "--share", "0.25", "--out", str(tmp_path / "mean")])
    mean = load_trained(tmp_path / "mean")[0].state_dict()
    for name, value in mean.items():
        wanted = 0.75 * first.state_dict()[name] + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)


def test_what_cannot_be_averaged_is_refused(tmp_path):
    save(tmp_path / "1", 1)
    save(tmp_path / "2", 2, text={"intermediate_size": 48})
    paths = [str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "mean")]
    with pytest.raises(ValueError, match="has another shape in the other model"):
        average.main(paths)
    with pytest.raises(ValueError, match="--share 1.5 must be from 0"):
        average.main([*paths, "--share", "1.5"])
    assert not (tmp_path / "mean").exists()
