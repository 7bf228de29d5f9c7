"""Compose pictures and questions during training; each picture depends only on seed, epoch and index.

    python -m tools.emoji.scenes --pictures 20000 --epoch 0 --output runs/composed-0.parquet

`Composer.rows(epoch, index)` returns the questions on one picture. It keeps no state, so a resumed run sees the same
pictures as an uninterrupted one, and two workers never draw the same picture.
"""

import random
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from minivlm.cli import Parser, run_command
from tools.emoji.concepts import LANGUAGES, Concept, draw_other
from tools.emoji.drawings import Drawings, load_concept_table
from tools.emoji.grounding import grounding_rows, only_above
from tools.emoji.pictures import (
    APART,
    GROUNDS,
    GROUNDS_LAB,
    OUTLINE_LIMIT,
    choose_ground,
    draw_scene,
    draw_single,
    encode,
    look,
    to_lab,
)
from tools.emoji.questions import only_left, scene_rows, single_rows
from tools.emoji.rows import make_row, write
from tools.emoji.sources import TRAIN_STYLES, crop

SINGLES = 0.5  # share of pictures that show one thing


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

    def compose(self, rng, style: str, pool: list[Concept], answers=None) -> tuple[list[Thing], str, Image.Image]:
        """Return things in reading order with their boxes, the name of the background, and the picture."""
        for _ in range(1000):
            things = pick_things(rng, pool)
            rows = {kind: rng.choice(self.rows[style][kind]) for kind in dict.fromkeys(things)}
            painted = [self.paint(rng, rows[kind]) for kind in things]
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


class Composer:
    """Compose the training pictures of a seed: half single things, half scenes, and all styles equally often."""

    def __init__(self, drawings: Drawings, concepts: list[Concept], held_out: set[Concept], seed: int):
        self.album, self.seed = Album(drawings, concepts), seed
        self.styles = [style for style in TRAIN_STYLES if style in self.album.rows]
        self.pools = {style: list(found) for style, found in self.album.rows.items()}
        # The test of new compositions uses things that no training scene shows or names.
        self.scene_pools = {style: [c for c in pool if c not in held_out] for style, pool in self.pools.items()}

    def rows(self, epoch: int, index: int) -> tuple[Image.Image, str, str, list[tuple]]:
        """Return the picture, style, concepts, and rows (task, language, question, answer, options, box)."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        style = rng.choice(self.styles)
        if rng.random() < SINGLES:
            return self.single(rng, index, style)
        return self.scene(rng, index, style)

    def single(self, rng, index: int, style: str):
        """Return what `rows` returns, for a picture of one thing."""
        pool = self.pools[style]
        concept = rng.choice(pool)
        painted = self.album.paint(rng, rng.choice(self.album.rows[style][concept]))
        ground, shade, _ = choose_ground(rng, [painted.hidden])
        wanted = [(task, language, False) for task in ("name", "choice", "yes_no") for language in LANGUAGES]
        wanted += [(task, rng.choice(LANGUAGES), False) for task in ("caption", "category", "colour")]
        asked = single_rows(rng, index, concept, painted.colour, ground, pool, wanted)
        rows = [(*row, None) for row in asked]
        return draw_single(rng, painted.sprite, shade), style, concept.slug, rows

    def scene(self, rng, index: int, style: str):
        """Return what `rows` returns, for a scene."""
        pool = self.scene_pools[style]
        things, ground, picture = self.album.compose(rng, style, pool, rng.choice((None, only_left, only_above)))
        pairs = [(thing.concept, thing.position) for thing in things]
        rows = [(*row, None) for row in scene_rows(rng, index, pairs, ground, pool, canonical=False, repeats=2)]
        rows += [(*row[:4], None, row[4]) for row in grounding_rows(rng, index, things, canonical=False)]
        return picture, style, ",".join(thing.concept.slug for thing in things), rows


def main(argv=None) -> None:
    """Compose the pictures of one epoch and write their rows to a file."""
    parser = Parser(__doc__, prog="python -m tools.emoji.scenes")
    add = parser.add_argument
    add("--drawings", type=Path, default=Path("data/drawings.parquet"), help="drawings.parquet of the data set")
    add("--concepts", type=Path, default=Path("data/concepts.json"), help="concepts.json of the data set")
    add("--pictures", type=int, default=20000, help="pictures to compose (default: 20000)")
    add("--epoch", type=int, default=0, help="number of the epoch (default: 0)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    add("--output", type=Path, required=True, help="parquet file to write")
    args = parser.parse_args(argv)
    concepts, held_out = load_concept_table(args.concepts)
    composer = Composer(Drawings.unpack(args.drawings), concepts, held_out, args.seed)
    rows = []
    for index in tqdm(range(args.pictures), desc="pictures"):
        picture, style, slugs, asked = composer.rows(args.epoch, index)
        data = encode(picture, 70)
        rows += [make_row(data, style, slugs, *row) for row in asked]
    write(rows, args.output, args.seed, shuffle=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
