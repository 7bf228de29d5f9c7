"""Compose more scenes, and more questions about what stands beside a thing: `compose:tools.emoji.scene_composer`.

For a last run from weights that name single things well: a thing of a scene is half as large, and its name is asked
for only by the questions about neighbours and by captions.
"""

from tools.emoji.composer import NEIGHBOURS, Composed, Composer, open_with

NEAR = 0.5  # share of the scenes whose questions about neighbours come before all others, of which some find no place


class SceneComposer(Composer):
    """Compose pictures of which 60 % are scenes, in all styles equally often."""

    singles = (0.4,)

    def scene(self, rng, index: int, style: str, redrawn: bool = False) -> Composed:
        """Return what `Composer.scene` returns, for `NEAR` of the scenes in another order."""
        found = super().scene(rng, index, style, redrawn)
        if rng.random() < NEAR:
            found.rows.sort(key=lambda row: row.task not in NEIGHBOURS)
        return found


def open_composer(seed: int) -> SceneComposer:
    """Return the composer of a seed, for `--data compose:tools.emoji.scene_composer`."""
    return open_with(SceneComposer, seed)
