"""Build the embedded data set of MiniVLM: emoji of six artists' sets, with questions and exact answers.

    python -m tools.emoji.prepare                          # the files of data/, byte for byte, in a few minutes
    python -m tools.emoji.prepare --report data            # row counts and majority floors of existing files

Training composes its own pictures from drawings.parquet and concepts.json (composer.py). train.parquet is a plain file
of fixed rows on the first five styles, for a first run and for other programs.

Artwork and names come from npm packages at pinned versions (`PACKAGES`); npm installs missing packages into
--packages. Each file depends on --seed, the packages, and the versions of resvg-py, Pillow (libwebp) and pyarrow.
"""

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from minivlm.cli import Parser, run_command
from tools.emoji.concepts import DEMO, LANGUAGES, Concept
from tools.emoji.drawings import Drawings, save_concept_table
from tools.emoji.grounding import grounding_rows
from tools.emoji.photos import load_photos, photo_rows
from tools.emoji.pictures import choose_ground, draw_scene, draw_single, encode, look
from tools.emoji.questions import TASKS, only_above, scene_rows, single_rows
from tools.emoji.rows import make_row, write
from tools.emoji.scenes import Album, plan_scene
from tools.emoji.sources import (
    DEV_STYLE,
    FIRST_STYLES,
    REQUIRED,
    STYLES,
    TEST_STYLE,
    TRAIN_STYLES,
    draw,
    find_packages,
    load_concepts,
    load_drawings,
)

HELD_OUT_SHARE = 0.15  # share of the concepts that stand in no training scene


def parse_args(argv=None) -> argparse.Namespace:
    """Return the options of the command line; a value outside its limits ends the program."""
    parser = Parser(__doc__, prog="python -m tools.emoji.prepare")
    add = parser.add_argument
    add("--output", type=Path, default=Path("data"), help="folder for the files of the data set (default: data)")
    add("--packages", type=Path, default=Path("runs/emoji-packages"), help="folder of the npm packages; "
        "npm installs missing packages at their pinned versions (default: runs/emoji-packages)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    add("--eval-scenes", type=int, default=300, help="number of scenes in test and in test_compositions; dev has half "
        "as many (default: 300)")  # fmt: skip
    add("--quality", type=int, default=70, help="WebP quality of the pictures, 1 to 100; drawings.parquet has its "
        "own (default: 70)")  # fmt: skip
    add("--report", type=Path, metavar="FOLDER", help="only print counts and majority floors of the files in FOLDER")
    args = parser.parse_args(argv)
    if not 1 <= args.quality <= 100:
        parser.error(f"--quality {args.quality} must be between 1 and 100.")
    if args.eval_scenes < 2:
        parser.error(f"--eval-scenes {args.eval_scenes} must be at least 2.")
    return args


def load_sprites(concepts: list[Concept], drawings: dict) -> list[tuple]:
    """Return (style, concept, sprite, main colour, how strongly each background hides it) of every drawing."""
    wanted = [(style, c, d) for style in STYLES for c in concepts for d in drawings[style].get(c.hexcode, ())]
    sprites = []
    for style, concept, drawing in tqdm(wanted, desc="sprites"):
        if (sprite := draw(drawing)) is not None:
            sprites.append((style, concept, sprite, *look(sprite)))
    return sprites


def first_sprites(sprites: list[tuple]) -> dict[str, dict[Concept, tuple]]:
    """Return style -> concept -> (sprite, main colour, how strongly each background hides it).

    Where a style has several drawings of a concept, the first one is taken.
    """
    found = {style: {} for style in STYLES}
    for style, concept, *sprite in sprites:
        found[style].setdefault(concept, tuple(sprite))
    return found


