"""The model computes what it claims: positions, masks, pictures, parity with the library, gradients."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import (
    AutoModel,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.models import TEXT, VISION, make_config, make_model, make_pixels, make_prompt, same
from modeling_minivlm import MiniVLMTextModel, rotate

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8},
}
IDS = make_prompt(3, "image", 5, "image", "image", 4)  # 24 tokens, pictures at 3:7, 12:16 and 16:20
PIXELS = make_pixels(3)


def logits(model, ids=IDS, pixels=PIXELS, **options):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **options).logits


@pytest.mark.parametrize("hidden, heads, head_dim", [(640, 10, None), (640, 10, 64), (32, 4, 16), (48, 2, 6)])
def test_rope_follows_head_dim(hidden, heads, head_dim):
    """The first training log's decoder took another width than its heads for the rotation."""
    text = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "rope_parameters": ROPES["default"],
    }
    config = make_config(text=text).text_config
    width = head_dim or hidden // heads
    rope = MiniVLMTextModel(config).rotary_emb
    assert config.head_dim == width and rope.inv_freq.shape == (width // 2,)
    same(rope.inv_freq, torch.tensor([10_000.0 ** (-2 * i / width) for i in range(width // 2)]), atol=1e-7)
    assert rope(torch.zeros(1), torch.arange(3)[None])[0].shape == (1, 3, width)


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rope = MiniVLMTextModel(make_config().text_config).rotary_emb
    x, positions = torch.randn(1, 5, 16), torch.tensor([[0, 1, 7, 100, 3]])
    unit = torch.polar(torch.ones(1, 5, 8), positions[..., None] * rope.inv_freq)
    expected = torch.complex(x[..., :8], x[..., 8:]) * unit
    same(rotate(x, *rope(x, positions)), torch.cat((expected.real, expected.imag), dim=-1))


@pytest.mark.parametrize("rope", ["default", "linear", "yarn"])
def test_only_relative_positions_count(rope):
    model = make_model(text={"rope_parameters": ROPES[rope]})
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.ones_like(IDS)  # without it, gaps between positions would separate packed rows
    plain = logits(model, attention_mask=mask)
    same(logits(model, attention_mask=mask, position_ids=positions + 41), plain, atol=1e-4)
    assert (logits(model, attention_mask=mask, position_ids=positions * 2) - plain).abs().max() > 0.1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_same_weights_in_qwen3_give_the_same_logits(rope, bias):
    """With cache (a prefill, a chunk, single tokens) and without, past the length that "dynamic" and YaRN stretch."""
    text = {"rope_parameters": ROPES[rope], "max_position_embeddings": 16, "attention_bias": bias}
    model = make_model(text=text)
    config = {k: v for k, v in model.config.text_config.to_dict().items() if k not in ("model_type", "architectures")}
    qwen = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    qwen.model.load_state_dict(model.model.language_model.state_dict())  # strict: the names are Qwen3's
    ids = make_prompt(24)
    with torch.no_grad():
        expected = qwen(input_ids=ids).logits
        same(logits(model, ids, None, use_cache=False), expected)
        ours = theirs = None
        for start, stop in [(0, 10), (10, 15), *((i, i + 1) for i in range(15, 24))]:
            a = model(input_ids=ids[:, start:stop], past_key_values=ours, use_cache=True)
            b = qwen(input_ids=ids[:, start:stop], past_key_values=theirs, use_cache=True)
            ours, theirs = a.past_key_values, b.past_key_values
            same(a.logits, b.logits)
            if rope != "dynamic":  # its frequencies change with the length, so cached keys differ from fresh ones
                same(a.logits, expected[:, start:stop])


@pytest.mark.parametrize(
    "strategy, layer, tied",
    [("default", -2, True), ("default", -2, False), ("full", -2, True), ("default", -1, True), ("default", 1, True)],
)
def test_whole_model_is_llava(strategy, layer, tied):
    options = dict(vision_feature_select_strategy=strategy, vision_feature_layer=layer, tie_word_embeddings=tied)
    text = {"rope_parameters": ROPES["default"]}  # the two types differ in their default base
    model = make_model(text=text, **options)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=VISION, text_config=TEXT | text | {"model_type": "qwen3"}, image_token_index=12, **options
        )
    ).eval()
    missing, unexpected = llava.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("post_layernorm" in name or "vision_tower" in name and ".layers." in name for name in missing)
    tokens = 5 if strategy == "full" else 4
    ids = make_prompt(3, "image", 5, "image", "image", 4, image_tokens=tokens)
    same(logits(model, ids), logits(llava, ids))


TOWERS = {
    "clip": {},
    "siglip": {"model_type": "siglip_vision_model"},
    "dinov2": {"model_type": "dinov2"},
    "registers": {"model_type": "dinov2_with_registers"},
    "vit": {"model_type": "vit"},
}


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize(
    "options",
    [
        dict(vision_feature_layer=-2, tie_word_embeddings=False),
        dict(vision_feature_layer=-1, projector_layer_norm=True),
        dict(vision_feature_layer=1, projector_type="linear"),
        dict(vision_feature_layer=None, pixel_shuffle_factor=2),
        dict(vision_feature_layer=None, vision_feature_select_strategy="full", projector_layer_norm=True),
    ],
    ids=str,
)
def test_every_parameter_that_nobody_froze_gets_a_gradient(vision, options):
    """A part that gets none learns nothing, as in the first training log, and hangs distributed training."""
    model = make_model(vision=vision, **options).train()
    ids = make_prompt(2, "image", 3, image_tokens=model.config.image_seq_length)
    model(input_ids=ids, pixel_values=make_pixels(1), labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    without = [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    assert not without
    untied = [] if model.config.tie_word_embeddings else ["lm_head."]
    for part in ["vision_tower.", "multi_modal_projector.", "language_model.embed_tokens.", "layers.1.", *untied]:
        assert any(part in name for name in gradients)


def test_gradient_checkpointing_changes_nothing_but_memory():
    model = make_model().train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, pixel_values=PIXELS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.model.language_model.layers[0].gradient_checkpointing
        for actual, wanted in zip(gradients(), expected, strict=True):
            same(actual, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_leaves_out_a_given_cache(reentrant):
    """The backward pass computes each block again: a cache would be written twice."""
    model, cache = make_model().train(), DynamicCache()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=IDS, pixel_values=PIXELS, labels=IDS, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_loss_is_the_mean_over_answer_tokens_or_their_sum_over_a_given_count():
    model, labels = make_model(), IDS.clone()
    labels[:, :20] = -100
    predicted = logits(model)[0, 19:-1]  # position t predicts token t + 1
    total = cross_entropy(predicted, IDS[0, 20:], reduction="sum")
    same(model(input_ids=IDS, pixel_values=PIXELS, labels=labels).loss, total / 4)
    same(model(input_ids=IDS, pixel_values=PIXELS, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7)
    shifted = torch.cat((labels[:, 1:], torch.tensor([[-100]])), dim=1)
    same(model(input_ids=IDS, pixel_values=PIXELS, labels=labels, shift_labels=shifted).loss, total / 4)


def test_a_later_token_or_picture_never_changes_what_comes_before(model):
    plain, ids = logits(model), IDS.clone()
    ids[0, 10] += 1
    changed = logits(model, ids)
    same(changed[:, :10], plain[:, :10])
    assert (changed[:, 10:] - plain[:, 10:]).abs().amax((0, 2)).min() > 1e-3  # each later position sees it
    for i, start in enumerate((3, 12, 16)):
        pixels = PIXELS.clone()
        pixels[i] = make_pixels(1, seed=9)
        changed = logits(model, pixels=pixels)
        same(changed[:, :start], plain[:, :start])
        assert (changed[:, start:] - plain[:, start:]).abs().amax((0, 2)).min() > 1e-3


def test_pictures_stand_at_their_markers_in_reading_order(model):
    """Across a batch, too: row after row, left to right, whatever number of pictures a row has."""
    ids = torch.cat((make_prompt("image", 2, "image", "image"), make_prompt(8, "image", 2), make_prompt(14)))
    pixels = make_pixels(4)
    with torch.no_grad():
        outputs = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
        alone = torch.cat([model.get_image_features(p[None]).pooler_output for p in pixels])
    same(outputs.image_hidden_states, alone)
    embedded = outputs.hidden_states[0]
    for row, start, picture in ((0, 0, 0), (0, 6, 1), (0, 10, 2), (1, 8, 3)):
        same(embedded[row, start : start + 4], alone[picture])
    text = ids != 12
    same(embedded[text], model.get_input_embeddings()(ids)[text])


def test_of_two_adjacent_pictures_both_count_and_so_does_their_order(model):
    ids = make_prompt(2, "image", "image", 3)
    a, b, c = make_pixels(3).split(1)
    answers = [logits(model, ids, torch.cat(pair))[:, -1] for pair in ((a, b), (b, a), (a, c), (c, b))]
    for other in answers[1:]:
        assert (other - answers[0]).abs().max() > 0.01


@pytest.mark.parametrize("layer", [None, -1, -2, 1])
@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
def test_features_are_the_named_hidden_state_of_the_whole_tower(vision, layer):
    model = make_model(vision=vision, vision_feature_layer=layer, vision_feature_select_strategy="full")
    tower = AutoModel.from_config(
        model.config.vision_config
    ).eval()  # with the blocks, norms and heads that we leave out
    assert not tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        outputs = tower(PIXELS, output_hidden_states=True)
        expected = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        actual = model.get_image_features(PIXELS)
        same(actual.last_hidden_state, expected)
        same(actual.pooler_output, model.model.multi_modal_projector(expected))


def test_pixel_shuffle_keeps_neighbours_together():
    """Each image token must see one square of patches: a patch outside of it changes nothing."""
    model = make_model(vision={"image_size": 64}, pixel_shuffle_factor=2)
    projector, patches = model.model.multi_modal_projector, torch.randn(1, 16, 16)
    with torch.no_grad():
        plain = projector(patches)
        for patch in range(16):
            changed = patches.clone()
            changed[0, patch] += 1
            row, column = divmod(patch, 4)
            seen = (projector(changed) - plain).abs().amax((0, 2)) > 1e-6
            assert seen.nonzero().flatten().tolist() == [row // 2 * 2 + column // 2]


@pytest.mark.parametrize(
    "ids, pixels, words",
    [
        (make_prompt("image", 3), make_pixels(2), ["4 image tokens", "8 image features", "2 pictures x 4"]),
        (make_prompt("image", "image", 3), make_pixels(1), ["8 image tokens", "4 image features"]),
        (make_prompt("image", 3)[:, 2:], make_pixels(1), ["2 image tokens", "truncated"]),
        (make_prompt(5), make_pixels(1), ["0 image tokens", "without the processor"]),
    ],
)
def test_tokens_and_features_that_differ_in_number_are_refused(model, ids, pixels, words):
    with pytest.raises(ValueError) as error:
        logits(model, ids, pixels)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_input_ids_and_inputs_embeds_exclude_each_other(model):
    for part in (model, model.model.language_model):
        for given in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 24, 32)}):
            with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
                part(**given)


def test_packed_rows_are_as_alone(model):
    rows = [make_prompt(3, "image", 4), make_prompt(6), make_prompt("image", "image", 2)]
    pixels, counts = make_pixels(3), [1, 0, 2]
    alone = [logits(model, r, p if n else None) for r, p, n in zip(rows, pixels.split(counts), counts, strict=True)]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(r.shape[1]) for r in rows])[None]
    same(logits(model, packed, pixels, position_ids=positions, use_cache=False), torch.cat(alone, dim=1))
    leaking = logits(model, packed, pixels, use_cache=False)  # without restarts: the test above has something to see
    assert (leaking - torch.cat(alone, dim=1)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_rotation_angles_are_computed_in_fp32(dtype):
    """The square of 300 overflows fp16; bf16 has no number between position 300 and 302."""
    text = make_model().to(dtype).model.language_model
    text.rotary_emb.to(torch.float32)  # `.to` casts the buffers, `from_pretrained` does not
    x = torch.linspace(250, 900, 32).to(dtype)
    expected = x.float() / x.float().pow(2).mean().sqrt() * text.norm.weight.float()
    same(text.norm(x).float(), expected, atol=0.02)
    positions = torch.tensor([[300, 301, 4001]])
    angles = positions[..., None] * text.rotary_emb.inv_freq
    same(text.rotary_emb(x, positions)[0].float(), angles.cos().repeat(1, 1, 2), atol=0.01)


def test_half_precision_stays_near_and_finite():
    expected = logits(make_model())
    for dtype in (torch.bfloat16, torch.float16):
        actual = logits(make_model().to(dtype))
        assert actual.dtype == dtype and actual.isfinite().all()
        assert cosine_similarity(actual.float(), expected, dim=-1).min() > 0.99
