"""The repository's own card: what it says of data and results is what lies beside it."""

import io
import json
import re
import shutil

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import ModelCard
from PIL import Image

from helpers.models import ROOT
from minivlm.data.rows import load_rows
from minivlm.data.schemas import minimind_v
from tools.card import main

FILES = {
    ("default", "train"): ["train"],
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


def test_the_folder_of_the_data_has_the_drawings_as_well(repository):
    folder = repository / "data"
    names = ["default", "compositions", "demo", "drawings", "grounding", "photographs"]
    assert get_dataset_config_names(str(folder)) == names
    drawings = load(folder, "drawings", split="train", streaming=True)
    first = next(iter(drawings))
    assert list(first) == ["image_bytes", "style", "concept", "mono"] and first["style"] == "noto"
    with Image.open(io.BytesIO(first["image_bytes"])) as picture:
        assert (picture.mode, picture.size) == ("RGBA", (96, 96))
    stored = pq.read_metadata(folder / "drawings.parquet")
    assert load(folder, "drawings", split="train").num_rows == stored.num_rows


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
    assert typed.sample(5) == load_rows([str(repository / "data" / "test.parquet")]).sample(5)


def test_a_typed_placeholder_is_left_out_as_a_raw_one():
    words = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    Image.new("RGB", (8, 8)).save(buffer := io.BytesIO(), "PNG")
    for image in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}):
        assert minimind_v({"conversations": words, "image_bytes": image})["images"] == []


ENDINGS = {"exact_match": "", "accuracy": "-likeliest", "f1": "-words"}


def reported() -> dict[str, tuple[float, str]]:
    """Share and evidence of each figure of data/results.json, by what it is of."""
    results = json.loads((ROOT / "data" / "results.json").read_text(encoding="utf-8"))
    found = {"overall": results["overall"]}
    for kind, ending in zip(("tasks", "ranked", "words"), ENDINGS.values()):
        for task, languages in results.get(kind, {}).items():
            found |= {f"{task}-{language}{ending}": cell for language, cell in languages.items()}
    counts = {
        name: f"{c['hits']} of {c['count']}" if "hits" in c else f"mean of {c['count']}" for name, c in found.items()
    }
    return {name: (cell["match"], counts[name]) for name, cell in found.items()}


def test_the_model_index_is_the_results():
    card = ModelCard.load(ROOT / "README.md", ignore_metadata_errors=False)
    assert card.data.datasets == ["jinv2/minivlm"] and card.data.model_name == "minivlm"
    found = {}
    for result in card.data.eval_results:
        where = (result.task_type, result.dataset_type, result.dataset_config, result.dataset_split)
        assert where == ("image-text-to-text", "jinv2/minivlm", "default", "test")
        title, name = result.metric_name.split(" (")[0].split(", ")
        titles = {"exact_match": "Exact match", "accuracy": "Likeliest option", "f1": "Content words"}
        assert title == titles[result.metric_type]
        evidence = result.metric_name.split(" (")[1].split(", ")[0]
        found[name + ENDINGS[result.metric_type]] = (result.metric_value, evidence)
    assert found == reported() and len(found) >= 27, "new results: python -m tools.card"


def test_the_entries_that_the_hub_reads_are_the_results():
    entries = yaml.safe_load((ROOT / ".eval_results" / "minivlm.yaml").read_text(encoding="utf-8"))
    parsed = huggingface_hub.parse_eval_result_entries(entries)
    assert huggingface_hub.eval_result_entries_to_yaml(parsed) == entries, "a key that the library does not know"
    assert {entry.dataset_id for entry in parsed} == {"jinv2/minivlm"}
    found = {entry.task_id: (entry.value, entry.notes.split(": ")[1].split(",")[0]) for entry in parsed}
    assert found == reported()


def test_the_card_is_written_anew_from_new_results(repository):
    before = (repository / "README.md").read_text(encoding="utf-8")
    main(["--root", str(repository)])
    assert (repository / "README.md").read_text(encoding="utf-8") == before, "writing it twice changes nothing"
    path = repository / "data" / "results.json"
    results = path.read_text(encoding="utf-8")
    share = re.escape(str(json.loads(results)["overall"]["match"])) + r"(?!\d)"  # not the beginning of another number
    path.write_text(re.sub(share, "0.9999", results), encoding="utf-8")
    main(["--root", str(repository)])
    after = (repository / "README.md").read_text(encoding="utf-8")
    assert after == re.sub(share, "0.9999", before) != before
    assert "value: 0.9999" in (repository / ".eval_results" / "minivlm.yaml").read_text(encoding="utf-8")
