"""Build the embedded data set of MiniVLM: emoji of six artists' sets, with questions and exact answers.

    python -m tools.emoji.prepare                          # the files of data/, byte for byte, in a few minutes
    python -m tools.emoji.prepare --scenes 20000 --output runs/more-scenes
    python -m tools.emoji.prepare --report data            # row counts and majority floors of existing files

Artwork and names come from npm packages at pinned versions (`PACKAGES`), which npm installs into --packages when they
are not there. Each file depends on --seed, the packages and the versions of resvg-py, Pillow (libwebp) and pyarrow.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tools.emoji.pictures import choose_ground, crop, draw_scene, draw_single, draw_svg, encode, look, open_sprite
from tools.emoji.questions import (
    CATEGORIES,
    LANGUAGES,
    TASKS,
    Concept,
    draw_other,
    only_left,
    scene_rows,
    single_rows,
)

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/twemoji": "1.2.5",
    "cldr-annotations-full": "48.2.0",
    "emojibase-data": "17.0.0",
}
ICON_SETS = {  # style -> package
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent": "@iconify-json/fluent-emoji",
    "fxemoji": "@iconify-json/fxemoji",
    "twemoji": "@iconify-json/twemoji",
}
TRAIN_STYLES = ("noto", "noto-v1", "fluent-flat", "fluent", "fluent-3d")  # Fluent's are one hand: all in train
DEV_STYLE, TEST_STYLE = "fxemoji", "twemoji"
DEMO = frozenset(  # things that the demo is about: well known, and unlike one another
    """
    ant bat bear bird butterfly cactus camel cat chicken cow crab cricket crocodile deer dog dolphin dove duck
    elephant fish frog goat gorilla honeybee horse koala lady-beetle leopard lion lizard monkey mouse mushroom
    octopus owl panda penguin pig rabbit rhinoceros rooster rose scorpion shark snail snake spider sunflower
    tiger tulip turtle whale wolf avocado banana bread burrito carrot cherries cookie croissant doughnut egg
    eggplant french-fries grapes hamburger hot-dog hot-pepper ice-cream lemon lollipop peach pear pineapple
    pizza popcorn strawberry taco tomato watermelon wine-glass airplane ambulance anchor automobile bicycle bus
    castle fire helicopter rainbow rocket sailboat snowman tractor
    """.split()
)
REQUIRED = ("noto", "fluent-flat", "twemoji")  # a concept missing in one of these families is left out
# noto-v1 draws these without their frame: a plain square, circle or triangle, which are other concepts.
MISDRAWN = {"stop-button", "record-button", "upwards-button", "downwards-button"}
HELD_OUT_SHARE = 0.15  # of the concepts stand in no training scene
COLUMNS = ("conversations", "image_bytes", "task", "language", "style", "concept", "options")
TYPES = {"image_bytes": pa.binary(), "options": pa.list_(pa.string())}  # the rest are strings


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("data"), help="folder for the five parquet files (default: data)")
    add("--packages", type=Path, default=Path("runs/emoji-packages"), help="folder whose node_modules holds the "
        "npm packages; npm installs the pinned versions if one is missing (default: runs/emoji-packages)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    add("--scenes", type=int, default=3000, help="training scenes, pictures (default: 3000)")
    add("--eval-scenes", type=int, default=300, help="scenes in test and in test_compositions, pictures; half as many "
        "in dev (default: 300)")  # fmt: skip
    add("--quality", type=int, default=70, help="WebP quality, 1 to 100 (default: 70)")
    add("--report", type=Path, metavar="FOLDER", help="build nothing; print counts and floors of the files in FOLDER")
    args = parser.parse_args(argv)
    if not 1 <= args.quality <= 100:
        parser.error(f"--quality {args.quality} is not in 1 to 100.")
    if min(args.scenes, args.eval_scenes) < 2:
        parser.error(f"--scenes {args.scenes} and --eval-scenes {args.eval_scenes} must be at least 2.")
    return args


def find_packages(folder: Path) -> Path:
    """The `node_modules` below `folder` with every package at its pinned version, installed by npm where missing."""
    modules = folder / "node_modules"
    if any(not (modules / name / "package.json").is_file() for name in PACKAGES):
        if shutil.which("npm") is None:
            raise SystemExit(
                f"{folder} lacks npm packages and `npm` is not on PATH: install Node.js or copy {modules}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
        command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", *wanted]
        if subprocess.run(command).returncode:
            raise SystemExit(f"npm could not install the packages into {folder}; its message stands above.")
    for name, version in PACKAGES.items():
        found = read_json(modules / name / "package.json")["version"]
        if found != version:
            raise SystemExit(f"{modules / name} is version {found}, {version} is pinned: remove it and start again.")
    return modules


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def bare(hexcode: str) -> str:
    """Lower case without the variation selector, the spelling in which the packages agree."""
    return hexcode.lower().replace("-fe0f", "")


def slugify(name: str) -> str:
    name = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", name.replace("'", "")).strip("-")


def clean_name(name: str, language: str) -> str:
    """CLDR's short name in lower case (English) with plain apostrophes, without inner quotation marks and colons."""
    name = re.sub("[“”]", "", name).replace("’", "'")
    if language == "zh":
        return re.sub(r"[:：]\s*", "", name)
    return re.sub(r"^keycap: ", "keycap ", name.lower()).replace("person: ", "person with ")


