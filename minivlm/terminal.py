"""Read lines and show pictures in a terminal, by what is installed there: `pip install minivlm[chat]`."""

import logging
import os
import sys
from collections.abc import Callable

from PIL import Image

COLUMNS = 32  # width of a picture that is shown


def line_reader() -> Callable[[str], str]:
    """Return a function that reads a line after a prompt and raises EOFError at the end.

    In a terminal with `prompt_toolkit` lines can be edited and earlier ones come back with the arrow keys. Where lines
    come from a pipe no prompt is printed.
    """
    if not sys.stdin.isatty():
        return lambda prompt: input()
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return input
    return PromptSession().prompt  # its history is forgotten at the end


def show_picture(name: str, picture: Image.Image) -> None:
    """Print name and size of a picture; above them the picture itself, if this is a terminal and can show one."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()  # it is asked by the one, and answers by the other
    if terminal and os.get_terminal_size().columns >= COLUMNS:  # some say that they have none
        logging.getLogger("textual_image").setLevel(logging.ERROR)  # it warns if a terminal does not answer
        try:
            from rich.console import Console
            from textual_image.renderable import Image as Drawn  # asks the terminal what it can, when it is imported
        except ImportError:
            pass
        else:
            Console().print(Drawn(picture, width=COLUMNS, height="auto"))
    print(f"{name}: {picture.width} x {picture.height}")
