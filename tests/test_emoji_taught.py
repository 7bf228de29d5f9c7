"""Test the composer whose names come in part from a classifier, and the classifier that is fitted on a tower."""

from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

from helpers.emoji import CONCEPTS, make_drawings
from tools.emoji import taught_composer
from tools.emoji.composer import NEIGHBOURS
from tools.emoji.concepts import LANGUAGES
from tools.emoji.eyes import TAUGHT, Eyes, build_tower
from tools.emoji.eyes_head import fit
from tools.emoji.taught_composer import ABOUT_NAMES, TaughtComposer

HELD_OUT = CONCEPTS[:4]
BY_NAME = {concept.name(language): concept for concept in CONCEPTS for language in LANGUAGES}
LIKED = CONCEPTS[7]  # the classifier below is sure of this name where the picture shows something
KNOWN = [concept.slug for concept in reversed(CONCEPTS)]


class Sure(nn.Module):
    """Classify as `LIKED` or, half as likely, as the first concept that is held out, whatever the picture shows."""

    def look(self, pixels):
        assert pixels.shape == (1, 3, 128, 128) and 0 <= pixels.min() and pixels.max() <= 1
        return torch.zeros(1, 64, 1)

    def name(self, features, weights):
        assert torch.allclose(weights.sum(-1), torch.ones(1)) and weights.shape[2] == 64
        logits = torch.full((1, weights.shape[1], len(KNOWN)), -50.0)
        logits[..., KNOWN.index(LIKED.slug)] = 1.0
        logits[..., KNOWN.index(HELD_OUT[0].slug)] = 0.3069
        return logits


@cache
def made() -> list[tuple]:
    """Return (composed, answers to learn from) of 300 pictures."""
    composer = TaughtComposer(make_drawings(), CONCEPTS, set(HELD_OUT), 0, (Sure(), KNOWN))
    return [(found := composer.rows(0, i), composer.answers(found, 0, i)) for i in range(300)]


def pairs(*tasks: str, single: bool | None = None) -> list[tuple]:
    """Return (row, answer to learn from) of the tasks, of pictures of one thing, of scenes, or of all."""
    return [
        (row, answer)
        for found, answers in made()
        for row, answer in zip(found.rows, answers, strict=True)
        if row.task in tasks and single in (None, any(row.task == "name" for row in found.rows))
    ]


def test_most_names_are_those_of_the_classifier_and_the_others_are_right():
    names = Counter(
        "right" if answer == row.answer else BY_NAME[answer].slug for row, answer in pairs("name") if answer in BY_NAME
    )
    total = names.total()
    assert total > 400 and names.keys() == {"right", LIKED.slug, HELD_OUT[0].slug}
    assert names[LIKED.slug] / total == pytest.approx(TAUGHT * 2 / 3, abs=0.07)
    assert names[HELD_OUT[0].slug] / total == pytest.approx(TAUGHT / 3, abs=0.07)


def test_categories_are_those_of_the_names_that_the_classifier_gives():
    changed = {answer for row, answer in pairs("category") if answer != row.answer}
    assert changed and all(len({row.answer for row, _ in pairs("category")} & {answer}) == 1 for answer in changed)


def test_neighbours_are_named_by_the_classifier_and_never_as_what_is_held_out():
    learned = pairs(*NEIGHBOURS, single=False)
    changed = Counter(BY_NAME[answer] for row, answer in learned if answer != row.answer)
    assert len(learned) > 60 and changed.keys() == {LIKED}
    assert all(answer == BY_NAME[answer].name(row.language) for row, answer in learned)


def test_all_other_answers_stay_as_they_are():
    others = {row.task for found, _ in made() for row in found.rows} - set(ABOUT_NAMES)
    assert {"choice", "yes_no", "where", "box", "count_kind"} <= others
    assert all(answer == row.answer for row, answer in pairs(*others))


def test_the_thing_that_an_answer_names_is_the_one_that_is_looked_at():
    for found, _ in made():
        for row in found.rows:
            if row.task in ABOUT_NAMES:
                thing = found.things[TaughtComposer.named(found, row)]
                assert row.task == "category" or thing.concept.name(row.language) == row.answer


def test_a_classifier_that_is_fitted_on_features_finds_their_concepts():
    torch.manual_seed(0)
    centres = 100 + 30 * torch.randn(5, 16)  # far from zero: the features are standardized
    labels = torch.arange(3000) % 5
    features = centres[labels] + 5 * torch.randn(3000, 16)
    eyes = Eyes(build_tower("resnet", 2), 5)
    assert eyes.width == 16

    class Args:
        passes, learning_rate, seed = 20, 3e-2, 0

    fit(eyes, features, labels, Args)
    found = eyes.name(centres[:, None].expand(5, 64, 16))
    assert found.argmax(-1).tolist() == [0, 1, 2, 3, 4]


def test_without_a_classifier_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(taught_composer, "TEACHER", tmp_path)
    with pytest.raises(ValueError, match="holds no classifier. Make one: python -m tools.emoji.eyes_head"):
        taught_composer.open_composer(0)
