"""Compose pictures and questions during training; each picture depends only on seed, epoch and index.

    accelerate launch train_accelerate.py --data compose:tools.emoji.composer ...
    python -m tools.emoji.composer --pictures 20000 --epoch 0 --output runs/composed-0.parquet

The composer keeps no state, so a resumed run sees the same pictures as an uninterrupted one, and two workers never
draw the same picture. The drawings and concepts are those of data/.
"""

import random
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from minivlm.cli import Parser, run_command
from minivlm.data.phrases import Phrase
from tools.emoji.augment import compose
from tools.emoji.concepts import LANGUAGES, Concept
from tools.emoji.drawings import Drawings, load_concept_table
from tools.emoji.grounding import grounding_rows
from tools.emoji.pictures import SIZE, choose_ground, draw_single, encode
from tools.emoji.questions import Row, choice_row, only_above, only_left, options, scene_rows, single_rows
from tools.emoji.rows import make_row, write
from tools.emoji.scenes import Album, Thing
from tools.emoji.sources import TRAIN_STYLES

DATA = Path("data")
PICTURES = 20_000  # of an epoch; a number without meaning, since no picture comes twice
SINGLES = (0.7, 0.45)  # share of pictures that show one thing, in the first epoch and later: names are learned first
REDRAWN = 0.5  # share of pictures whose things have other colours, so that shapes must be learned
# Share of the questions about scenes that are asked: these are learned quickly, or their answers are long.
ASKED = {"caption": 0.3, "count": 0.2, "background": 0.2, "count_kind": 0.6}
PLACES = ("where", "point", "box")  # these ask for the place of what they name
NEIGHBOURS = ("left_of", "above")  # and these for what stands beside it
ALONE = (1, 0, 0)  # the cell of the only thing in a picture: (rows of the grid, row, column)
WHOLE = (0, 0, SIZE, SIZE)  # its box


class Composed(NamedTuple):
    """Hold a picture with what it shows and the questions about it."""

    picture: Image.Image
    style: str
    things: list[Thing]
    rows: list[Row]

    @property
    def slugs(self) -> str:
        """Return the slugs of the things, as the column `concept` has them."""
        return ",".join(thing.concept.slug for thing in self.things)

    @property
    def places(self) -> dict[Concept, list[tuple[float, float, float, float]]]:
        """Return the boxes of each concept, in shares of the picture."""
        places = {}
        for thing in self.things:
            places.setdefault(thing.concept, []).append(tuple(value / SIZE for value in thing.box))
        return places


def phrases(row: Row, places: dict) -> list[Phrase]:
    """Return what the question of a row names, and where its answer is; it depends on all but the wrong options."""
    named = [(concept.name(row.language), places.get(concept, [])) for concept in row.about]
    found = [Phrase(name, boxes, row.options is None or name == row.answer) for name, boxes in named]
    if row.task in PLACES:
        found.append(Phrase(None, named[0][1]))
    elif row.task in NEIGHBOURS:
        found += [Phrase(None, boxes) for concept, boxes in places.items() if concept.name(row.language) == row.answer]
    return found