def load_concepts(modules: Path) -> list[Concept]:
    """Every emoji that CLDR names in both languages, less flags, clock faces, sequences of persons and bare sizes."""
    names = {}
    for language in LANGUAGES:
        cldr = read_json(modules / f"cldr-annotations-full/annotations/{language}/annotations.json")
        names[language] = cldr["annotations"]["annotations"]
    subgroups = read_json(modules / "emojibase-data/meta/groups.json")["subgroups"]
    concepts = []
    for entry in read_json(modules / "emojibase-data/en/data.json"):
        hexcode, group, emoji = bare(entry["hexcode"]), entry.get("group"), entry["emoji"].replace("\ufe0f", "")
        if group not in CATEGORIES or (group == 1 and "-200d-" in hexcode):
            continue
        found = [(names[k].get(emoji) or names[k].get(entry["emoji"]) or {}).get("tts") for k in LANGUAGES]
        if not all(found):
            continue
        en, zh = (clean_name(name[0], language) for name, language in zip(found, LANGUAGES))
        # "medium square": size tells it from its neighbours, and sprites are scaled to one size.
        if re.search(r"o'clock|-thirty|^(black|white) (medium|small)|^small (orange|blue)", en):
            continue
        concepts.append(Concept(hexcode, slugify(en), en, zh, group, subgroups[str(entry["subgroup"])]))
    return concepts


