"""Compose the demo's pictures from the drawings as they are, without changes of colour, outline and shape."""

from tools.emoji.demo_composer import DemoComposer


class NotRedrawn(DemoComposer):
    """Draw each thing as its artist did."""

    redrawn_share = 0.0


open_composer = NotRedrawn.open