class Composer:
    """Compose the training pictures of a seed, in all styles equally often."""

    singles, redrawn_share, names = SINGLES, REDRAWN, 1  # names: questions for the name of one thing, in each language
    first: tuple[str, ...] = ()  # tasks that are asked before others, of which some find no place

    def __init__(self, drawings: Drawings, concepts: list[Concept], held_out: set[Concept], seed: int):
        self.album, self.seed = Album(drawings, concepts), seed
        self.styles = [style for style in TRAIN_STYLES if style in self.album.rows]
        self.pools = {style: list(found) for style, found in self.album.rows.items()}
        # The test of new compositions uses things that no training scene shows or names.
        self.scene_pools = {style: [c for c in pool if c not in held_out] for style, pool in self.pools.items()}

    @classmethod
    def open(cls, seed: int) -> "Composer":
        """Return the composer of a seed, of the embedded drawings."""
        concepts, held_out = load_concept_table(DATA / "concepts.json")
        return cls(Drawings.unpack(DATA / "drawings.parquet"), concepts, held_out, seed)

    def __len__(self) -> int:
        return PICTURES

    def compose(self, epoch: int, index: int) -> list[dict]:
        """Return the samples about a picture in the order in which they should be used."""
        found = self.rows(epoch, index)
        picture, places = found.picture, found.places
        return [
            {"images": [picture], "phrases": phrases(row, places), "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]}
            for row, answer in zip(found.rows, self.answers(found, epoch, index), strict=True)
        ]  # fmt: skip

    def answers(self, found: Composed, epoch: int, index: int) -> list[str]:
        """Return the answer that training uses for each question: the right one."""
        return [row.answer for row in found.rows]

    def rows(self, epoch: int, index: int) -> Composed:
        """Return a picture with its questions."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        style = rng.choice(self.styles)
        redrawn = rng.random() < self.redrawn_share
        if rng.random() < self.singles[min(epoch, len(self.singles) - 1)]:
            return self.single(rng, index, style, redrawn)
        return self.scene(rng, index, style, redrawn)

    def single(self, rng, index: int, style: str, redrawn: bool = False) -> Composed:
        """Return what `rows` returns, for a picture of one thing; its names in both languages come before `first`."""
        pool = self.pools[style]
        concept = rng.choice(pool)
        drawing = rng.choice(self.album.rows[style][concept])
        names = [("name", language, False) for language in LANGUAGES] * self.names
        wanted = [(task, language, False) for task in ("choice", "category", "yes_no") for language in LANGUAGES]
        once = () if redrawn else ("colour", "background", "caption")
        wanted += [(task, rng.choice(LANGUAGES), False) for task in once]
        rng.shuffle(wanted)
        wanted.sort(key=lambda question: question[0] not in self.first)
        colour = ground = None
        if redrawn:
            picture = self.redrawn(rng, drawing)
        else:
            painted = self.album.paint(rng, drawing)
            ground, shade, _ = choose_ground(rng, [painted.hidden])
            picture, colour = draw_single(rng, painted.sprite, shade), painted.colour
        asked = single_rows(rng, index, concept, colour, ground, pool, names + wanted)
        return Composed(picture, style, [Thing(concept, ALONE, WHOLE, colour)], asked)

    def redrawn(self, rng, drawing: int) -> Image.Image:
        """Return a picture of a drawing that is changed as strongly as those from which the tower learned."""
        generator, drawings = torch.Generator().manual_seed(rng.getrandbits(62)), self.album.drawings
        pixels, mono = torch.from_numpy(drawings.pixels[drawing])[None], torch.tensor(drawings.mono[drawing])[None]
        cell = torch.zeros(1, 1, dtype=torch.long)
        x, _ = compose(pixels, mono, cell, 1, SIZE, 1.0, generator)
        return Image.fromarray((x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

    def scene(self, rng, index: int, style: str, redrawn: bool = False) -> Composed:
        """Return what `rows` returns, for a scene; those of `first` come first, then the others in random order."""
        pool = self.scene_pools[style]
        answers = rng.choice((None, only_left, only_above))
        things, ground, picture = self.album.compose(rng, style, pool, answers, redrawn)
        pairs = [(thing.concept, thing.position) for thing in things]
        rows = scene_rows(rng, index, pairs, ground, pool, canonical=False, repeats=3)
        rows += [row for turn in (0, 1) for row in grounding_rows(rng, index + turn, things, canonical=False)]
        rows += self.choices(rng, things, pool)
        rows = [row for row in rows if rng.random() < ASKED.get(row.task, 1)]
        rng.shuffle(rows)
        rows.sort(key=lambda row: row.task not in self.first)
        return Composed(picture, style, things, rows)

    def choices(self, rng, things: list[Thing], pool: list[Concept]) -> list[Row]:
        """Return the question which of four things a scene shows, in both languages.

        What a picture of one thing shows is known without the options. Here only one of the things is offered.
        """
        kinds, rows = list(dict.fromkeys(thing.concept for thing in things)), []
        for language in LANGUAGES:
            answer = rng.choice(kinds)
            rows.append(choice_row(rng, language, False, answer, options(rng, answer, pool, kinds)))
        return rows


open_composer = Composer.open


def main(argv=None) -> None:
    """Compose the pictures of one epoch and write their rows to a file."""
    parser = Parser(__doc__, prog="python -m tools.emoji.composer")
    add = parser.add_argument
    add("--pictures", type=int, default=PICTURES, help=f"pictures to compose (default: {PICTURES})")
    add("--epoch", type=int, default=0, help="number of the epoch (default: 0)")
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    add("--output", type=Path, required=True, help="parquet file to write")
    args = parser.parse_args(argv)
    composer, rows = open_composer(args.seed), []
    for index in tqdm(range(args.pictures), desc="pictures"):
        found = composer.rows(args.epoch, index)
        data = encode(found.picture, 70)
        rows += [make_row(data, found.style, found.slugs, row, with_box=True) for row in found.rows]
    write(rows, args.output, args.seed, shuffle=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
