"""Generation and what it stands on: caches, attention implementations, padding, search, compilation, embeddings."""

import io

import pytest
import torch
from torch.nn.functional import log_softmax, pad
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from helpers.models import make_config, make_model, make_pixels, make_prompt, same
from modeling_minivlm import CACHE, MiniVLMTextModel

IDS = make_prompt(3, "image", 5, "image", 2)
PIXELS = make_pixels(2)
NEW = 8


def generate(model, ids=IDS, pixels=PIXELS, **options):
    """The new tokens, greedily unless `options` say otherwise."""
    options = (
        {"max_new_tokens": NEW, "do_sample": False} | ({} if pixels is None else {"pixel_values": pixels}) | options
    )
    return model.generate(input_ids=ids, **options)[:, ids.shape[1] :]


def greedy_by_hand(model, ids=IDS, pixels=PIXELS, steps=NEW):
    """The reference: a full forward pass per token, without any cache."""
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, -steps:]


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation):
    model = make_model()
    model.set_attn_implementation("eager")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling flex attention takes 15 s
        expected = model(input_ids=IDS, pixel_values=PIXELS).logits
        model.set_attn_implementation({"text_config": implementation})
        assert model.model.language_model.config._attn_implementation == implementation
        same(model(input_ids=IDS, pixel_values=PIXELS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_every_cache_gives_the_answer_of_none(cache, implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    assert torch.equal(generate(model, **options), greedy_by_hand(model))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache(backend, model):
    if not (is_optimum_quanto_available if backend == "quanto" else is_hqq_available)():
        pytest.skip(f"{backend} is not installed (pip install {'optimum-quanto' if backend == 'quanto' else backend})")
    options = dict(cache_implementation="quantized", cache_config={"backend": backend, "nbits": 4, "q_group_size": 16})
    qwen = make_model(text={"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    qwen.load_state_dict(model.state_dict())
    answer = generate(model, **options)
    assert torch.equal(answer, generate(qwen, **options))
    assert answer[0, 0] == greedy_by_hand(model)[0, 0]  # before anything was quantized


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_a_conversation_continues_from_its_cache(make_cache, model):
    """The second turn brings another picture; the first turn's is in the cache."""
    cache = make_cache(config=model.config.get_text_config())
    first = generate(model, IDS, PIXELS, past_key_values=cache)
    ids = torch.cat((IDS, first, make_prompt(3, "image", 2)), dim=1)
    third = make_pixels(1, seed=5)
    with torch.no_grad():
        length = int(cache.get_seq_length())  # a static cache counts in a tensor, in place
        continued = model(input_ids=ids[:, length:], pixel_values=third, past_key_values=cache).logits
        full = model(input_ids=ids, pixel_values=torch.cat((PIXELS, third))).logits
    same(continued, full[:, length:])


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("text", [{}, {"model_type": "qwen3"}, {"model_type": "llama"}], ids=str)
def test_the_cache_is_read_and_written_by_the_name_of_this_transformers(name, text):
    """5.24 calls it `cache`: swallowed by `**kwargs`, each step sees one token and the answer is garbage."""
    if name == "cache" and CACHE != name:
        pytest.skip("up to transformers 5.23 `cache` is a keyword of paged attention alone")
    model = make_model(text=text)
    for part in (model, model.model, model.model.language_model):
        ids, pixels = (make_prompt(10), {}) if part is model.model.language_model else (IDS, {"pixel_values": PIXELS})
        with torch.no_grad():
            full = part(input_ids=ids, use_cache=False, **pixels)[0]
            first = part(input_ids=ids[:, :-2], use_cache=True, **pixels)
            assert CACHE in first and first[CACHE].get_seq_length() == ids.shape[1] - 2
            last = part(input_ids=ids[:, -2:], use_cache=True, **{name: first[CACHE]})
        same(last[0], full[:, -2:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_paged_attention_answers_as_a_plain_cache(implementation, model):
    """Continuous batching: two requests in one row, their keys and values in pages."""
    model.set_attn_implementation(implementation)
    prompts = [make_prompt(7), make_prompt(5)]
    expected = [greedy_by_hand(model, ids, None)[0].tolist() for ids in prompts]
    results = model.generate_batch(
        [ids[0].tolist() for ids in prompts],
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=32, num_blocks=8, max_batch_tokens=64),
    )
    assert [results[key].generated_tokens for key in sorted(results)] == expected


def test_a_left_padded_batch_answers_as_each_row_alone(model):
    rows = [make_prompt(5), make_prompt(2, "image", 4), make_prompt(1, "image", "image", 3, "image", 2)]
    pixels = make_pixels(4)
    alone = [(row, p) for row, p in zip(rows, [None, pixels[:1], pixels[1:]], strict=True)]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    answers = generate(model, ids, pixels, attention_mask=mask)
    beams = generate(model, ids, pixels, attention_mask=mask, num_beams=3)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, position_ids=positions).logits
        for i, (row, p) in enumerate(alone):
            same(logits[i, width - row.shape[1] :], model(input_ids=row, pixel_values=p).logits[0])
            assert torch.equal(answers[i : i + 1], greedy_by_hand(model, row, p))
            assert torch.equal(beams[i : i + 1], generate(model, row, p, num_beams=3))
    assert len({tuple(answer) for answer in answers.tolist()}) == 3


def test_sampling_follows_the_seed_and_the_distribution(model):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return generate(model, do_sample=True, top_k=0, **options)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    with torch.no_grad():
        probability = model(input_ids=IDS, pixel_values=PIXELS).logits[0, -1].softmax(-1)
    drawn = sample(2, num_return_sequences=4000, max_new_tokens=1)[:, 0]
    frequency = torch.bincount(drawn, minlength=len(probability)) / len(drawn)
    assert (frequency - probability).abs().max() < 0.04  # five standard deviations of a probability of one half


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 1}, {"num_beams": 3}], ids=str)
def test_each_returned_sequence_sees_its_own_pictures_in_order(model, options):
    """Repeated picture by picture instead of row by row, the second copy of a row would see one picture twice."""
    ids, pixels = torch.cat((IDS, make_prompt(3, "image", 11))), make_pixels(3)
    single = [generate(model, i[None], p, **options) for i, p in zip(ids, pixels.split([2, 1]), strict=True)]
    several = generate(model, ids, pixels, num_return_sequences=3, **options).unflatten(0, (2, 3))
    for i in range(2):
        assert torch.equal(several[i, 0], single[i][0])
        if "top_k" in options:
            assert (several[i] == single[i]).all()
        else:
            assert len({tuple(sequence) for sequence in several[i].tolist()}) == 3


def test_beam_search_over_the_whole_vocabulary_finds_the_best_pair(model):
    vocabulary = model.config.text_config.vocab_size
    best = generate(model, num_beams=vocabulary, max_new_tokens=2, suppress_tokens=[12])
    tokens = torch.arange(vocabulary)[:, None]
    with torch.no_grad():
        outputs = model(input_ids=IDS, pixel_values=PIXELS)
        outputs.past_key_values.batch_repeat_interleave(vocabulary)
        last = model(input_ids=tokens, past_key_values=outputs.past_key_values).logits[:, -1]
        pairs = log_softmax(outputs.logits[0, -1], -1)[:, None] + log_softmax(last, -1)
        pairs[12] = pairs[:, 12] = -torch.inf  # the image token is nothing to say
    assert divmod(pairs.argmax().item(), vocabulary) == tuple(best[0].tolist())


@pytest.mark.parametrize("kind", ["assistant", "same assistant", "prompt lookup"])
def test_speculation_changes_the_speed_not_the_answer(kind, model):
    if kind == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        options = {"assistant_model": make_model(seed=0 if kind == "same assistant" else 1)}
    assert torch.equal(generate(model, max_new_tokens=24, **options), greedy_by_hand(model, steps=24))


def test_generation_from_embeddings(model):
    embeds = model.get_input_embeddings()(IDS)
    options = dict(max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=PIXELS, **options), greedy_by_hand(model))
    several = model.generate(inputs_embeds=embeds, pixel_values=PIXELS, num_beams=3, **options)
    assert torch.equal(several, generate(model, num_beams=3))


def test_embeddings_as_input_are_the_ids_as_input(model):
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=PIXELS).logits
        embeds = model.get_input_embeddings()(IDS)
        same(model(inputs_embeds=embeds, pixel_values=PIXELS).logits, expected)
        merged = model(input_ids=IDS, pixel_values=PIXELS, output_hidden_states=True).hidden_states[0]
        same(model(inputs_embeds=merged).logits, expected)


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 7, 13]), IDS != 12], ids=["1", "5", "indices", "mask"])
def test_logits_to_keep(keep, model):
    with torch.no_grad():
        full = model(input_ids=IDS, pixel_values=PIXELS).logits
        kept = model(input_ids=IDS, pixel_values=PIXELS, logits_to_keep=keep).logits
    assert kept.shape[1] < full.shape[1]
    if isinstance(keep, int):
        same(kept, full[:, -keep:])
    else:
        same(kept, full[keep][None] if keep.ndim == 2 else full[:, keep])


