"""Test the training pictures and questions that are composed from a seed, and the drawings of which they are made."""

import random
import re
import runpy
import sys
from collections import Counter
from functools import cache

import pyarrow.parquet as pq
import pytest

from helpers.emoji import CANONICAL, CONCEPTS, STYLES, allowed_answers, make_drawings
from helpers.models import ROOT
from tools.emoji import questions, sources
from tools.emoji.composer import ASKED, REDRAWN, SINGLES, Composed, Composer
from tools.emoji.concepts import LANGUAGES
from tools.emoji.drawings import load_concept_table
from tools.emoji.questions import PHRASES, TASKS
from tools.emoji.sources import DEV_STYLE, TEST_STYLE, TRAIN_STYLES

DATA = ROOT / "data"
HELD_OUT = CONCEPTS[:4]
BY_NAME = {concept.name(language): concept for concept in CONCEPTS for language in LANGUAGES}


@cache
def composer(seed: int = 0) -> Composer:
    """Return a composer of made-up drawings that keeps `HELD_OUT` out of its scenes."""
    return Composer(make_drawings(), CONCEPTS, set(HELD_OUT), seed)


@cache
def made() -> list[Composed]:
    """Return the first 400 pictures of the second epoch."""
    return [composer().rows(1, index) for index in range(400)]


def split() -> tuple[list[tuple], list[tuple]]:
    """Return (slugs, rows) of the pictures of one thing, which are asked for their name, and of the scenes."""
    found = [(composed.slugs.split(","), composed.rows) for composed in made()]
    is_single = [any(row[0] == "name" for row in rows) for _, rows in found]
    return [p for p, one in zip(found, is_single) if one], [p for p, one in zip(found, is_single) if not one]


def asked_about(question: str):
    """Return the concept that a question names."""
    [found] = {concept for name, concept in BY_NAME.items() if name in re.findall(r"[a-z]+|[\u9f00-\u9fff]", question)}
    return found


def test_drawings_are_those_of_all_training_styles_and_of_no_other():
    table = pq.read_table(DATA / "drawings.parquet", columns=["style", "concept"])
    counts = {"noto": 1358, "noto-v1": 1040, "fluent-flat": 1358, "fluent": 1358, "fluent-3d": 1352, "emojione": 1037}
    counts |= {"streamline": 543, "noto-line": 1332, "fluent-solid": 1358, "emojione-solid": 1034, "symbola": 1095}
    assert Counter(table["style"].to_pylist()) == counts and sum(counts.values()) == 12865
    assert counts.keys() == set(TRAIN_STYLES) and not {DEV_STYLE, TEST_STYLE} & counts.keys()
    concepts, _ = load_concept_table(DATA / "concepts.json")
    assert set(table["concept"].to_pylist()) == {concept.slug for concept in concepts} and len(concepts) == 1358


def test_all_files_of_the_data_set_together_are_small():
    assert (DATA / "drawings.parquet").is_file()
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 30e6


def test_composing_needs_no_package_that_draws(monkeypatch):
    """Check that the module that all others import works without the packages of `pip install minivlm[data]`."""
    for name in ("resvg_py", "fontTools"):
        monkeypatch.setitem(sys.modules, name, None)
    assert runpy.run_path(sources.__file__)["TRAIN_STYLES"] == TRAIN_STYLES


def test_a_picture_follows_from_seed_epoch_and_index():
    def seen(composer, epoch, index):
        picture, *rest = composer.rows(epoch, index)
        return picture.tobytes(), rest

    again = Composer(make_drawings(), CONCEPTS, set(HELD_OUT), seed=0)
    keys = [(epoch, index) for epoch in range(2) for index in range(10)]
    first = [seen(composer(), *key) for key in keys]
    assert first == [seen(again, *key) for key in reversed(keys)][::-1]  # no call depends on an earlier one
    assert len({picture for picture, _ in first}) == len(keys)
    assert not {picture for picture, _ in first} & {seen(composer(1), *key)[0] for key in keys}


def test_a_sample_is_made_of_each_row_in_its_order():
    for index in range(4):
        picture, *_, rows = made()[index]
        samples = composer().compose(1, index)
        turns = [[turn["content"][-1]["text"] for turn in sample["messages"]] for sample in samples]
        assert turns == [[row.question, row.answer] for row in rows]
        assert all(sample["images"][0].tobytes() == picture.tobytes() for sample in samples)


def test_pictures_are_opaque_and_their_styles_come_equally_often():
    assert {(picture.mode, picture.size) for picture, *_ in made()} == {("RGB", (128, 128))}
    counts = Counter(style for _, style, *_ in made())
    assert counts.keys() == set(STYLES) and min(counts.values()) > 0.4 * len(made())


def test_dev_and_test_style_are_never_composed_even_if_they_are_among_the_drawings():
    more = Composer(make_drawings((*STYLES, DEV_STYLE, TEST_STYLE)), CONCEPTS, set(), seed=0)
    assert {more.rows(0, index)[1] for index in range(40)} == set(STYLES)


def test_training_scenes_neither_show_nor_name_what_is_held_out():
    singles, scenes = split()
    more = [composer().scene(random.Random(i), i, STYLES[i % 2]) for i in range(60)]
    scenes += [(found.slugs, found.rows) for found in more]
    held_out = {name for concept in HELD_OUT for name in (concept.slug, concept.en, concept.zh)}
    words = set(re.findall(r"[a-z]+|[\u9f00-\u9fff]", str(scenes)))
    assert not held_out & words
    assert {name for concept in CONCEPTS[4:] for name in (concept.en, concept.zh)} <= words
    assert {concept.slug for concept in HELD_OUT} <= {slugs[0] for slugs, _ in singles}


