"""Compose training pictures of the demo's things alone, for `--data compose:tools.emoji.demo_composer`."""

from tools.emoji.composer import DATA, Composer
from tools.emoji.concepts import DEMO
from tools.emoji.drawings import Drawings, load_concept_table


class DemoComposer(Composer):
    """Compose pictures of one thing each; questions about scenes would take time that the demo does not have."""

    singles = (1.0,)

    @classmethod
    def open(cls, seed: int) -> "DemoComposer":
        """Return the composer of a seed."""
        concepts = [concept for concept in load_concept_table(DATA / "concepts.json")[0] if concept.slug in DEMO]
        return cls(Drawings.unpack(DATA / "drawings.parquet", DEMO), concepts, set(), seed)


open_composer = DemoComposer.open
