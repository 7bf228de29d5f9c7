"""The composer of the last runs: as many scenes as pictures of one thing, and small things first in most scenes."""

from collections import Counter

from helpers.emoji import CONCEPTS, make_drawings
from tools.emoji.composer import Composer
from tools.emoji.scene_composer import FOCUSED, SMALL, SceneComposer, open_composer


class Base(Composer):
    """The same shares, and no task before others."""

    singles = SceneComposer.singles


def composed(kind, count=400):
    composer = kind(make_drawings(), CONCEPTS, set(CONCEPTS[:4]), 0)
    return [composer.rows(0, index) for index in range(count)]


def is_single(found):
    return any(row.task == "name" for row in found.rows)


def test_pictures_and_questions_are_those_of_the_composer_in_another_order():
    ours, plain = composed(SceneComposer, 100), composed(Base, 100)
    for one, other in zip(ours, plain):
        assert one.picture.tobytes() == other.picture.tobytes()
        assert Counter(row.question for row in one.rows) == Counter(row.question for row in other.rows)
    assert [found.rows for found in ours if is_single(found)] == [found.rows for found in plain if is_single(found)]


def test_half_are_scenes_and_most_of_these_begin_with_small_things():
    made = composed(SceneComposer)
    scenes = [found for found in made if not is_single(found)]
    assert 0.42 < len(scenes) / len(made) < 0.58
    turns = [[row.task in SMALL for row in found.rows] for found in scenes]
    turns = [tasks for tasks in turns if 1 < sum(tasks) < len(tasks)]  # others tell nothing
    first = [tasks == sorted(tasks, reverse=True) for tasks in turns]
    assert len(first) > 100 and FOCUSED - 0.1 < sum(first) / len(first) < FOCUSED + 0.1


def test_a_thing_alone_is_asked_for_its_name_first_in_both_languages():
    for found in filter(is_single, composed(SceneComposer, 50)):
        assert [(row.task, row.language) for row in found.rows[:2]] == [("name", "en"), ("name", "zh")]


def test_the_module_opens_the_composer_of_a_seed():
    composer = open_composer(7)
    assert isinstance(composer, SceneComposer) and composer.seed == 7 and composer.rows(0, 0).rows
