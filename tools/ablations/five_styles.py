"""Compose the demo's pictures in the five styles of the first edition instead of eleven."""

from tools.emoji.demo_composer import DemoComposer
from tools.emoji.sources import FIRST_STYLES


class FiveStyles(DemoComposer):
    """Draw only the five styles that training had at first."""

    def __init__(self, *args):
        super().__init__(*args)
        self.styles = [style for style in self.styles if style in FIRST_STYLES]


open_composer = FiveStyles.open
