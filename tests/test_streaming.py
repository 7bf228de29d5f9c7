"""Streamed data: every schema trains; a batch depends on seed and step alone, not on ranks, workers or restarts."""

import json
import random
from itertools import islice

import pytest
from torch.utils.data import DataLoader

import train_accelerate
from helpers.data import ENCODER, row, write
from helpers.models import ROOT
from helpers.pictures import noise, resident, saved
from helpers.processes import finish
from helpers.sources import each_schema, make_cauldron, make_llava, make_trl, make_webdataset, run
from helpers.training import TINY, losses
from minivlm.data.collators import PackingCollator, PaddingCollator
from minivlm.data.options import DataArgs
from minivlm.data.rows import load_rows, load_streams
from minivlm.data.streaming import StreamedBatches

STREAMING = ("--streaming", "true", "--max_steps", "2")


@each_schema
def test_a_stream_has_the_samples_of_the_rows(make, tmp_path):
    source, _ = make(tmp_path)
    rows = load_rows([source])
    streamed = [stream.sample(row) for stream in load_streams([source]) for row in stream.read()]
    assert streamed == [rows.sample(i) for i in range(len(rows))]


@each_schema
def test_each_schema_trains_as_a_stream(make, tmp_path):
    source, _ = make(tmp_path)
    run(tmp_path / "run", "--data", source, "--batch_size", "1", *STREAMING)
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(losses(tmp_path / "run")) == 2 and report["bad_rows"] == {}


@pytest.fixture
def sources(tmp_path):
    rows = [row(f"{i}? " * (i % 7 + 1), "answer " * (i % 5 + 1), images=i % 3, seed=i) for i in range(23)]
    rows[5] = {**row("q", "a"), "image_bytes": [b"damaged"]}
    rows[6]["conversations"] = "{"
    return [write(tmp_path / "a.parquet", rows), make_llava(tmp_path)[0], make_webdataset(tmp_path)[0]]


def of(size, **options) -> DataArgs:
    """Options of batches of so many rows, which one rank takes at once."""
    return DataArgs(batch_size=size, micro_batch_size=size, **options)


