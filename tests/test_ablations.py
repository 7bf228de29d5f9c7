"""Test that each ablation changes what its name says and nothing else."""

import json

import pytest

from helpers.emoji import CONCEPTS, make_drawings
from helpers.models import ROOT
from minivlm.evaluation.scoring import wilson
from tools.ablations import __main__ as ablations
from tools.ablations.blind import BlindComposer
from tools.ablations.five_styles import FiveStyles
from tools.ablations.no_scenes import NoScenes
from tools.ablations.not_redrawn import NotRedrawn
from tools.emoji.demo_composer import DemoComposer
from tools.emoji.sources import FIRST_STYLES


@pytest.fixture
def composed():
    """Return a function that composes pictures 0 to 59 of a composer: (pictures, styles, rows)."""
    drawings = make_drawings()

    def compose(kind) -> tuple:
        composer = kind(drawings, CONCEPTS, set(), 0)
        found = [composer.rows(0, index) for index in range(60)]
        return [p.tobytes() for p, *_ in found], {style for _, style, *_ in found}, [rows for *_, rows in found]

    return compose


def test_the_blind_model_gets_the_same_questions_and_no_picture(composed):
    pictures, _, rows = composed(DemoComposer)
    grey, _, asked = composed(BlindComposer)
    assert asked == rows and len(set(grey)) == 1 and len(set(pictures)) == 60


def test_five_styles_are_those_of_the_first_edition(composed):
    drawn = composed(DemoComposer)[1]
    assert drawn - set(FIRST_STYLES) and composed(FiveStyles)[1] == drawn & set(FIRST_STYLES)


def share(task: str, rows: list[list]) -> float:
    """Return the share of the pictures of one thing that are asked about with a task."""
    singles = [tasks for tasks in ({row.task for row in asked} for asked in rows) if "name" in tasks]
    return sum(task in tasks for tasks in singles) / len(singles)


def test_drawings_that_are_not_changed_have_a_known_background(composed):
    assert share("background", composed(NotRedrawn)[2]) == 1 > share("background", composed(DemoComposer)[2]) > 0.2


def test_without_scenes_each_picture_is_asked_for_one_name(composed):
    def scenes(kind):
        return sum(all(row.task != "name" for row in asked) for asked in composed(kind)[2])

    assert scenes(NoScenes) == 0 and scenes(DemoComposer) > 10
    assert {row.task for asked in composed(DemoComposer)[2] for row in asked} >= {"exists", "choice", "name"}


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_a_variant_changes_the_configuration_in_one_place(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    base, changed = (ablations.architecture(ablations.VARIANTS[n]) for n in ("base", name))
    keys = {key for key in base if base[key] != changed[key]}
    assert keys == set(ablations.VARIANTS[name].config)
    if "text_config" in keys:
        text = {key for key in base["text_config"] if base["text_config"][key] != changed["text_config"][key]}
        assert len(text) == 1


def test_a_share_is_that_of_all_seeds_and_languages():
    def metrics(hits):
        cell = {"en": {"hits": hits, "count": 10}, "zh": {"hits": hits, "count": 10}}
        return {"tasks": {"name": cell, "yes_no": cell}, "ranked": {"choice": cell}}

    low, high = wilson(14, 40)
    name, choice, likeliest, *_ = ablations.cells([metrics(5), metrics(2)])
    assert name == likeliest == f"35.0% ({low:.0%} - {high:.0%})" and choice == ""


def test_a_finished_run_is_read(tmp_path, monkeypatch):
    results = tmp_path / "base" / "0" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"tasks": {}}))
    args = ablations.parse_args(["--output", str(tmp_path)])
    assert ablations.run("base", 0, args) == {"tasks": {}}
