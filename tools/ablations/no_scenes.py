"""Compose the demo's pictures of one thing, and no scenes."""

from tools.emoji.demo_composer import DemoComposer


class NoScenes(DemoComposer):
    """Show one thing in each picture."""

    singles = (1.0,)


open_composer = NoScenes.open