def batches(sources, count, packed=False, workers=0, **options):
    """`count` global batches of four, joined over the ranks: (epoch, tokens, pixels) of each."""
    world_size, start_step = options.pop("world_size", 1), options.pop("start_step", 0)
    args = DataArgs(
        batch_size=4, micro_batch_size=1, seed=3, packing=packed, pack_tokens=300, pack_pictures=5, **options
    )
    collate = PackingCollator(ENCODER.blank()) if packed else PaddingCollator(0, ENCODER.blank())
    ranks = []
    for rank in range(world_size):
        stream = StreamedBatches(load_streams(sources), ENCODER, collate, args, rank, world_size, start_step)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        ranks.append(list(islice(loader, count * stream.accumulation)))
    joined = []
    for step in range(count):
        parts = [part for rank in ranks for part in rank[step * len(rank) // count : (step + 1) * len(rank) // count]]
        joined.append(sorted((b["epoch"], b["input_ids"].tolist(), b["pixel_values"].sum().item()) for b in parts))
    return joined, [bad for rank in ranks for batch in rank for bad in batch["bad_rows"]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_depends_on_seed_and_step_alone(sources, packed):
    whole, bad = batches(sources, 12, packed)
    assert whole == batches(sources, 12, packed, world_size=2)[0] == batches(sources, 12, packed, world_size=4)[0]
    assert whole == batches(sources, 12, packed, workers=2)[0]
    assert (
        whole[5:]
        == batches(sources, 7, packed, start_step=5)[0]
        == batches(sources, 7, packed, workers=3, start_step=5)[0]
    )
    assert {epoch for step in whole for epoch, _, _ in step} >= {0, 1}
    reasons = {reason.split(":")[0] for _, reason in bad}
    assert reasons == {"unreadable picture", "not in the form of minimind_v"}


def test_every_row_comes_once_an_epoch_and_every_bad_one_is_reported_once(sources):
    stream = StreamedBatches(load_streams(sources), ENCODER, list, of(4))
    first, bad = [], []
    for batch in stream.batches():
        items = [item for unit in batch for item in unit]
        first += [item.place for item in items if item.epoch == 0]
        bad += [place for item in items for place, _ in item.bad_rows if item.epoch == 0]
        if any(item.epoch == 2 for item in items):
            break
    rows = load_rows(sources)
    assert sorted(first + bad) == sorted(rows.where(i) for i in range(len(rows)))
    assert bad == [f"{sources[0]}, row 6"]  # the damaged picture is met when it is decoded


def test_bad_rows_behind_the_last_good_one_are_reported_too(tmp_path):
    rows = [row(f"{i}?", "answer") for i in range(3)] + [{**row("q", "a"), "conversations": "{"}] * 3
    streams = load_streams([write(tmp_path / "a.parquet", rows)])
    items = list(islice(StreamedBatches(streams, ENCODER, list, of(1)).items(), 30))  # ten epochs
    assert 27 <= sum(len(item.bad_rows) for item in items) <= 30  # those at the end of the tenth come later


def test_a_mix_says_how_often_a_source_is_drawn(tmp_path):
    paths = [write(tmp_path / f"{name}.parquet", [row(seed=i) for i in range(200)]) for name in "ab"]
    stream = StreamedBatches(load_streams(paths), ENCODER, list, of(4, mix=[3.0, 1.0]))
    drawn = [source.name == paths[0] for source, _, _ in islice(stream.mixed(0), 200)]
    assert 0.68 < sum(drawn) / 200 < 0.82
    assert len(list(stream.mixed(0))) == 400  # and none is left out


def test_a_filter_chooses_rows_of_a_stream_and_none_left_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", [row(seed=i) | {"task": "ab"[i % 2]} for i in range(8)])
    kept = StreamedBatches(load_streams([path]), ENCODER, list, of(2, filter={"task": ["a"]}))
    assert {item.place.rpartition(" ")[2] for [item] in next(kept.batches())} <= {"0", "2", "4", "6"}
    with pytest.raises(ValueError, match="a.parquet: a whole epoch without a row to train on"):
        next(StreamedBatches(load_streams([path]), ENCODER, list, of(2, filter={"task": ["c"]})).batches())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--streaming", "true"], "Give --max_steps or --max_minutes"),
        ([*STREAMING, "--share_pictures", "2"], "does not go with --share_pictures"),
        (["--mix", "1", "2"], "give a positive number for each of 1 --data sources"),
        (
            [*STREAMING, "--data", "a", "b", "--mix", "1", "0"],
            "give a positive number for each of 2 --data sources",
        ),
    ],
)
def test_options_that_exclude_streaming_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        train_accelerate.parse_args(options)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_memory_stays_flat_over_three_epochs(tmp_path):
    rng = random.Random(0)
    rows = [{**row(f"{i}?", "answer"), "image_bytes": saved(noise(rng, (96, 96)), "PNG")} for i in range(4000)]
    source, rows = write(tmp_path / "a.parquet", rows), None
    order = StreamedBatches(load_streams([source]), ENCODER, PaddingCollator(0), of(16))
    held = []
    for batch in order:
        if batch["epoch"] > len(held):
            held.append(resident() / 2**20)
        if batch["epoch"] == 3:
            break
    print("MiB after each epoch:", *map(round, held))
    assert held[2] - held[0] < 30


def test_a_stream_that_cannot_be_read_is_refused_before_the_model_is_built(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="a.parquet: not a readable parquet file"):
        load_streams([str(tmp_path / "a.parquet")])
    unknown = write(tmp_path / "b.parquet", [{"a": 1}])
    with pytest.raises(ValueError, match="columns a fit no known schema"):
        load_streams([unknown])


def test_a_resumed_stream_is_the_uninterrupted_one(sources, tmp_path):
    options = ("--data", *sources, "--streaming", "true", "--max_steps", "6", "--batch_size", "4", "--save_every", "3")
    run(tmp_path / "run", *options, "--max_bad_rows", "1")
    whole = losses(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    run(tmp_path / "run", *options, "--max_bad_rows", "1", "--workers", "2")
    assert losses(tmp_path / "run") == whole[3:]


@pytest.mark.parametrize(
    "mode",
    [
        STREAMING,
        ("--max_steps", "2", "--packing", "true", "--pack_tokens", "80", "--max_length", "80"),
    ],
)
def test_two_ranks_train_on_a_mix_of_schemas_with_text_alone(mode, tmp_path):
    """Without hanging where one rank's rows have no picture, and with the losses of one process."""
    data = [make(tmp_path)[0] for make in (make_llava, make_cauldron, make_trl, make_webdataset)]
    options = [*TINY, "--data", *data, *mode, "--batch_size", "2", "--micro_batch_size", "1"]
    arguments = [*options, "--output_dir", str(tmp_path / "two")]
    finish(ROOT / "train_accelerate.py", arguments, tmp_path / "out.txt", ranks=2)
    run(tmp_path / "one", *options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
