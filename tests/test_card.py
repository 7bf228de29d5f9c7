"""The repository's own card: what it says of data and results is what lies beside it."""

import io
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import get_dataset_config_names, load_dataset
from PIL import Image
from tiny import ROOT

from sources_minivlm import load_rows, minimind_v

FILES = {
    ("default", "train"): ["train", "train_scenes"],
    ("default", "validation"): ["dev"],
    ("default", "test"): ["test"],
    ("compositions", "test"): ["test_compositions"],
    ("demo", "train"): ["demo_train"],
    ("demo", "test"): ["demo_test"],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with what the data library looks at, and a cache of its own."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "data", folder / "data")
    shutil.copy(ROOT / "README.md", folder)
    return folder


def load(folder, config, **options):
    return load_dataset(str(folder), config, cache_dir=str(folder.parent / "cache"), **options)


def test_the_data_library_finds_the_splits_and_mixes_none(repository):
    assert get_dataset_config_names(str(repository)) == ["default", "compositions", "demo"]
    found = {}
    for config in {config for config, _ in FILES}:
        for split, rows in load(repository, config).items():
            found[config, split] = rows.num_rows
    files = {key: [repository / "data" / f"{name}.parquet" for name in names] for key, names in FILES.items()}
    assert found == {key: sum(pq.read_metadata(f).num_rows for f in paths) for key, paths in files.items()}
    assert load_dataset(str(repository), split="test", streaming=True).take(1)  # the default needs no name
    styles = {config: set(load(repository, config, split="test")["style"]) for config in ("default", "demo")}
    assert styles == {"default": {"twemoji"}, "demo": {"twemoji"}}, "the style that no training row shows"


def test_pictures_are_pictures_to_the_data_library_and_bytes_to_everybody_else(repository, monkeypatch):
    """The Hub's viewer draws a column of type Image; MiniMind-V and our own reader take the files as they are."""
    stored = pq.read_table(repository / "data" / "test.parquet")
    assert pa.types.is_binary(stored.schema.field("image_bytes").type)
    picture = load(repository, "default", split="test")[5]["image_bytes"]
    with Image.open(io.BytesIO(stored["image_bytes"][5].as_py())) as expected:
        assert picture.size == (128, 128) and picture.tobytes() == expected.tobytes()
    assert set(load(repository, "demo", split="train").column_names) == set(stored.column_names)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", repository.parent / "cache")
    typed = load_rows([f"hub:{repository}:default:test"])
    assert isinstance(typed[5]["image_bytes"], dict)
    assert typed.adapt(5) == load_rows([str(repository / "data" / "test.parquet")]).adapt(5)


def test_a_typed_placeholder_is_left_out_as_a_raw_one():
    words = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    Image.new("RGB", (8, 8)).save(buffer := io.BytesIO(), "PNG")
    for image in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}):
        assert minimind_v({"conversations": words, "image_bytes": image})["images"] == []
