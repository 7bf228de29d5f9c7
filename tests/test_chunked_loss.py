"""LM head and loss of some tokens at a time: the loss and gradients of all at once, in less memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers.processes import finish
from helpers.training import TINY, losses, run
from minivlm.benchmark.memory import peak_bytes
from minivlm.data.encoder import IGNORE
from minivlm.training import chunked_loss
from minivlm.training.chunked_loss import ChunkedLoss

K, D, VOCABULARY = 50, 16, 90


def make_inputs(count=K, vocabulary=VOCABULARY):
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, D, requires_grad=True), torch.randn(vocabulary, D, requires_grad=True)
    labels = torch.randint(0, vocabulary, (count,))
    labels[::7] = IGNORE
    return hidden, weight, labels


def whole(hidden, weight, labels, z):
    logits = (hidden @ weight.T).float()
    loss = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss + z * logits.logsumexp(-1)[labels != IGNORE].square().sum(), loss


@pytest.mark.parametrize("z", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 7, K])
def test_losses_and_gradients_are_those_of_all_tokens_at_once(tokens, z, monkeypatch):
    monkeypatch.setattr(chunked_loss, "LARGEST", tokens * VOCABULARY)
    hidden, weight, labels = make_inputs()
    expected, found = whole(hidden, weight, labels, z), ChunkedLoss.apply(hidden, weight, labels, z)
    torch.testing.assert_close(found, expected)
    assert not found[1].requires_grad
    grads = [torch.autograd.grad(loss[0] / 3, (hidden, weight)) for loss in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_products_are_in_the_type_of_autocast_and_sums_in_fp32():
    hidden, weight, labels = make_inputs()
    expected = torch.autograd.grad(whole(hidden, weight, labels, 0.0)[0], (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ChunkedLoss.apply(hidden, weight, labels, 0.0)
    found = torch.autograd.grad(loss, (hidden, weight))
    assert [grad.dtype for grad in found] == [torch.float32] * 2 and loss.dtype == torch.float32
    for a, b in zip(found, expected):
        assert 0 < (a - b).norm() < 0.02 * b.norm()


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_pass_is_refused():
    hidden, weight, labels = make_inputs()
    loss, _ = ChunkedLoss.apply(hidden, weight.detach(), labels, 0.0)
    loss.backward(retain_graph=True)
    assert hidden.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


def test_logits_are_never_held_whole(monkeypatch):
    """All at once they take at least three times their bytes: logits, probabilities, gradient."""
    hidden, weight, labels = make_inputs(400, 5000)
    monkeypatch.setattr(chunked_loss, "LARGEST", 20 * 5000)
    logits, kept = 400 * 5000 * 4, weight.numel() * 4
    peaks = [
        peak_bytes(lambda loss=loss: torch.autograd.grad(loss(hidden, weight, labels, 0.0)[0], (hidden, weight)))
        for loss in (whole, ChunkedLoss.apply)
    ]
    assert peaks[0] > 2 * logits and peaks[1] < 0.4 * logits + 3 * kept


@pytest.mark.parametrize(
    "options", ["", "--z_loss 0.1", "--packing true --batch_size 1", "--lora r=4,alpha=8,targets=decoder"]
)
def test_training_takes_the_same_course(options, data, tmp_path, monkeypatch):
    found = []
    for largest in (1 << 24, 1000):
        monkeypatch.setattr(chunked_loss, "LARGEST", largest)
        run(data, folder := tmp_path / str(largest), "--max_steps", "4", *options.split())
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[0] != found[1]


SCRIPT = """
import sys
import train_accelerate
from minivlm.training import chunked_loss
chunked_loss.LARGEST = 1000
train_accelerate.main(sys.argv[1:])
"""


def test_two_ranks_take_the_course_of_one_process(data, tmp_path):
    """DDP adds up gradients of the head by hooks, which must hold for one that several chunks have added to."""
    options = ["--max_steps", "3", "--micro_batch_size", "2"]
    run(data, tmp_path / "whole", *options)
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [*TINY, "--data", data, "--output_dir", tmp_path / "two", "--batch_size", "8", *options]
    finish(tmp_path / "script.py", arguments, tmp_path / "out.txt", ranks=2)
    for figure in ("loss", "grad_norm"):
        assert losses(tmp_path / "two", figure) == pytest.approx(losses(tmp_path / "whole", figure), abs=1e-4)
