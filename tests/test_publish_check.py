"""`minivlm publish --check`: each defect is named by the check that looks for it, and nothing is changed."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.data import row, write
from helpers.models import ROOT
from helpers.release import REPO, RUN, TOKEN, digests
from minivlm.commands import publish
from minivlm.commands.publish import main
from minivlm.data.rows import load_rows
from minivlm.evaluation.remeasure import find_record, remeasure
from minivlm.evaluation.scoring import evaluate
from minivlm.hub import findings
from minivlm.hub.findings import Finding, inspect_files, load_by_stranger, stage
from minivlm.model.loading import load_trained

ANSWERS = ["dog", "cat", "a red bus"]


@pytest.fixture
def staged(out, tmp_path):
    """Return what would go up of the finished run, with the licences of this repository."""
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, out / "final")
    return stage(out / "final", tmp_path / "staged", REPO)


def states(folder, ours=True):
    return {found.name: found.state for found in inspect_files(folder, ours)}


def test_a_finished_run_has_no_finding(staged):
    assert set(states(staged).values()) == {"right"}
    found = load_by_stranger(staged)
    assert found.state == "right" and "empty cache" in found.text, found


def append(name, text):
    def change(folder):
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write(text)

    return change


def renamed_pickle(folder):
    torch.save({"a": torch.zeros(2)}, folder / "notes.txt")


def old_pickle(folder):
    (folder / "notes.txt").write_bytes(b"\x80\x04}.")


def replace(name, old, new):
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).unlink()  # a hard link to the file of the run
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def home(folder):
    return f"/{'home'}/somebody/{folder}"  # in parts, or the test for such paths finds this file


def hidden(folder):
    """A checkout publishes its hidden files as well."""
    (folder / ".github").mkdir()
    (folder / ".github/notes.txt").write_text(home("pictures"))


DEFECTS = {
    "files: notes.txt is a pickle": renamed_pickle,
    "files: notes.txt is a pickle ": old_pickle,
    "files: processing_minivlm.py is missing": lambda folder: (folder / "processing_minivlm.py").unlink(),
    "secrets: README.md holds a token": append("README.md", f"\n{TOKEN}"),
    "secrets: .github/notes.txt holds the path": hidden,
    "secrets: notes.txt holds the path": lambda folder: (folder / "notes.txt").write_text(home("pictures")),
    "secrets: config.json holds the path": replace("config.json", "clip_vision_model", home("x/")),
    "files: config.json is not JSON": append("config.json", "}"),
    "card: no license": replace("README.md", "license: apache-2.0\n", ""),
    "card: pipeline_tag is": replace("README.md", "pipeline_tag: image-text-to-text", "pipeline_tag: text-generation"),
    "card: README.md links to plot.png": append("README.md", "\n![A plot](plot.png)\n"),
    "card: README.md: ": replace("README.md", "model-index:\n- name:", "model-index:\n- nom:"),
    "licences: LICENSE missing": lambda folder: (folder / "LICENSE").unlink(),
    "licences: the card says license: mit": replace("README.md", "license: apache-2.0", "license: mit"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_named_by_one_check(defect, staged):
    before = states(staged)
    DEFECTS[defect](staged)
    name, text = defect.strip().split(": ", 1)
    found = {f.name: f for f in inspect_files(staged, ours=True)}
    assert found[name].state == "wrong" and text in found[name].text, found[name]
    changed = {key for key, f in found.items() if f.state != before[key]}
    assert changed - {"licences"} <= {name}, "a check was wrong about what another one looks for"
    assert TOKEN not in str(found["secrets"]), "the finding itself tells the token"


@pytest.mark.parametrize(
    ("limit", "check"), [("MOST_PARAMETERS", "weights"), ("MOST_OF_WEIGHTS", "weights"), ("MOST_OF_A_FILE", "size")]
)
def test_sizes_are_rules_for_our_release_and_notes_for_others(limit, check, staged, monkeypatch):
    monkeypatch.setattr(findings, limit, 1000)
    assert states(staged)[check] == "wrong" and states(staged, ours=False)[check] == "note"


def test_a_zip_file_without_a_pickle_is_no_pickle(staged):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("picture.txt", "none")
    (staged / "pictures.zip").write_bytes(buffer.getvalue())
    assert states(staged)["files"] == "right"


def test_weights_that_the_saved_code_does_not_take_are_wrong(staged):
    weights = load_file(staged / "model.safetensors")
    (staged / "model.safetensors").unlink()
    save_file(weights | {"model.extra": torch.zeros(3)}, staged / "model.safetensors", metadata={"format": "pt"})
    found = load_by_stranger(staged)
    assert found.state == "wrong" and "do not fit: model.extra" in found.text


@pytest.fixture
def measured(out, tmp_path):
    """Return a run whose run.json records what its model answers to twelve rows."""
    rows = [row(f"What is {i}?", ANSWERS[i % 3], seed=i) | {"task": "name", "language": "en"} for i in range(12)]
    data = write(tmp_path / "rows.parquet", rows)
    metrics = evaluate(*load_trained(out / "final"), load_rows([data]))
    metrics.pop("answers")
    run = RUN | {"options": RUN["options"] | {"eval_data": [data], "eval_limit": 12}, "metrics": metrics}
    (out / "run.json").write_text(json.dumps(run))
    return out


def test_metrics_are_measured_again(measured):
    before = digests(measured)
    assert remeasure(measured / "final", 256, ours=True).state == "right"
    assert remeasure(measured / "final", 4, ours=True).state == "right", "12 rows are recorded, four are measured"
    run = json.loads((measured / "run.json").read_text())
    for cell in (run["metrics"]["overall"], run["metrics"]["tasks"]["name"]["en"]):
        cell |= {"hits": 11, "match": 0.9167}
    (measured / "run.json").write_text(json.dumps(run))
    for rows in (4, 256):
        found = remeasure(measured / "final", rows, ours=True)
        assert found.state == "wrong" and "recorded" in found.text, found
    run["options"]["eval_data"] = ["hub:someone/pictures"]
    (measured / "run.json").write_text(json.dumps(run))
    assert "not use the network" in remeasure(measured / "final", 4, ours=False).text
    (measured / "run.json").write_text("{}")
    assert remeasure(measured / "final", 4, ours=True).state == "wrong"
    assert remeasure(measured / "final", 4, ours=False).state == "note"
    before.pop("run.json"), (measured / "run.json").unlink()
    assert digests(measured) == before


def test_results_of_other_weights_are_no_record(measured):
    (measured / "final" / "data").mkdir()
    metrics = json.loads((measured / "run.json").read_text())["metrics"] | {"data": ["x"], "limit": None}
    (measured / "final/data/results.json").write_text(json.dumps(metrics | {"weights_sha256": "0" * 64}))
    assert find_record(measured / "final")["source"] == "data/results.json"
    found = remeasure(measured / "final", 4, ours=False)
    assert found.state == "wrong" and "other weights" in found.text


def test_the_command_prints_a_line_per_check_and_fails_if_one_is_wrong(measured, capsys, monkeypatch):
    before = digests(measured)
    main([str(measured), "--check", "--rows", "4"])
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    names = ["files", "size", "weights", "licences", "card", "secrets", "loading", "metrics"]
    expected = [["note" if name == "licences" else "right", name] for name in names]
    assert lines == [*expected, ["none", "of"]]
    assert digests(measured) == before and not (measured / "final" / "README.md").exists()

    (measured / "final" / "notes.txt").write_text(home("pictures"))
    monkeypatch.setattr(publish, "load_by_stranger", lambda folder: Finding("loading", "right", "as before"))
    with pytest.raises(SystemExit) as end:
        main([str(measured), "--check", "--rows", "4", "--repo_id", REPO])
    text = capsys.readouterr().out
    assert end.value.code == 1 and text.splitlines()[-1].startswith("2 of 8 checks are wrong")
    assert "wrong  secrets" in text and "wrong  licences" in text, "our own release must have its licences"


def test_publishing_needs_a_name(trained, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(trained / "final")])
    assert end.value.code == 2 and "--repo_id" in capsys.readouterr().err
