"""The repository's own card: what it says of data and results is what lies beside it."""

import shutil

import pyarrow.parquet as pq
import pytest
from datasets import get_dataset_config_names, load_dataset
from tiny import ROOT

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
