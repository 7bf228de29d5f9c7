"""Write pages of pictures and text for a browser; each page is one file, in light and dark."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from minivlm.resources import FONT

CHINESE = re.compile("[\u3400-\u9fff]")
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 "MiniVLM Sans", system-ui, sans-serif; }
:root { --right: #0a6b1c; --wrong: #b01212; }
@media (prefers-color-scheme: dark) { :root { --right: #6fd684; --wrong: #ff8d85; } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
article { display: flex; gap: 1rem; flex-wrap: wrap; padding: 1rem 0; border-top: 1px solid #8884; }
figure { margin: 0; } img { max-width: 160px; max-height: 160px; display: block; background: #8882; }
figcaption, h2 { font-size: 12px; font-weight: normal; opacity: .7; margin: 0 0 .3rem; }
.words { flex: 1 1 24rem; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #7cc78a66; color: inherit; border-radius: 3px; } .picture, .bad { opacity: .6; font-style: italic; }
pre { overflow-x: auto; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.sheet article { display: block; border: 1px solid #8884; border-left: 4px solid; border-radius: 4px; padding: .8rem; }
.sheet p { margin: .4rem 0 0; overflow-wrap: anywhere; }
.right { border-left-color: var(--right) !important; } .right .answer { color: var(--right); }
.wrong { border-left-color: var(--wrong) !important; } .wrong .answer { color: var(--wrong); }
"""


def page(title: str, body: str) -> str:
    """Return a whole page; `body` is HTML, `title` plain text. A page with Chinese in it carries a font for it."""
    style, name = STYLE, html.escape(title)
    if FONT.is_file() and CHINESE.search(title + body):
        source = f"data:font/ttf;base64,{base64.b64encode(FONT.read_bytes()).decode()}"
        style += f'@font-face {{ font-family: "MiniVLM Sans"; src: url("{source}"); unicode-range: U+2e80-ffef; }}\n'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{name}</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{body}</body></html>\n'


def figure(picture: Image.Image, alt: str = "", size: tuple[int, int] | None = None) -> str:
    """Return a figure: the picture, at most 320 pixels wide and high, inside the page, with its size below it."""
    width, height = size or picture.size  # of the original, where `picture` is a smaller copy
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((320, 320))
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{width} x {height}</figcaption></figure>"


def write_page(path: Path, text: str) -> None:
    """Write a page, and make its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