def test_the_share_of_pictures_of_one_thing_falls_after_the_first_epoch(monkeypatch):
    for name in ("single", "scene"):
        monkeypatch.setattr(Composer, name, lambda self, *values, name=name: name)
    shares = [sum(composer().rows(epoch, i) == "single" for i in range(2000)) / 2000 for epoch in range(4)]
    assert shares == pytest.approx([SINGLES[0], SINGLES[1], SINGLES[1], SINGLES[1]], abs=0.03)
    assert SINGLES[0] > SINGLES[1]


def test_pictures_of_one_thing_are_asked_for_its_names_first():
    singles, scenes = split()
    assert min(len(singles), len(scenes)) > 150 and max(len(slugs) for slugs, _ in scenes) == 5
    for slugs, rows in singles:
        assert [row[:2] for row in rows[:2]] == [("name", language) for language in LANGUAGES] and len(slugs) == 1
        assert Counter(row[0] for row in rows[:8])["name"] == 2 and len(rows) >= 7
    first = Counter(rows[0][0] for _, rows in scenes)
    assert len(first) > 6 and max(first.values()) < len(scenes) / 3


def test_half_of_the_pictures_are_redrawn_and_asked_for_no_colour_that_nobody_knows():
    singles, _ = split()
    captions = sum(any(row[0] == "caption" for row in rows) for _, rows in singles)
    assert abs(1 - captions / len(singles) - REDRAWN) < 0.1
    for number in range(20):
        *_, rows = composer().single(random.Random(number), number, STYLES[number % 2], redrawn=True)
        assert not {"colour", "caption"} & {row[0] for row in rows}
        *_, rows = composer().scene(random.Random(number), number, STYLES[number % 2], redrawn=True)
        assert "count_colour" not in {row[0] for row in rows}


def test_every_task_is_asked_in_both_languages_and_some_less_often():
    asked = Counter(row[:2] for *_, rows in made() for row in rows)
    assert asked.keys() == PHRASES.keys() and len(TASKS) == 16
    scenes = [[row[0] for row in rows] for _, rows in split()[1]]
    most = {"caption": 1, "count": 3, "background": 1, "count_kind": 3}
    assert most.keys() == ASKED.keys()
    for task, share in ASKED.items():
        assert abs(sum(tasks.count(task) for tasks in scenes) / most[task] / len(scenes) - share) < 0.12, task


def test_every_answer_is_of_its_kind_and_right():
    allowed = allowed_answers()
    for found in made():
        shown = found.slugs.split(",")
        for task, language, question, answer, *_ in found.rows:
            assert answer in allowed.get((task, language), {answer}) and answer == answer.strip() != ""
            assert (language == "en") == question.isascii()
            if task in ("yes_no", "exists"):
                assert (asked_about(question).slug in shown) == (answer in ("yes", "是")), question
            elif task == "name":
                assert [BY_NAME[answer].slug] == shown
            elif task == "count":
                assert int(answer) == len(shown)
            elif task == "count_kind":
                assert int(answer) == shown.count(asked_about(question).slug)
            elif task in ("left_of", "above"):
                assert BY_NAME[answer].slug in shown and answer not in question


@pytest.mark.parametrize("task", ("yes_no", "exists"))
def test_yes_and_no_are_balanced(task):
    """Check each picture, each language, and each name: no name gives the answer away."""
    counts, by_name = Counter(), Counter()
    for *_, rows in made():
        answers = [(row[1], row[3] in ("yes", "是"), asked_about(row[2])) for row in rows if row[0] == task]
        assert not answers or sorted(yes for _, yes, _ in answers) == [False, True]
        counts.update(answer[:2] for answer in answers)
        by_name.update(answer[1:] for answer in answers)
    for language in LANGUAGES:
        yes, no = counts[language, True], counts[language, False]
        assert yes + no > 150 and abs(yes - no) < 3 * (yes + no) ** 0.5, counts
    often = [c for c in CONCEPTS if by_name[True, c] + by_name[False, c] > 8]
    shares = [by_name[True, c] / (by_name[True, c] + by_name[False, c]) for c in often]
    assert len(often) >= 20 and 0.4 < sum(shares) / len(shares) < 0.6 and 0.1 < min(shares) < max(shares) < 0.9


def test_a_choice_holds_its_answer_once_at_a_uniform_place():
    places = Counter()
    for *_, rows in made():
        for task, language, question, answer, listed, *_ in rows:
            assert (task == "choice") == (listed is not None)
            if listed:
                assert len(set(listed)) == 4 and questions.listed(listed, language) in question
                places[listed.index(answer)] += 1
    total = places.total()
    assert total > 300 and max(places.values()) < 0.25 * total + 4 * (0.1875 * total) ** 0.5


def test_the_canonical_question_stands_among_others():
    canonical, wordings = Counter(), {}
    for *_, rows in made():
        for task, language, question, *_ in rows:
            canonical[bool(re.fullmatch(CANONICAL[task, language], question))] += 1
            names = "|".join(map(re.escape, sorted(BY_NAME, key=len)))
            wordings.setdefault((task, language), set()).add(re.sub(names, "X", question))
    assert 0.25 < canonical[True] / canonical.total() < 0.35
    assert all(len(wordings[key]) >= len(phrases) >= 5 for key, phrases in PHRASES.items())
