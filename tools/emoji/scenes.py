"""Compose scenes of several things, and know where each thing stands and which colour it has."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tools.emoji.augment import Hand
from tools.emoji.concepts import Concept, draw_other
from tools.emoji.drawings import SIDE, Drawings
from tools.emoji.pictures import APART, GROUNDS, GROUNDS_LAB, OUTLINE_LIMIT, choose_ground, draw_scene, look, to_lab
from tools.emoji.questions import only_left
from tools.emoji.sources import crop


class Thing(NamedTuple):
    """Describe one thing of a scene: its cell (a key of `POSITIONS`), its box in pixels, its main colour if clear."""

    concept: Concept
    position: tuple[int, int, int]
    box: tuple[int, int, int, int]
    colour: str | None


class Painted(NamedTuple):
    """Hold a sprite in its final colours, its main colour, and how strongly each of `GROUNDS` hides it."""

    sprite: Image.Image
    colour: str | None
    hidden: list[float]


def pick_things(rng, pool: list[Concept]) -> list[Concept]:
    """Return one to five random concepts.

    More often than not, one of them stands in the list two or three times; every other one stands there once.
    """
    number = rng.choices((1, 2, 3, 4, 5), (10, 22, 25, 25, 18))[0]
    copies = rng.choice((2, 3)) if number > 2 else number
    kinds = [rng.choice(pool)]
    if number > 1 and rng.random() < 0.6:
        things = kinds * copies
    else:
        things = list(kinds)
    while len(things) < number:
        kinds.append(draw_other(rng, pool, kinds))
        things.append(kinds[-1])
    return things


def place(rng, things: list, answers=None) -> list[tuple]:
    """Place things on a grid of 2 x 2 or 3 x 3 cells; return (thing, position) pairs in reading order.

    `answers` is `only_left`, `only_above` or None. With one of the functions, new layouts are drawn until its question
    has an answer, at most 40 times.
    """
    grid = 2 if len(things) < 5 and rng.random() < 0.5 else 3
    cells = [(grid, row, column) for row in range(grid) for column in range(grid)]
    for _ in range(40 if answers else 1):
        rng.shuffle(things)
        placed = list(zip(things, sorted(rng.sample(cells, len(things)))))
        if answers and any(answers(placed, cell) for thing, cell in placed if things.count(thing) == 1):
            break
    return placed


def plan_scene(rng, pool: list[Concept], sprites: dict, sideways: bool) -> tuple[list, str, tuple]:
    """Return (concept, position) pairs in reading order, and colour and shade of a background that fits all things."""
    for _ in range(1000):
        things = pick_things(rng, pool)
        ground, shade, hidden = choose_ground(rng, [sprites[kind][2] for kind in dict.fromkeys(things)])
        if hidden <= 1:
            return place(rng, things, only_left if sideways else None), ground, shade
    raise ValueError(f"No background fits all things in 1000 scenes of {len(pool)} concepts. Use more concepts.")


@cache
def hidden_by_grounds(ground: int) -> list[float]:
    """Return how strongly each of `GROUNDS` hides a thing that has the colour of number `ground` throughout."""
    near = np.linalg.norm(GROUNDS_LAB - to_lab(np.array(GROUNDS[ground][1])), axis=-1) < APART
    return [2.0 if name == GROUNDS[ground][0] else n / OUTLINE_LIMIT for (name, _), n in zip(GROUNDS, near.tolist())]


class Album:
    """Hold drawings by style and concept.

    A drawing of one colour is filled with one of eleven colours each time it is used.
    """

    def __init__(self, drawings: Drawings, concepts: list[Concept]):
        by_slug = {concept.slug: concept for concept in concepts}
        self.drawings = drawings
        self.rows: dict[str, dict[Concept, list[int]]] = {}
        for i, (style, slug) in enumerate(zip(drawings.styles.tolist(), drawings.concepts.tolist())):
            self.rows.setdefault(style, {}).setdefault(by_slug[slug], []).append(i)
        self.mono = drawings.mono
        self.painted = cache(self._painted)

    def _painted(self, row: int) -> Painted:
        """Return drawing number `row` as it is stored; a drawing of one colour has no main colour yet."""
        sprite = crop(Image.fromarray(self.drawings.pixels[row].transpose(1, 2, 0), "RGBA"))
        return Painted(sprite, *((None, []) if self.mono[row] else look(sprite)))

    def paint(self, rng, row: int) -> Painted:
        """Return drawing number `row`; a drawing of one colour gets a random fill."""
        painted = self.painted(row)
        if not self.mono[row]:
            return painted
        fill = rng.randrange(len(GROUNDS))
        colour, shade = GROUNDS[fill]
        sprite = Image.new("RGBA", painted.sprite.size, shade)
        sprite.putalpha(painted.sprite.getchannel("A"))
        return Painted(sprite, colour, hidden_by_grounds(fill))

    def redraw(self, rng, row: int) -> Painted:
        """Return drawing number `row` in changed colours; its main colour is not known.

        The background is chosen by the colours of the original, which is right in most cases.
        """
        painted = self.paint(rng, row)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        sprite = torch.from_numpy(self.drawings.pixels[row])[None]
        hand = Hand(1, SIDE, 1.0, generator)
        x = hand.recolour(sprite, torch.tensor(self.mono[row : row + 1]))
        x = (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        return Painted(crop(Image.fromarray(x, "RGBA")), None, painted.hidden)

    def compose(
        self, rng, style: str, pool: list[Concept], answers=None, redrawn: bool = False
    ) -> tuple[list[Thing], str, Image.Image]:
        """Return things in reading order with their boxes, the name of the background, and the picture.

        `redrawn` gives every thing other colours.
        """
        paint = self.redraw if redrawn else self.paint
        for _ in range(1000):
            things = pick_things(rng, pool)
            rows = {kind: rng.choice(self.rows[style][kind]) for kind in dict.fromkeys(things)}
            painted = [paint(rng, rows[kind]) for kind in things]
            ground, shade, hidden = choose_ground(rng, [p.hidden for p in painted])
            if hidden <= 1:
                break
        else:
            raise ValueError(f"No background fits all things in 1000 scenes of style {style}. Use more concepts.")
        waiting = {kind: [p for p, thing in zip(painted, things) if thing is kind] for kind in rows}
        placed = place(rng, things, answers)
        shown = [waiting[kind].pop() for kind, _ in placed]
        picture, boxes = draw_scene(rng, [p.sprite for p in shown], [position for _, position in placed], shade)
        found = [Thing(c, position, box, p.colour) for (c, position), box, p in zip(placed, boxes, shown)]
        return found, ground, picture