def test_hidden_states_and_attentions(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(input_ids=IDS, pixel_values=PIXELS, output_hidden_states=True, output_attentions=True)
        plain = model(input_ids=IDS, pixel_values=PIXELS)
        last = model.model(input_ids=IDS, pixel_values=PIXELS).last_hidden_state
    assert plain.hidden_states is None and plain.attentions is None
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    same(outputs.hidden_states[-1], last)
    same(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    for weights in outputs.attentions:  # (B, Hq, T, T), causal, each row a distribution
        same(weights.sum(-1), torch.ones(1, 4, IDS.shape[1]))
        assert torch.equal(weights > 0, torch.ones_like(weights).tril() > 0)


def test_a_tuple_holds_what_the_dict_holds(model):
    with torch.no_grad():
        outputs = model(input_ids=IDS, pixel_values=PIXELS, labels=IDS)
        values = model(input_ids=IDS, pixel_values=PIXELS, labels=IDS, return_dict=False)
    same(values[0], outputs.loss)
    same(values[1], outputs.logits)


@pytest.mark.parametrize(
    "word, near",
    [("pixel_value", "pixel_values"), ("label", "labels"), ("attn_mask", "attention_mask"), ("colour", None)],
)
@pytest.mark.parametrize("text", [{}, {"model_type": "qwen3"}], ids=str)
def test_a_keyword_that_nobody_takes_is_refused(word, near, text):
    model = make_model(text=text)
    hint = rf"\. Did you mean '{near}'\?$" if near else r"\.$"
    with pytest.raises(TypeError, match=f"^MiniVLMForConditionalGeneration takes no keyword '{word}'{hint}"):
        model(input_ids=IDS, **{word: 1})
    with pytest.raises(TypeError, match=f"^MiniVLMModel takes no keyword '{word}'"):
        model.model(input_ids=IDS, **{word: 1})
    if not text:
        with pytest.raises(TypeError, match=f"^MiniVLMTextModel takes no keyword '{word}'"):
            model.model.language_model(input_ids=IDS, **{word: 1})


def test_keywords_of_the_attention_function_reach_it(model):
    """Those that transformers shares, those of the function itself, and all of an engine's own function."""
    seen = {}

    def engine(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.update(kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, is_causal=True)

    shared = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3, "num_items_in_batch": 4, "shift_labels": None}
    for implementation, own in (("engine", {"attention_instances": {0: "layer"}}), ("sdpa", {"position_bias": None})):
        ALL_ATTENTION_FUNCTIONS.register(implementation, engine)
        try:
            model.set_attn_implementation(implementation)
            model(input_ids=IDS, pixel_values=PIXELS, output_attentions=False, **shared, **own)
        finally:
            ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)
        assert {*shared, *own} <= seen.keys() and all(seen[name] is value for name, value in (shared | own).items())
        seen.clear()


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_forward_pass_compiles_into_one_graph(model, use_cache):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=32)} if use_cache else {}
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=PIXELS, use_cache=False).logits
        same(compiled(input_ids=IDS, pixel_values=PIXELS, use_cache=use_cache, **cache).logits, expected)


