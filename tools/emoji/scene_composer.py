"""Compose more pictures with fewer questions about each: `compose:tools.emoji.scene_composer`.

With four questions about a picture (`--share_pictures 4`) a run sees more pictures in the same time, and names need
drawings. A thing alone is asked for its name first, most scenes for the small things that were learned least.
"""

from tools.emoji.composer import NEIGHBOURS, Composed, Composer

FOCUSED = 0.6  # share of the scenes whose first questions are those of `SMALL`
SMALL = (*NEIGHBOURS, "count_kind")  # tasks about small things


class SceneComposer(Composer):
    """Compose as many scenes as pictures of one thing, in all styles equally often."""

    singles = (0.5,)

    def scene(self, rng, index: int, style: str, redrawn: bool = False) -> Composed:
        """Return what `rows` returns, for a scene; in most scenes the tasks of `SMALL` come first."""
        found = super().scene(rng, index, style, redrawn)
        if rng.random() < FOCUSED:
            found.rows.sort(key=lambda row: row.task not in SMALL)
        return found


open_composer = SceneComposer.open
