"""Pages of pictures and words for a browser: each is one file that needs no other, in light and dark."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from data_minivlm import decode_image
from scripts.evaluate import normalise

# Made by scripts/subset_font.py: what the embedded data's texts need, for machines without a Chinese font.
FONT = Path(__file__).resolve().parents[1] / "minivlm" / "assets" / "MiniVLMSans-Regular.ttf"
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
    """A whole page; `body` is HTML, `title` plain text. With Chinese in it the page brings its font along."""
    style, name = STYLE, html.escape(title)
    if FONT.is_file() and CHINESE.search(title + body):
        source = f"data:font/ttf;base64,{base64.b64encode(FONT.read_bytes()).decode()}"
        style += f'@font-face {{ font-family: "MiniVLM Sans"; src: url("{source}"); unicode-range: U+2e80-ffef; }}\n'
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{name}</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{body}</body></html>\n'


def figure(picture: Image.Image, alt: str = "") -> str:
    """A picture at most 320 pixels wide and high, inside the page, with its size below it."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((320, 320))
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{picture.width} x {picture.height}</figcaption></figure>"


def answers_page(title: str, items: list[dict], outputs: list[str]) -> str:
    """The page of `items`, see `scripts.evaluate.prompts`: pictures, question, truth and what the model answered."""
    cards, hits = [], 0
    for number, (item, output) in enumerate(zip(items, outputs), 1):
        right = normalise(output) == normalise(item["answer"])
        hits += right
        kind, sign = ("right", "✓") if right else ("wrong", "✗")
        question, truth, said = (html.escape(text) for text in (item["question"], item["answer"], output))
        pictures = "".join(figure(decode_image(image), f"Picture {number}") for image in item["images"])
        language = f' lang="{item["language"]}"' if item["language"] in ("en", "zh") else ""
        cards.append(
            f'<article class="{kind}"{language}>{pictures}<p>{question}</p><p>truth: {truth}</p>'
            f'<p class="answer"><b>{sign} {kind}:</b> {said}</p></article>'
        )
    return page(title, f'<p>{hits} of {len(cards)} answers are right.</p><div class="sheet">{"".join(cards)}</div>')


def write_page(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
