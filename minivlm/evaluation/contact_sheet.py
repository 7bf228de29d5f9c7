"""Show questions, truth and answers beside their pictures: a contact sheet as a picture, or a page for a browser."""

import html
import re
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from minivlm.data.pictures import decode_image
from minivlm.evaluation.scoring import is_right
from minivlm.pages import figure, page
from minivlm.resources import FONT

INSTALLED = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "PingFang.ttc", "msyh.ttc", "DroidSansFallbackFull.ttf")
# Where a line may break: at spaces, and beside each Chinese character, but not before a closing mark.
PIECES = re.compile(r"\s|[“‘（《「]*(?:[^\s\u2e80-\uffef]+|[\u2e80-\uffef])[，。、？！：；）》」”’]*")


@cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Return our own font, which has the characters of the embedded data, then those of the system with Chinese."""
    found = []
    for name in (FONT, *INSTALLED):
        try:
            # The other engine, raqm, fails on line breaks, which an untrained model writes.
            found.append(ImageFont.truetype(name, size, layout_engine=ImageFont.Layout.BASIC))
        except OSError:
            continue
    return found or [ImageFont.load_default(size)]


def has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Return whether a font has all characters of a text; a missing one is drawn as U+FFFF is."""
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(character)) != missing for character in set(text))


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the first of `fonts` that has all characters of a text; if none has, the first."""
    return next((font for font in fonts(size) if has(font, text)), fonts(size)[0])


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels; "…" ends a text that does not fit."""
    lines = [""]
    for piece in PIECES.findall(" ".join(text.split())):
        for part in [piece] if font.getlength(piece) <= width else piece:  # a long word breaks anywhere
            if font.getlength(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part if lines[-1] else part.lstrip()
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


def contact_sheet(
    items: list[dict], outputs: list[str], columns: int = 4, cell: tuple[int, int] = (260, 288)
) -> Image.Image:
    """Draw pictures with question, truth and answer below each; right answers are green with a tick, others red."""
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (item, output) in enumerate(zip(items, outputs)):
        x, y = i % columns * cell[0] + 8, i // columns * cell[1] + 8
        picture = decode_image(item["images"][0])
        picture.thumbnail((cell[0] - 16, 128))
        sheet.paste(picture, (x, y))
        right = is_right(item, output)
        said, color = (f"✓ model: {output}", "#0a7d20") if right else (f"× model: {output}", "#c01818")
        y += 132
        texts = (item["question"], 3, "black"), (f"truth: {item['answer']}", 2, "black"), (said, 2, color)
        for text, most, fill in texts:
            font = font_for(text, 14)
            for line in wrap(text, font, cell[0] - 16, most):
                draw.text((x, y), line, fill=fill, font=font)
                y += 20
    return sheet


def answers_page(title: str, items: list[dict], outputs: list[str]) -> str:
    """Return the page of `items` from `scoring.prompts`: pictures, question, truth and the answer of the model."""
    cards, hits = [], 0
    for number, (item, output) in enumerate(zip(items, outputs), 1):
        right = is_right(item, output)
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
