"""Packed attention: each row's output and gradients are those that it has alone, whatever the decoder and the pack."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from helpers.models import make_model, make_pixels, make_prompt, same
from minivlm.model.packed_attention import NAME, find_rows, packed_attention, packed_attention_forward

DECODERS = {
    "minivlm_text": {},
    "qwen3": {},
    "llama": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
ROWS = [make_prompt(3, "image", 4), make_prompt(1), make_prompt(9), make_prompt("image", "image", 2)]
COUNTS = [1, 0, 0, 2]  # pictures
PIXELS = make_pixels(3)
POSITIONS = torch.cat([torch.arange(row.shape[1]) for row in ROWS])[None]
PACKED = {"input_ids": torch.cat(ROWS, dim=1), "pixel_values": PIXELS, "position_ids": POSITIONS}


def make(kind: str, attention: str = NAME):
    model = make_model(text={"model_type": kind} | DECODERS[kind])
    model.set_attn_implementation(attention)
    return model


def gradients(model, batches: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits (1, T, vocabulary) of the batches one after another, and the gradients of a loss on them."""
    logits = torch.cat([model(**batch, use_cache=False).logits for batch in batches], dim=1)
    (logits.log_softmax(-1)[..., ::3].sum() / 100).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_rows_have_the_outputs_and_gradients_that_they_have_alone(kind):
    pixels = [part if len(part) else None for part in PIXELS.split(COUNTS)]
    alone = [{"input_ids": row, "pixel_values": part} for row, part in zip(ROWS, pixels, strict=True)]
    wanted, slopes = gradients(make(kind, "sdpa").double(), alone)
    logits, found = gradients(make(kind).double(), [PACKED])
    same(logits, wanted, atol=1e-6)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        same(found[name], slope, atol=1e-6)
    mixed = make(kind)(**PACKED | {"position_ids": torch.arange(POSITIONS.shape[1])[None]}, use_cache=False).logits
    assert (mixed - wanted).abs().max() > 0.01  # without restarts: the test above has something to see


@pytest.mark.parametrize("kind", DECODERS)
def test_the_dense_mask_is_built_only_where_it_is_needed(kind, monkeypatch):
    seen = []
    model = make(kind)
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(**PACKED, use_cache=False)
    assert [mask is None for mask in seen] == ([False, True] if kind == "gemma3_text" else [True, True])


@pytest.mark.parametrize("kind", DECODERS)
def test_padding_and_a_cache_give_what_sdpa_gives(kind):
    ids = torch.cat([make_prompt(2, "image", 4), make_prompt("image", 6)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"input_ids": ids, "attention_mask": mask, "pixel_values": make_pixels(2), "max_new_tokens": 6}
    answers = [make(kind, attention).generate(**options) for attention in (NAME, "sdpa")]
    assert torch.equal(*answers)


def random_inputs(B: int, H: int, T: int, h: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, T, H, h, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def test_rows_of_a_batch_may_be_packed_in_different_ways():
    inputs = random_inputs(2, 3, 9, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 0, 0, 0, 1]])  # a row may begin anywhere
    assert find_rows(positions) == [(0, 0, 3), (0, 3, 9), (1, 0, 5), (1, 5, 6), (1, 6, 7), (1, 7, 9)]
    output, _ = packed_attention(*inputs, positions)
    for b, start, end in find_rows(positions):
        part = [x[b : b + 1, :, start:end] for x in inputs]
        wanted = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True)
        same(output[b : b + 1, :, start:end], wanted, atol=1e-6)
    assert find_rows(torch.arange(9).expand(2, 9)) == [(-1, 0, 9)]


def test_the_operator_is_registered_completely():
    """torch checks schema, fake tensors, autograd and what compiles, in double precision."""
    inputs = random_inputs(1, 2, 6, 8, torch.float64)
    torch.library.opcheck(packed_attention, (*inputs, torch.tensor([[0, 1, 0, 1, 2, 3]])))


def test_another_number_of_rows_compiles_nothing_anew():
    counter = CompileCounter()
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def attend(query, key, value, positions):
        return packed_attention_forward(module, query, key, value, None, position_ids=positions)[0]

    for lengths in ([4, 5], [9], [1, 1, 1, 6, 3], [20, 2], [7, 7, 7]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        attend(*random_inputs(1, 2, sum(lengths), 8), positions)
    assert counter.frame_count == 1


def test_autocast_computes_in_bf16_as_sdpa_does():
    query, key, value = random_inputs(1, 2, 9, 8)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention_forward(module, query, key, value, None, position_ids=torch.arange(9)[None])
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert found.dtype == torch.bfloat16
    same(found.transpose(1, 2), wanted, atol=1e-2)


def test_dropout_is_refused():
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    with pytest.raises(ValueError, match="no dropout. Set attention_dropout to 0, or use 'sdpa'"):
        packed_attention_forward(
            module, *random_inputs(1, 1, 4, 8), None, dropout=0.1, position_ids=torch.arange(4)[None]
        )