def wanted_singles(rng, index: int, split: str) -> list[tuple]:
    """Return triples (task, language, canonical): the questions to ask about one picture of one thing."""
    if split == "demo_test":  # few pictures, so each is asked about in both languages
        return [(task, language, True) for task in ("name", "choice", "yes_no", "category") for language in LANGUAGES]
    if split in ("train", "demo_train"):
        both = [(task, language, False) for task in ("name", "choice", "yes_no") for language in LANGUAGES]
        return both + [(task, rng.choice(LANGUAGES), False) for task in ("caption", "category", "colour")]
    first, second = LANGUAGES[index // 2 % 2], LANGUAGES[(index // 2 + 1) % 2]
    wanted = [("name", first), ("choice", second), ("yes_no", first), ("category", second), ("colour", first)]
    if index % 4 == 0:  # rare, because a caption takes as long as ten short answers
        wanted.append(("caption", LANGUAGES[index // 4 % 2]))
    return [(task, language, True) for task, language in wanted]


def build_singles(split: str, styles: tuple, sprites: dict, args) -> list[dict]:
    """Return rows on pictures of one thing, one picture for each style and concept."""
    pictures = [(style, concept) for style in styles for concept in sprites[style]]
    random.Random(f"{args.seed}/{split}/order").shuffle(pictures)
    pools = {style: list(sprites[style]) for style in styles}
    rows = []
    for index, (style, concept) in enumerate(tqdm(pictures, desc=f"{split} singles")):
        rng = random.Random(f"{args.seed}/{split}/{style}/{concept.hexcode}")
        sprite, main, hidden = sprites[style][concept]
        ground, shade, _ = choose_ground(rng, [hidden])
        picture = encode(draw_single(rng, sprite, shade), args.quality)
        asked = single_rows(rng, index, concept, main, ground, pools[style], wanted_singles(rng, index, split))
        rows += [make_row(picture, style, concept.slug, row) for row in asked]
    return rows


def build_scenes(split: str, styles: tuple, sprites: dict, pool: list[Concept], number: int, args) -> list[dict]:
    """Return rows of an evaluation file on `number` scenes, whose things are concepts of `pool`."""
    order = list(range(number))  # even or odd decides yes or no, so it must not depend on the style
    random.Random(f"{args.seed}/{split}/order").shuffle(order)
    rows = []
    for index, turn in enumerate(tqdm(order, desc=f"{split} scenes")):
        style = styles[turn % len(styles)]
        rng = random.Random(f"{args.seed}/{split}/scene/{turn}")
        found = [concept for concept in pool if concept in sprites[style]]
        things, ground, shade = plan_scene(rng, found, sprites[style], sideways=turn % 2 == 0)
        shown = [sprites[style][concept][0] for concept, _ in things]
        drawn, _ = draw_scene(rng, shown, [position for _, position in things], shade)
        picture, slugs = encode(drawn, args.quality), ",".join(concept.slug for concept, _ in things)
        asked = scene_rows(rng, index, things, ground, found, canonical=True, repeats=1)
        rows += [make_row(picture, style, slugs, row) for row in asked]
    return rows


def build_grounding(split: str, style: str, album: Album, number: int, args) -> list[dict]:
    """Return rows on scenes of one style, with the questions of `GROUNDING_TASKS` in their canonical form."""
    rows = []
    for index in tqdm(range(number), desc=f"{split} scenes"):
        rng = random.Random(f"{args.seed}/{split}/scene/{index}")
        things, _, picture = album.compose(rng, style, list(album.rows[style]), only_above if index % 2 else None)
        data, slugs = encode(picture, args.quality), ",".join(thing.concept.slug for thing in things)
        asked = grounding_rows(rng, index, things, canonical=True)
        rows += [make_row(data, style, slugs, row, with_box=True) for row in asked]
    return rows


def build(args) -> None:
    """Build every file of the data set and write it to `args.output`."""
    modules = find_packages(args.packages)
    concepts = load_concepts(modules)
    drawings = load_drawings(modules, concepts)
    concepts = [c for c in concepts if all(c.hexcode in drawings[style] for style in REQUIRED)]
    found = load_sprites(concepts, drawings)
    sprites = first_sprites(found)
    held_out = set(random.Random(f"{args.seed}/held out").sample(concepts, round(len(concepts) * HELD_OUT_SHARE)))
    unseen = [c for c in concepts if c in held_out]
    args.output.mkdir(parents=True, exist_ok=True)
    save_concept_table(args.output / "concepts.json", concepts, held_out)
    everything = Drawings.gather((style, concept, sprite) for style, concept, sprite, *_ in found)
    everything.of(TRAIN_STYLES).pack(args.output / "drawings.parquet")
    album = Album(everything, concepts)
    number = args.eval_scenes
    if missing := DEMO - {concept.slug for concept in concepts}:
        names = ", ".join(sorted(missing)[:5])
        raise ValueError(f"DEMO names {len(missing)} things that the packages lack: {names}. Remove them from DEMO.")
    famous = {style: {c: sprite for c, sprite in found.items() if c.slug in DEMO} for style, found in sprites.items()}
    files = {
        "train": lambda: build_singles("train", FIRST_STYLES, sprites, args),
        "dev": lambda: (
            build_singles("dev", (DEV_STYLE,), sprites, args)
            + build_scenes("dev", (DEV_STYLE,), sprites, concepts, number // 2, args)
        ),
        "test": lambda: (
            build_singles("test", (TEST_STYLE,), sprites, args)
            + build_scenes("test", (TEST_STYLE,), sprites, concepts, number, args)
        ),
        "test_compositions": lambda: build_scenes("test_compositions", FIRST_STYLES, sprites, unseen, number, args),
        "demo_train": lambda: build_singles("demo_train", FIRST_STYLES, famous, args),
        "demo_test": lambda: build_singles("demo_test", (TEST_STYLE,), famous, args),
        "dev_grounding": lambda: build_grounding("dev_grounding", DEV_STYLE, album, number // 2, args),
        "test_photos": lambda: photo_rows(load_photos(args.packages), concepts, args.seed),
        "test_grounding": lambda: build_grounding("test_grounding", TEST_STYLE, album, number, args),
    }
    for name, make in files.items():
        write(make(), args.output / f"{name}.parquet", args.seed, shuffle="train" not in name)


def report(folder: Path) -> None:
    """Print size, pictures, and rows and majority floor per task of each file, as Markdown.

    The majority floor is the accuracy of always giving the most common answer of each language.
    """
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        if "task" not in table.column_names:
            print(f"\n{path.name}: {path.stat().st_size / 1e6:.2f} MB, {table.num_rows} drawings")
            continue
        pictures = len(set(table["image_bytes"].to_pylist()))
        print(f"\n{path.name}: {path.stat().st_size / 1e6:.2f} MB, {pictures} pictures, {table.num_rows} rows")
        answers = defaultdict(Counter)
        for task, language, text in zip(*(table[name].to_pylist() for name in ("task", "language", "conversations"))):
            answers[task][language, json.loads(text)[1]["content"]] += 1
        print("| task | rows | majority floor |\n|---|---|---|")
        for task in TASKS:
            if counts := answers[task]:
                best = {k: max(n for (language, _), n in counts.items() if language == k) for k, _ in counts}
                print(f"| {task} | {counts.total()} | {100 * sum(best.values()) / counts.total():.1f} % |")


def main(argv=None) -> None:
    """Build the files, unless --report is given, and print the report."""
    args = parse_args(argv)
    if args.report is None:
        build(args)
    report(args.report or args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