def load_drawings(modules: Path, concepts: list[Concept]) -> dict[str, dict[str, object]]:
    """style -> hexcode -> what to draw: (body, left, top, width, height) of an icon, or the path of a WebP file."""
    aliases = defaultdict(set)  # hexcode -> names that any set or standard gives it
    unicode_names = read_json(modules / "emojibase-data/meta/unicode-names.json")
    unicode_names = {bare(code): slugify(name) for code, name in unicode_names.items()}
    charts = {}
    for style in REQUIRED:
        chart = read_json(modules / ICON_SETS[style] / "chars.json")
        charts[style] = {bare(code): name for code, name in chart.items()}
    for concept in concepts:
        code = concept.hexcode
        aliases[code] = {chart[code] for chart in charts.values() if code in chart} | {concept.slug}
    assets = sorted((modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp"))
    drawings = {"fluent-3d": {bare(path.stem): path for path in assets}}
    for style, package in ICON_SETS.items():
        icons = read_json(modules / package / "icons.json")
        if style in charts:
            chart = charts[style]
        elif style == "fluent":  # the same names as the flat set
            chart = charts["fluent-flat"]
        elif style == "noto-v1":
            known = {**icons["icons"], **icons.get("aliases", {})}
            found = {code: sorted(names & known.keys() - MISDRAWN) for code, names in aliases.items()}
            chart = {code: max(names, key=len) for code, names in found.items() if names}
        else:
            chart = match_squashed(icons["icons"], aliases, unicode_names)
        drawings[style] = {code: icon for code, name in chart.items() if (icon := find_icon(icons, name)) is not None}
    return drawings


def match_squashed(names, aliases: dict[str, set], unicode_names: dict[str, str]) -> dict[str, str]:
    """hexcode -> name for sets whose names are written without hyphens; only one to one."""
    owners = defaultdict(set)
    for code, slugs in aliases.items():
        for slug in slugs | {unicode_names.get(code, "")}:
            owners[slug.replace("-", "")].add(code)
    found = defaultdict(list)
    for name in names:
        # fxemoji's "dog" is a face: the animal is "dogside".
        if len(owners.get(name, ())) == 1 and f"{name}side" not in names:
            found[min(owners[name])].append(name)
    return {code: names[0] for code, names in found.items() if len(names) == 1}


def find_icon(icons: dict, name: str) -> tuple | None:
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # of the Iconify format
    return icon["body"], *(icon.get(key, icons.get(key, default)) for key, default in defaults.items())


def load_sprites(concepts: list[Concept], drawings: dict) -> dict[str, dict[Concept, tuple]]:
    """style -> concept -> (sprite, main colour, how badly each background hides it)."""
    sprites = {style: {} for style in (*TRAIN_STYLES, DEV_STYLE, TEST_STYLE)}
    with tqdm(total=sum(c.hexcode in drawings[s] for s in sprites for c in concepts), desc="sprites") as bar:
        for style, found in sprites.items():
            for concept in concepts:
                if concept.hexcode not in drawings[style]:
                    continue
                drawing = drawings[style][concept.hexcode]
                sprite = crop(draw_svg(*drawing) if isinstance(drawing, tuple) else open_sprite(drawing))
                if sprite is not None:
                    found[concept] = (sprite, *look(sprite))
                bar.update()
    return sprites


def make_row(picture: bytes, style: str, concept: str, task, language, question, answer, options) -> dict:
    turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    values = (json.dumps(turns, ensure_ascii=False), picture, task, language, style, concept, options)
    return dict(zip(COLUMNS, values))


def wanted_singles(rng, index: int, split: str) -> list[tuple]:
    """(task, language, canonical) of the questions on one single picture."""
    if split == "demo_test":  # few pictures: each is asked about in both languages
        return [(task, language, True) for task in ("name", "choice", "yes_no", "category") for language in LANGUAGES]
    if split in ("train", "demo_train"):
        both = [(task, language, False) for task in ("name", "choice", "yes_no") for language in LANGUAGES]
        return both + [(task, rng.choice(LANGUAGES), False) for task in ("caption", "category", "colour")]
    first, second = LANGUAGES[index // 2 % 2], LANGUAGES[(index // 2 + 1) % 2]
    wanted = [("name", first), ("choice", second), ("yes_no", first), ("category", second), ("colour", first)]
    if index % 4 == 0:  # a long answer takes as long as ten short ones
        wanted.append(("caption", LANGUAGES[index // 4 % 2]))
    return [(task, language, True) for task, language in wanted]


def build_singles(split: str, styles: tuple, sprites: dict, args) -> list[dict]:
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
        rows += [make_row(picture, style, concept.slug, *row) for row in asked]
    return rows


def plan_scene(rng, pool: list[Concept], sprites: dict, sideways: bool) -> tuple[list, str, tuple]:
    """(concept, position) pairs in reading order, and a background on which all of them stand out.

    With `sideways`, layouts are drawn until one allows the question "what is to the left of", at most 40 times.
    """
    for _ in range(1000):
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
        ground, shade, hidden = choose_ground(rng, [sprites[kind][2] for kind in kinds])
        if hidden <= 1:
            break
    else:
        raise ValueError(f"1000 scenes of {len(pool)} concepts had no background on which all things stand out.")
    grid = 2 if number < 5 and rng.random() < 0.5 else 3
    cells = [(grid, row, column) for row in range(grid) for column in range(grid)]
    for _ in range(40 if sideways else 1):
        rng.shuffle(things)
        placed = list(zip(things, sorted(rng.sample(cells, number))))
        if any(only_left(placed, cell) for concept, cell in placed if things.count(concept) == 1):
            break
    return placed, ground, shade


def build_scenes(split: str, styles: tuple, sprites: dict, pool: list[Concept], number: int, args) -> list[dict]:
    train = split == "train_scenes"
    order = list(range(number))  # parity balances yes and no, and must not go with the style
    random.Random(f"{args.seed}/{split}/order").shuffle(order)
    rows = []
    for index, turn in enumerate(tqdm(order, desc=f"{split} scenes")):
        style = styles[turn % len(styles)]
        rng = random.Random(f"{args.seed}/{split}/scene/{turn}")
        found = [concept for concept in pool if concept in sprites[style]]
        things, ground, shade = plan_scene(rng, found, sprites[style], sideways=turn % 2 == 0)
        shown = [sprites[style][concept][0] for concept, _ in things]
        drawn = draw_scene(rng, shown, [position for _, position in things], shade)
        picture, slugs = encode(drawn, args.quality), ",".join(concept.slug for concept, _ in things)
        asked = scene_rows(rng, index, things, ground, found, canonical=not train, repeats=2 if train else 1)
        rows += [make_row(picture, style, slugs, *row) for row in asked]
    return rows


def write(rows: list[dict], path: Path, seed: int, shuffle: bool) -> None:
    """Write parquet in which a picture shared by rows of one group is stored once, in the group's dictionary."""
    if shuffle:  # a prefix is then a fair sample
        random.Random(f"{seed}/{path.name}").shuffle(rows)
    schema = pa.schema([(name, TYPES.get(name, pa.string())) for name in COLUMNS])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(
        table, path, compression="zstd", compression_level=15, use_dictionary=list(COLUMNS[1:-1]),
        dictionary_pagesize_limit=2**28, row_group_size=len(rows) if shuffle else 10_000,
    )  # fmt: skip


def build(args) -> None:
    modules = find_packages(args.packages)
    concepts = load_concepts(modules)
    drawings = load_drawings(modules, concepts)
    concepts = [c for c in concepts if all(c.hexcode in drawings[style] for style in REQUIRED)]
    sprites = load_sprites(concepts, drawings)
    held_out = set(random.Random(f"{args.seed}/held out").sample(concepts, round(len(concepts) * HELD_OUT_SHARE)))
    seen, unseen = [c for c in concepts if c not in held_out], [c for c in concepts if c in held_out]
    args.output.mkdir(parents=True, exist_ok=True)
    number = args.eval_scenes
    if missing := DEMO - {concept.slug for concept in concepts}:
        raise ValueError(f"DEMO names {len(missing)} things that the packages lack: {', '.join(sorted(missing)[:5])}.")
    famous = {style: {c: sprite for c, sprite in found.items() if c.slug in DEMO} for style, found in sprites.items()}
    files = {
        "train": lambda: build_singles("train", TRAIN_STYLES, sprites, args),
        "train_scenes": lambda: build_scenes("train_scenes", TRAIN_STYLES, sprites, seen, args.scenes, args),
        "dev": lambda: (
            build_singles("dev", (DEV_STYLE,), sprites, args)
            + build_scenes("dev", (DEV_STYLE,), sprites, concepts, number // 2, args)
        ),
        "test": lambda: (
            build_singles("test", (TEST_STYLE,), sprites, args)
            + build_scenes("test", (TEST_STYLE,), sprites, concepts, number, args)
        ),
        "test_compositions": lambda: build_scenes("test_compositions", TRAIN_STYLES, sprites, unseen, number, args),
        "demo_train": lambda: build_singles("demo_train", TRAIN_STYLES, famous, args),
        "demo_test": lambda: build_singles("demo_test", (TEST_STYLE,), famous, args),
    }
    for name, make in files.items():
        write(make(), args.output / f"{name}.parquet", args.seed, shuffle="train" not in name)


def report(folder: Path) -> None:
    """Print, as Markdown, size, pictures, rows per task and the accuracy of the commonest answer (per language)."""
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
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
    args = parse_args(argv)
    if args.report is None:
        build(args)
    report(args.report or args.output)


if __name__ == "__main__":
    main()
