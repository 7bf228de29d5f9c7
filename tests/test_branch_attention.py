"""Rows that share a picture: attention by blocks gives what the dense mask gives, in outputs and gradients."""

from types import SimpleNamespace

import pytest
import torch

from helpers.data import ENCODER, loss_of, row
from helpers.models import make_model, same
from minivlm.data.collators import PaddingCollator
from minivlm.data.encoder import join
from minivlm.data.schemas import minimind_v
from minivlm.model.branch_attention import NAME, branch_attention, branch_attention_forward, find_blocks


def encode(*questions: str, seed=0) -> dict:
    """Join rows about one picture, as `TrainingRows` does."""
    rows = [ENCODER(minimind_v(row(question, f"answer to {question}", seed=seed))) for question in questions]
    return join(rows, ENCODER.processor.image_token_id, [], 0)


SAMPLES = [encode("a", "b " * 9, "c d"), encode("alone", seed=3), encode("e", "f g h i", seed=5)]
BATCH = PaddingCollator(0)(SAMPLES)


def random_inputs(B, H, T, h, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, T, H, h, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def test_blocks_are_read_from_positions():
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 1, 2, 0, 1, 2, 1, 2]])
    blocks, shared = find_blocks(positions)
    assert blocks[:4] == [(0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 9)]
    assert shared == [((0, 4, 9), (0, 0, 2)), ((2, 2, 4), (2, 0, 1)), ((2, 7, 9), (2, 4, 5))]
    assert find_blocks(torch.arange(9).expand(2, 9)) == ([(-1, 0, 9)], [])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_the_dense_mask(dtype, near):
    positions, mask = BATCH["position_ids"], BATCH["attention_mask"].to(dtype)
    inputs = random_inputs(*positions.shape[:1], 3, positions.shape[1], 16, dtype)
    found, _ = branch_attention(*inputs, positions)
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in SAMPLES])
    real = torch.arange(positions.shape[1]) < lengths[:, None]  # what padding attends to does not matter
    same(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real], atol=near)
    up = torch.randn(found.shape, dtype=dtype) * real[:, None, :, None]
    for a, b in zip(torch.autograd.grad(found, inputs, up), torch.autograd.grad(wanted, inputs, up), strict=True):
        assert (a - b).norm() <= near * b.norm()


def test_a_model_has_the_loss_and_gradients_of_the_dense_mask():
    results = []
    for attention in ("eager", NAME):
        model = make_model(text={"vocab_size": 6400})
        model.set_attn_implementation({"text_config": attention})
        loss = loss_of(model, BATCH, 10)
        tensors = {k: v for k, v in BATCH.items() if isinstance(v, torch.Tensor)}
        model(**tensors, labels=BATCH["shift_labels"], use_cache=False).loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (wanted, slopes), (loss, found) = results
    same(loss, wanted, atol=1e-6)
    for name, slope in slopes.items():
        same(found[name], slope, atol=1e-6)


def test_the_operator_is_registered_completely():
    """torch checks schema, fake tensors, autograd and what compiles, in double precision."""
    inputs = random_inputs(1, 2, 7, 8, torch.float64)
    torch.library.opcheck(branch_attention, (*inputs, torch.tensor([[0, 1, 2, 3, 2, 3, 2]])))


def test_dropout_is_refused():
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    with pytest.raises(ValueError, match="no dropout. Set attention_dropout to 0, or use 'sdpa'"):
        branch_attention_forward(
            module, *random_inputs(1, 1, 3, 8), torch.zeros(1, 1, 3, 3), 0.1, position_ids=torch.tensor([[0, 1, 1]])
        )
