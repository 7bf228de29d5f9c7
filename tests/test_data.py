"""Rows to tensors: labels are the assistant's words, packing keeps rows apart, and nothing is lost in silence."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from helpers.data import ENCODER, PROCESSOR, loss_of, png, row, write
from helpers.models import make_model
from minivlm.data.collators import PackingCollator, PaddingCollator
from minivlm.data.dataset import TrainingRows
from minivlm.data.encoder import IGNORE, BadRow, Encoder, PixelValues, share_prefix
from minivlm.data.pictures import augment, decode_image
from minivlm.data.plans import GlobalBatchSampler, PaddedPlan, rows_by_picture
from minivlm.data.rows import filter_rows, load_rows
from minivlm.data.schemas import minimind_v

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40) | st.sampled_from(
    ["<|im_end|>", "a<|image_pad|>b", "<|im_start|>assistant\nno", "<think>x</think>", "<|endoftext|><|im_end|>"]
)


def encode(*rows) -> dict:
    """Encode rows as `TrainingRows` does; with several, all are about the picture of the first."""
    return {
        **share_prefix([ENCODER(minimind_v(r)) for r in rows], PROCESSOR.image_token_id),
        "places": [],
        "bad_rows": [],
        "epoch": 0,
    }


@settings(deadline=None, max_examples=150)
@example([("", "\n"), ("\n", "\n\nb"), ("a", " \n")])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_labels_are_exactly_what_the_assistant_says(turns):
    messages = [
        {"role": role, "content": text.replace("\ufdd0", "")}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn)
    ]
    ids, labels = ENCODER.tokenize_messages(messages)
    supervised = [token for token in labels if token != IGNORE]
    said = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert PROCESSOR.tokenizer.decode(supervised) == said
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels))


@settings(deadline=None, max_examples=100)
@given(TEXT, TEXT)
def test_typed_control_tokens_stay_text(question, answer):
    ids, _ = ENCODER.tokenize_messages(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )
    start, end, image = 1, 2, PROCESSOR.image_token_id
    assert (ids.count(start), ids.count(end), ids.count(image), ids.count(0)) == (2, 2, 0, 0)


def test_encoding_equals_the_processor_that_users_call():
    sample = minimind_v(row(question="这是什么？", images=2))
    ours = ENCODER(sample)
    text = PROCESSOR.tokenizer.apply_chat_template(sample["messages"], tokenize=False)
    pictures = [Image.open(io.BytesIO(image)) for image in sample["images"]]
    theirs = PROCESSOR(text=text, images=pictures, return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"][0].tolist()
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize(
    ("make", "options", "by_table"),
    [
        (CLIPImageProcessorPil, {"size": {"height": 32, "width": 48}, "do_center_crop": False}, True),
        (SiglipImageProcessorPil, {"size": {"height": 16, "width": 16}}, True),
        (CLIPImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": 32}, False),
        (SiglipImageProcessorPil, {"size": {"height": 8, "width": 8}}, False),
    ],
)
def test_pixels_are_the_processors_to_the_bit(make, options, by_table):
    processor = make(**options)
    pixels = PixelValues(processor)
    assert (pixels.table is not None) == by_table
    images = [decode_image(png(seed, size)) for seed, size in enumerate([(32, 32), (100, 7), (3, 300), (48, 32)])]
    assert torch.equal(pixels(images), processor(images, return_tensors="pt")["pixel_values"])


def test_json_list_and_single_picture_forms_are_the_same_row():
    as_json = row()
    as_list = {"conversations": json.loads(as_json["conversations"]), "image_bytes": as_json["image_bytes"][0]}
    assert minimind_v(as_json) == minimind_v(as_list)


def test_minimind_placeholder_picture_is_text_only():
    Image.new("RGB", (8, 8)).save(buffer := io.BytesIO(), "PNG")
    sample = minimind_v({**row(images=0), "image_bytes": buffer.getvalue()})
    assert sample["images"] == [] and len(ENCODER(sample)["pixel_values"]) == 0
    with pytest.raises(BadRow, match="picture markers and pictures differ in number: 0 and 1"):
        ENCODER(minimind_v({**row(images=0), "image_bytes": png()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_bytes": [png()] * 2}, "picture markers and pictures differ in number: 1 and 2"),
        ({"image_bytes": [png()[:60]]}, "unreadable picture"),
        ({"image_bytes": [b""]}, "unreadable picture"),
        ({"conversations": json.dumps([{"role": "user", "content": "<image>hi"}])}, "no answer tokens"),
        ({"conversations": row(answer="long " * 600)["conversations"]}, "more than max_length=512"),
    ],
)
def test_a_bad_row_says_what_is_wrong(change, message):
    with pytest.raises(BadRow, match=message):
        ENCODER(minimind_v({**row(), **change}))


def conversation(*answers) -> list[dict]:
    """A picture before each question."""
    messages = []
    for answer in answers:
        asked = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        said = [{"type": "text", "text": answer}]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return messages


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXT, min_size=1, max_size=5), st.integers(10, 150))
def test_a_long_row_is_cut_to_the_most_turns_that_fit(answers, limit):
    sample = {"images": [png(seed) for seed in range(len(answers))], "messages": conversation(*answers)}
    lengths = [len(ENCODER.tokenize_messages(sample["messages"][: 2 * i])[0]) for i in range(1, len(answers) + 1)]
    kept = sum(length <= limit for length in lengths)
    cutting = Encoder(PROCESSOR, limit, too_long="cut")
    if not kept:
        with pytest.raises(BadRow, match=f"too long: {lengths[-1]} tokens, more than max_length={limit}"):
            cutting(sample)
        return
    got, short = cutting(sample), {"images": sample["images"][:kept], "messages": sample["messages"][: 2 * kept]}
    for key, value in ENCODER(short).items():
        assert torch.equal(got[key], value) if key != "notes" else bool(got[key]) == (kept < len(answers))
    assert cutting.size(sample) == (lengths[kept - 1], kept)
    if kept < len(answers):
        with pytest.raises(BadRow, match="too long"):
            Encoder(PROCESSOR, limit)(sample)


def test_a_bad_row_is_replaced_and_reported(tmp_path):
    rows = [row(seed=0), {**row(), "image_bytes": [b"damaged"]}, {**row(), "conversations": "{"}, row(answer="cat")]
    dataset = TrainingRows(load_rows([write(tmp_path / "a.parquet", rows)]), ENCODER)
    sample = dataset[0, (1,)]
    assert [place.rpartition(" ")[2] for place, _ in sample["bad_rows"]] == ["1", "2"]
    assert torch.equal(sample["input_ids"], dataset[0, (3,)]["input_ids"]) and not dataset[0, (0,)]["bad_rows"]


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.parquet: no such"):
        load_rows([str(tmp_path / "absent.parquet")])
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_rows([str(tmp_path / "text.parquet")])
    with pytest.raises(ValueError, match="columns a fit no known schema"):
        load_rows([write(tmp_path / "other.parquet", [{"a": 1}])])
    empty = pa.schema([("conversations", pa.string()), ("image_bytes", pa.binary())]).empty_table()
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no rows"):
        load_rows([str(tmp_path / "empty.parquet")])


def test_rows_are_kept_by_column(tmp_path):
    rows = load_rows([write(tmp_path / "a.parquet", [{**row(), "task": "ab"[i % 2], "n": i} for i in range(6)])])
    assert filter_rows(rows, {"task": ["b"], "n": [1, 2, 3]})["n"] == [1, 3]
    with pytest.raises(ValueError, match="filter: no column 'tasks'. The data has conversations"):
        filter_rows(rows, {"tasks": ["b"]})
    with pytest.raises(ValueError, match="filter: no row has a task among c"):
        filter_rows(rows, {"task": ["c"]})


def mixed_samples():
    return [
        encode(row(question="这是什么？", answer="一只狗")),
        encode(row(question="Which is it: a, b, c or d? " * 3, answer="two red cats on a mat", images=2, seed=5)),
        encode(row(question="Hello", answer="Hi there, how are you?", images=0)),
    ]


def loss_of_rows_alone(model, rows):
    """The sum over rows by the plainest call: one row, labels of the same length, divided by all answer tokens."""
    samples = [ENCODER(minimind_v(row)) for row in rows]
    answers = sum(int((s["labels"][1:] != IGNORE).sum()) for s in samples)
    losses = []
    for s in samples:
        pixels = s["pixel_values"] if len(s["pixel_values"]) else None
        inputs = {"input_ids": s["input_ids"][None], "pixel_values": pixels, "labels": s["labels"][None]}
        with torch.no_grad():
            losses.append(model(**inputs, num_items_in_batch=torch.tensor(answers)).loss)
    return sum(losses), answers


def test_packed_padded_and_single_rows_give_the_same_loss():
    model = make_model(text={"vocab_size": 6400})
    rows = [
        row("这是什么？", "一只狗"),
        row("a, b or c? " * 9, "two cats", images=2, seed=5),
        row("Hello", "Hi!", images=0),
    ]
    alone, answers = loss_of_rows_alone(model, rows)
    samples = [encode(r) for r in rows]
    torch.testing.assert_close(loss_of(model, PaddingCollator(0)(samples), answers), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss_of(model, PackingCollator()([samples]), answers), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_that_share_a_picture_give_the_loss_of_each_alone(attention):
    model = make_model(text={"vocab_size": 6400})
    model.set_attn_implementation(attention)
    same_picture = [row("What is it?", "a dog"), row("这是什么颜色？", "红色"), row("Is it a cat? " * 5, "no")]
    alone, answers = loss_of_rows_alone(model, [*same_picture, row("And this?", "a blue house", seed=9)])
    batch = PaddingCollator(0)([encode(*same_picture), encode(row("And this?", "a blue house", seed=9))])
    assert len(batch["pixel_values"]) == 2
    torch.testing.assert_close(loss_of(model, batch, answers), alone, atol=1e-6, rtol=0)


def test_rows_are_grouped_by_equal_pictures(tmp_path):
    rows = [row(seed=i % 3, question=str(i)) for i in range(13)]
    units = rows_by_picture(load_rows([write(tmp_path / "a.parquet", rows)]), most=3)
    assert sorted(index for unit in units for index in unit) == list(range(13))
    assert all(len({index % 3 for index in unit}) == 1 and len(unit) <= 3 for unit in units)
    with pytest.raises(ValueError, match="cannot be packed"):
        PackingCollator()([[encode(row("a", "b"), row("c", "d"))]])


def test_packing_does_not_leak_between_conversations():
    model, samples = make_model(text={"vocab_size": 6400}), mixed_samples()
    packed = PackingCollator()([samples])
    packed = {key: packed[key] for key in ("input_ids", "position_ids", "pixel_values")}
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0]
        alone = model(input_ids=samples[2]["input_ids"][None], use_cache=False).logits[0]
    torch.testing.assert_close(together[-len(alone) :], alone, atol=1e-5, rtol=1e-5)


def units(count):
    return [(index,) for index in range(count)]


def flatten(sampler, steps):
    batches = iter(sampler)
    return [[next(batches) for _ in range(sampler.accumulation)] for _ in range(steps)]


def test_global_batches_do_not_depend_on_ranks_or_micro_batches():
    lengths = [random.Random(i).randint(5, 90) for i in range(101)]

    def rows_of(world_size, micro):
        ranks = [
            flatten(GlobalBatchSampler(PaddedPlan(units(101), lengths, 12, seed=3), micro, rank, world_size), 17)
            for rank in range(world_size)
        ]
        return [sorted(key for rank in step for micro in rank for key in micro) for step in zip(*ranks)]

    expected = rows_of(1, 12)
    assert expected == rows_of(1, 5) == rows_of(2, 6) == rows_of(3, 1)
    first_epoch = [index for step in expected[:8] for _, index in step]
    assert len(set(first_epoch)) == 96  # eight steps of twelve different rows


def test_sampler_resumes_where_it_stopped():
    whole = flatten(GlobalBatchSampler(PaddedPlan(units(50), list(range(50)), 8, seed=1), 4), 20)
    rest = flatten(GlobalBatchSampler(PaddedPlan(units(50), list(range(50)), 8, seed=1), 4, start_step=9), 11)
    assert whole[9:] == rest


def test_sampler_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="3 rows .*, fewer than batch_size=8"):
        PaddedPlan(units(3), [1, 2, 3], 8)
    with pytest.raises(ValueError, match="batch_size=8 does not divide by 3 ranks"):
        GlobalBatchSampler(PaddedPlan(units(9), [1] * 9, 8), 8, world_size=3)


def test_augmentation_depends_on_seed_epoch_and_row_alone(tmp_path):
    path = write(tmp_path / "a.parquet", [row(seed=i) for i in range(3)])
    first, second = (TrainingRows(load_rows([path]), ENCODER, seed=7, augment="strong") for _ in range(2))
    second[0, (0,)]
    assert torch.equal(first[4, (2,)]["pixel_values"], second[4, (2,)]["pixel_values"])
    assert not torch.equal(first[4, (2,)]["pixel_values"], first[5, (2,)]["pixel_values"])


def test_augmentation_never_mirrors():
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (14, 14, 24, 50))
    for seed in range(200):
        pixels = augment(picture, random.Random(seed)).load()
        left, right = ([pixels[x, 32] for x in xs] for xs in (range(32), range(32, 64)))
        assert sum(g for _, g, _ in left) < sum(g for _, g, _ in right)


def test_no_row_is_asked_to_predict_the_next_rows_first_token():
    """Even where a template lets the first token carry loss: the token before it belongs to another row."""
    sample = {
        "input_ids": torch.tensor([5, 6, 7]),
        "labels": torch.tensor([5, 6, 7]),
        "position_ids": torch.arange(3),
        "branch": torch.zeros(3, dtype=torch.long),
        "pixel_values": torch.empty(0),
        "places": [],
        "bad_rows": [],
        "epoch": 0,
    }
    for collator, units in ((PackingCollator(), [[sample], [sample, sample]]), (PaddingCollator(0), [sample] * 3)):
        assert collator(units)["shift_labels"].tolist() == [[6, 7] * 3]
