"""Find the colours of sprites, and draw pictures of 128 x 128 pixels with them.

A sprite is an RGBA picture that is cropped to its opaque part. A background is one of `BACKGROUNDS`; it is used only
where the outline of the sprite stands out from it.
"""

import colorsys
import io
from functools import cache

import numpy as np
from PIL import Image

SIZE = 128  # side of a picture, pixels
BACKGROUNDS = {  # shades of each of the eleven colours; everybody gives them that name
    "black": ((16, 16, 18), (34, 34, 36)),
    "white": ((255, 255, 255), (247, 247, 245)),
    "grey": ((128, 128, 130), (158, 158, 160)),
    "red": ((200, 25, 35), (222, 48, 48)),
    "orange": ((245, 125, 20), (240, 140, 40)),
    "yellow": ((250, 220, 40), (255, 232, 90)),
    "green": ((30, 120, 60), (95, 180, 95)),
    "blue": ((30, 75, 180), (80, 145, 235)),
    "purple": ((100, 45, 145), (145, 90, 200)),
    "pink": ((250, 160, 195), (240, 120, 175)),
    "brown": ((100, 62, 34), (135, 88, 52)),
}
APART = 27.0  # smallest CIE76 distance at which a pixel stands out from the background
OUTLINE_LIMIT = 0.15  # largest share of outline pixels that do not stand out
INSIDE_LIMIT = 0.40  # largest share of all pixels that do not stand out


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert sRGB values in 0..255 (..., 3) to CIELAB under D65."""
    c = np.asarray(rgb, dtype=np.float64) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = c @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    f = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


GROUNDS = [(name, shade) for name, shades in BACKGROUNDS.items() for shade in shades]
GROUNDS_LAB = to_lab(np.array([shade for _, shade in GROUNDS]))


def look(sprite: Image.Image) -> tuple[str | None, list[float]]:
    """Return the main colour of a sprite, and for each of `GROUNDS` how strongly it hides the sprite.

    The colour is None if it is not clear. A value up to 1 means that outline and inside stay within `OUTLINE_LIMIT`
    and `INSIDE_LIMIT`. A background of the main colour counts as 2.
    """
    small = np.asarray(sprite.resize([max(8, round(n * 0.3)) for n in sprite.size], Image.BOX))
    opaque = np.pad(small[..., 3] > 160, 1)
    inner = opaque[:-2, 1:-1] & opaque[2:, 1:-1] & opaque[1:-1, :-2] & opaque[1:-1, 2:]
    opaque = opaque[1:-1, 1:-1]
    if not opaque.any():  # a drawing of very thin lines
        opaque = small[..., 3] > 40
    rgb = small[..., :3][opaque]
    edge = ~inner[opaque]
    near = np.linalg.norm(to_lab(rgb)[:, None] - GROUNDS_LAB, axis=-1) < APART  # (pixels, grounds)
    hidden = np.maximum(near[edge].mean(0) / OUTLINE_LIMIT, near.mean(0) / INSIDE_LIMIT)
    main = main_color(rgb)
    return main, [2.0 if name == main else value for (name, _), value in zip(GROUNDS, hidden.tolist())]


def main_color(rgb: np.ndarray) -> str | None:
    """Return the colour of at least 60 % of the pixels (n, 3), or None.

    No other colour may cover more than a quarter of the pixels.
    """
    names, counts = np.unique([color_of(*pixel) for pixel in (rgb // 8 * 8 + 4).tolist()], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    first = counts[order[0]] / len(rgb)
    second = max((counts[i] / len(rgb) for i in order[1:]), default=0.0)
    return str(names[order[0]]) if names[order[0]] and first >= 0.6 and second <= 0.25 else None


@cache
def color_of(r: int, g: int, b: int) -> str:
    """Return one of the eleven basic colours, or "" for a colour between two of them.

    The bounds, in degrees of hue, were chosen by eye.
    """
    h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    h *= 360
    if v < 0.22 or (v < 0.36 and s < (0.5 if 180 < h < 260 else 0.25)):
        return "black"
    if s < 0.10 or (s < 0.26 and 180 < h < 260 and v < 0.75):
        return "white" if v > 0.91 else "grey" if 0.42 < v < 0.82 else ""
    if h < 14 or h >= 340:
        if s < 0.55 and v > 0.8:
            return "pink" if h >= 340 or s > 0.25 else ""
        if 4 < h < 340 and v < 0.65:
            return "brown" if v < 0.56 and s < 0.7 else ""
        return "red" if s > 0.6 and v > 0.6 and s + v > 1.4 else ""
    if h < 41:
        if v < 0.68 and s > 0.25:
            return "brown"
        if s < 0.6 or v < 0.85:
            return "brown" if v < 0.75 and s > 0.3 else ""
        return "orange" if 15 < h < 36.5 else ""
    if h < 66:
        return "yellow" if v > 0.78 and s > 0.35 else ""
    if 78 < h < 162:
        return "green" if s > 0.2 else ""
    if 192 < h < 245:
        return "blue" if s > 0.45 or (s > 0.3 and v > 0.8) else ""
    if 255 < h < 295:
        return "purple" if s > 0.2 else ""
    if 305 < h < 340:
        return "pink" if v > 0.75 and 0.2 < s < (0.7 if h > 330 else 0.95) else ""
    return ""


def choose_ground(rng, hidden: list[list[float]]) -> tuple[str, tuple[int, int, int], float]:
    """Choose a random background; return its colour, its shade and the worst value of `look` over the sprites.

    A value above 1 means that no background fits.
    """
    worst = [max(values) for values in zip(*hidden)]
    fitting = [i for i, value in enumerate(worst) if value <= 1]
    if not fitting:
        i = min(range(len(worst)), key=worst.__getitem__)
        return *GROUNDS[i], worst[i]
    color = rng.choice(sorted({GROUNDS[i][0] for i in fitting}))
    i = rng.choice([i for i in fitting if GROUNDS[i][0] == color])
    return *GROUNDS[i], worst[i]


def paste(canvas: Image.Image, sprite: Image.Image, side: float, x: float, y: float) -> tuple[int, int, int, int]:
    """Draw a sprite with a longer side of `side` pixels centred on (x, y); return left, top, right and bottom.

    The sprite is moved just far enough to lie inside the picture.
    """
    scale = side / max(sprite.size)
    sprite = sprite.resize([max(1, round(n * scale)) for n in sprite.size], Image.LANCZOS)
    left = min(max(round(x - sprite.width / 2), 1), SIZE - 1 - sprite.width)
    top = min(max(round(y - sprite.height / 2), 1), SIZE - 1 - sprite.height)
    canvas.paste(sprite, (left, top), sprite)
    return left, top, left + sprite.width, top + sprite.height


def draw_single(rng, sprite: Image.Image, shade: tuple[int, int, int]) -> Image.Image:
    """Return a picture of one thing, 70 to 94 % of the picture wide or high, up to 10 pixels off the centre."""
    canvas = Image.new("RGB", (SIZE, SIZE), shade)
    paste(canvas, sprite, rng.uniform(90, 120), SIZE / 2 + rng.uniform(-10, 10), SIZE / 2 + rng.uniform(-10, 10))
    return canvas


def draw_scene(rng, sprites: list, positions: list, shade: tuple) -> tuple[Image.Image, list[tuple]]:
    """Return a picture of several things, and the box of each.

    Each thing lies inside its own cell of a 2 x 2 or 3 x 3 grid, so that none overlap.
    """
    canvas, boxes = Image.new("RGB", (SIZE, SIZE), shade), []
    for sprite, (grid, row, column) in zip(sprites, positions):
        cell = SIZE / grid
        side = rng.uniform(44, 58) if grid == 2 else rng.uniform(37, 41)
        free = (cell - side - 1) / 2
        x, y = ((i + 0.5) * cell + rng.uniform(-free, free) for i in (column, row))
        boxes.append(paste(canvas, sprite, side, x, y))
    return canvas, boxes


def encode(picture: Image.Image, quality: int) -> bytes:
    """Return a picture as the bytes of a WebP file."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()
