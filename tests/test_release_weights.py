"""`make release-weights`: five steps in order, each from the result of the one before, and none twice."""

from pathlib import Path

import pytest

from tools import release_weights


@pytest.fixture
def steps(monkeypatch):
    """Replace what computes for hours; return the list of (step, its options), in the order of the calls."""
    called = []

    def stand_in(name, place, result=""):
        def main(argv):
            words = iter(argv[2:] if name == "average" else argv)
            options = {word.removeprefix("--"): next(words) for word in words}
            called.append((name, options | ({"of": argv[:2]} if name == "average" else {})))
            folder = Path(options[place]) / result
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            return folder

        return main

    monkeypatch.setattr(release_weights.eyes_train, "main", stand_in("eyes", "output"))
    monkeypatch.setattr(release_weights.align, "main", stand_in("align", "output"))
    monkeypatch.setattr(release_weights.train_accelerate, "main", stand_in("train", "output_dir", "final"))
    monkeypatch.setattr(release_weights.average, "main", stand_in("average", "out"))
    return called


def test_each_step_starts_from_the_one_before(steps, tmp_path):
    options = ["--output", str(tmp_path), "--seed", "4", "--eyes", "10", "--decoder", "7", "--scenes", "3"]
    assert release_weights.main(options) == tmp_path / "average"
    assert [name for name, _ in steps] == ["eyes", "align", "train", "train", "train", "average", "average"]
    eyes, align, decoder, first, second, both, result = (given for _, given in steps)
    assert (eyes["minutes"], eyes["seed"]) == ("10.0", "4") and align["vision_model"] == eyes["output"]
    assert decoder["model"] == align["output"] and (decoder["max_minutes"], decoder["seed"]) == ("7.0", "4")
    assert {run["model"] for run in (first, second)} == {decoder["output_dir"] + "/final"}
    assert [(run["recipe"], run["max_minutes"], run["seed"]) for run in (first, second)] == [
        ("emoji_scenes", "3.0", "5"), ("emoji_scenes", "3.0", "6"),
    ]  # fmt: skip
    assert both["of"] == [run["output_dir"] + "/final" for run in (first, second)] and both["share"] == "0.5"
    assert result["of"] == [decoder["output_dir"] + "/final", both["out"]]
    assert result["share"] == release_weights.SHARE and result["out"] == str(tmp_path / "average")


def test_finished_steps_are_left_out(steps, tmp_path):
    options = ["--output", str(tmp_path)]
    release_weights.main(options)
    steps.clear()
    assert release_weights.main(options) == tmp_path / "average" and not steps
    release_weights.main(["--output", str(tmp_path / "other")])
    assert "max_minutes" not in steps[2][1], "those of the recipe"
