"""Compose training pictures of the demo's things alone, for `--data compose:tools.emoji.demo_composer`."""

from tools.emoji.composer import DATA, Composed, Composer
from tools.emoji.concepts import DEMO
from tools.emoji.drawings import Drawings, load_concept_table

ABOUT_SCENES = ("choice", "exists")  # more would take time that the demo does not have


class DemoComposer(Composer):
    """Compose pictures of one thing, with all questions, and scenes, with those that compare names with a picture."""

    singles = (0.6,)

    def scene(self, rng, index: int, style: str, redrawn: bool = False) -> Composed:
        """Return what `Composer.scene` returns, with the questions of `ABOUT_SCENES` alone."""
        found = super().scene(rng, index, style, redrawn)
        return found._replace(rows=[row for row in found.rows if row.task in ABOUT_SCENES])

    @classmethod
    def open(cls, seed: int) -> "DemoComposer":
        """Return the composer of a seed."""
        concepts = [concept for concept in load_concept_table(DATA / "concepts.json")[0] if concept.slug in DEMO]
        return cls(Drawings.unpack(DATA / "drawings.parquet", DEMO), concepts, set(), seed)


open_composer = DemoComposer.open
