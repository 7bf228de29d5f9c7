"""Muon: steps of like singular values, as torch's, whatever the shape and whoever else is optimized."""

import copy

import pytest
import torch

from minivlm.training import muon
from minivlm.training.muon import Muon, orthogonalize

SHAPES = (8, 24), (24, 8), (8, 8), (8, 24)


def make_parameters(shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def train(optimizer, parameters, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return parameters


def test_singular_values_become_alike_and_their_vectors_stay():
    matrix = torch.randn(16, 54)
    turned = orthogonalize(matrix[None], torch.float32)[0]
    values = torch.linalg.svdvals(turned)
    assert 0.5 < values.min() and values.max() < 1.5
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ turned @ v.T  # diagonal if the singular vectors are the same
    torch.testing.assert_close(inside, inside.diagonal().diag(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("match_adamw", [True, False])
def test_a_step_is_that_of_torch(match_adamw):
    ours, theirs = make_parameters(), make_parameters()
    train(Muon(ours, lr=0.02, weight_decay=0.1, match_adamw=match_adamw, dtype=torch.bfloat16), ours)
    kind = "match_rms_adamw" if match_adamw else "original"
    train(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=kind), theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bf16 rounds a step of about 0.02


@pytest.mark.parametrize("largest", [1, 8 * 24, 2 * 8 * 24, 1 << 24])
def test_matrices_that_are_computed_together_move_as_alone(largest, monkeypatch):
    alone, together = make_parameters(), make_parameters()
    train(Muon(alone, lr=0.02), alone)
    monkeypatch.setattr(muon, "most", lambda device: largest)
    train(Muon(together, lr=0.02), together)
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_convolution_moves_as_its_matrix():
    [flat] = make_parameters([(16, 54)])
    conv = torch.nn.Parameter(flat.detach().clone().reshape(16, 6, 3, 3))
    for p in (flat, conv):
        p.grad = torch.arange(p.numel(), dtype=torch.float32).cos().reshape(p.shape)
        Muon([p], lr=0.1, match_adamw=False).step()
    torch.testing.assert_close(conv.flatten(1), flat)


def test_a_loaded_state_goes_on_as_if_never_saved():
    whole, cut = make_parameters(), make_parameters()
    train(first := Muon(whole, lr=0.02), whole)
    train(second := Muon(cut, lr=0.02), cut)
    third = Muon(cut, lr=0.02)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for a, b in zip(train(first, whole), train(third, cut)):
        assert torch.equal(a, b)