def test_export_round_trip(model):
    inputs = {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        other = inputs | {"pixel_values": make_pixels(2, seed=3), "input_ids": IDS.roll(1, -1)}
        same(torch.export.load(file).module()(**other).logits, model(**other).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_old_logits_and_tying(tied):
    model = make_model(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=PIXELS).logits
        model.resize_token_embeddings(140, mean_resizing=False)
        resized = model(input_ids=IDS, pixel_values=PIXELS).logits
    assert resized.shape[-1] == model.config.text_config.vocab_size == 140
    same(resized[..., :128], expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model(input_ids=IDS + 0, pixel_values=PIXELS, labels=IDS).loss.isfinite()


def test_embeddings_can_be_read_and_replaced(model):
    table = torch.nn.Embedding(128, 32)
    for part in (model, model.model, model.model.language_model):
        assert part.get_input_embeddings() is model.model.language_model.embed_tokens
    model.set_input_embeddings(table)
    assert model.model.language_model.embed_tokens is table
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen3"},
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"model_type": "llama"},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ],
    ids=lambda text: text["model_type"],
)
@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model", "dinov2", "vit"])
def test_foreign_decoders_and_towers_generate(text, vision):
    model = make_model(vision={"model_type": vision}, text=text, tie_word_embeddings=True)
    assert not isinstance(model.model.language_model, MiniVLMTextModel)
    answer = generate(model, eos_token_id=None)
    assert torch.equal(answer, greedy_by_hand(model))
    assert not torch.equal(answer, generate(model, pixels=make_pixels(2, seed=8), eos_token_id=None))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_text_alone_needs_no_pictures(config):
    model = make_model(config)
    ids = make_prompt(7)
    assert torch.equal(generate(model, ids, None), greedy_by_hand(model, ids, None))
    assert make_config().image_token_id not in ids
