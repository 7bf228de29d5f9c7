"""Compose pictures whose names are in part those of the tower's classifier: `compose:tools.emoji.taught_composer`.

A classifier takes a rat for a mouse more often than for a bus. What it says besides the right name tells what a thing
resembles, and a decoder that learns this, too, names more drawings of an unseen hand (distillation, arXiv 1503.02531).
Each answer that is a name, or follows from one, is drawn anew: with a probability of `TAUGHT` by the probabilities of
the classifier, otherwise it is the right one. On average this is the loss to a mixture of both (arXiv 1606.07947).
Places, counts, options and what a question names are never changed.
"""

import random
from pathlib import Path

import numpy as np
import torch

from tools.emoji.composer import ALONE, DATA, NEIGHBOURS, Composed, Composer
from tools.emoji.concepts import CATEGORIES, LANGUAGES
from tools.emoji.drawings import Drawings, load_concept_table
from tools.emoji.eyes import TAUGHT, Eyes, cell_weights, load

TEACHER = Path("runs/emoji/eyes")  # tools.release_weights and tools.emoji.eyes_head write it
ABOUT_NAMES = ("name", "category", *NEIGHBOURS)  # tasks whose answer is a name or follows from one


class TaughtComposer(Composer):
    """Compose pictures, most of one thing, in all styles equally often; `teacher` names the things, too."""

    singles, names, first = (0.6,), 2, ("name", *NEIGHBOURS)

    def __init__(self, drawings, concepts, held_out, seed: int, teacher: tuple[Eyes, list[str]]):
        super().__init__(drawings, concepts, held_out, seed)
        by_slug = {concept.slug: concept for concept in concepts}
        self.eyes, self.known = teacher[0].eval().requires_grad_(False), [by_slug[slug] for slug in teacher[1]]
        self.held_out = torch.tensor([concept in held_out for concept in self.known])

    def answers(self, found: Composed, epoch: int, index: int) -> list[str]:
        """Return the answers to learn from; names are drawn from the classifier's probabilities or right."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}/taught")
        asked = {i: self.named(found, row) for i, row in enumerate(found.rows) if row.task in ABOUT_NAMES}
        answers = [row.answer for row in found.rows]
        if not asked:
            return answers
        probabilities = self.probabilities(found)
        for i, thing in asked.items():
            row = found.rows[i]
            if rng.random() < TAUGHT:
                concept = rng.choices(self.known, probabilities[thing])[0]
                group = CATEGORIES[concept.group][LANGUAGES.index(row.language)]
                answers[i] = group if row.task == "category" else concept.name(row.language)
        return answers

    @staticmethod
    def named(found: Composed, row) -> int:
        """Return the number of the thing that the answer of a row names or classifies."""
        if row.task not in NEIGHBOURS:
            return 0
        return next(i for i, thing in enumerate(found.things) if thing.concept.name(row.language) == row.answer)

    @torch.no_grad()
    def probabilities(self, found: Composed) -> list[list[float]]:
        """Return for each thing of a picture the probability of each concept; in a scene those held out have none."""
        pixels = torch.from_numpy(np.array(found.picture)).permute(2, 0, 1)[None].float() / 255
        cells = [cell_weights(grid)[row * grid + column] for grid, row, column in (t.position for t in found.things)]
        logits = self.eyes.name(self.eyes.look(pixels), torch.stack(cells)[None])[0]
        if found.things[0].position != ALONE:
            logits = logits.masked_fill(self.held_out, -torch.inf)
        return logits.softmax(-1).tolist()

    @classmethod
    def open(cls, seed: int) -> "TaughtComposer":
        """Return the composer of a seed, with the classifier in `TEACHER`.

        Raises:
            ValueError: there is no classifier.
        """
        if not (TEACHER / "head.pt").is_file():
            raise ValueError(
                f"{TEACHER} holds no classifier. Make one: python -m tools.emoji.eyes_head --output {TEACHER}, or "
                "train without: --data compose:tools.emoji.composer."
            )
        concepts, held_out = load_concept_table(DATA / "concepts.json")
        return cls(Drawings.unpack(DATA / "drawings.parquet"), concepts, held_out, seed, load(TEACHER))


open_composer = TaughtComposer.open
