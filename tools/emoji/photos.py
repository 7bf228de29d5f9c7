"""Build the test file of photographs, which shows how well a model that learned from drawings names real things.

The photographs come from Debian's gcompris-qt-data. Each of its resource files holds a README with author, licence and
source of every picture. Only pictures in the public domain, under CC0 or under CC-BY are used, and each row of the
file credits its picture.
"""

import io
import random
import re
import struct
import zlib
from pathlib import Path

import pyarrow as pa
from PIL import Image

from tools.emoji.concepts import LANGUAGES, Concept
from tools.emoji.questions import Row, ask, choice_row, options
from tools.emoji.rows import make_row
from tools.emoji.sources import download_debian

PACKAGE = ("gcompris-qt-data", "3.1-2", "usr/share/gcompris-qt/rcc")
SIDE = 224  # longer side of a photograph in the file, pixels
FREE = re.compile(r"Public domain|CC0-1\.0|CC-BY[- ][\d.]+", re.IGNORECASE)
PHOTOS = {  # resource file, folder in it -> picture -> concept
    ("explore_world_animals", "animals"): {
        "bison": "bison", "crocodile": "crocodile", "giraffe": "giraffe", "hedgehog": "hedgehog", "koala": "koala",
        "kangaroo": "kangaroo", "moose": "moose", "panda": "panda", "polar_bear": "polar-bear",
        "scarlet_macaw": "parrot",
    },
    ("explore_farm_animals", "animals"): {
        "cat": "cat", "chicken": "chicken", "cow": "cow", "dog": "dog", "duck": "duck", "horse": "horse", "owl": "owl",
        "pig": "pig", "sheep": "ewe",
    },
    ("erase", "resource"): {"bee": "honeybee", "crab": "crab", "giraffe": "giraffe", "kitten": "cat"},
    ("categorization", "tools"): {
        **{f"hammer{i}": "hammer" for i in range(1, 10)}, **{f"scissors{i}": "scissors" for i in range(1, 5)},
        **{f"screwDriver{i}": "screwdriver" for i in range(1, 4)}, "wrench": "wrench", "wrench1": "wrench",
    },
    ("categorization", "others"): {
        "baseball": "baseball", "bucket": "bucket", "bulb": "light-bulb", "chair": "chair", "pencil": "pencil",
        "spoons": "spoon", "volleyball": "volleyball",
    },
    ("categorization", "monuments"): {"statueOfLiberty": "statue-of-liberty"},
    ("categorization", "fishes"): {f"fish{i}": "fish" for i in (2, 4, 8, 12, 15, 16, 20, 21, 26)},
    ("explore_monuments", "usa"): {"statueofLiberty": "statue-of-liberty"},
    ("solar_system", "resource"): {"earth": "globe-showing-americas", "saturn": "ringed-planet"},
}  # fmt: skip


def read_resources(path: Path) -> dict[str, bytes]:
    """Return the files in a Qt resource file of format 1 to 3 as a mapping path -> content."""
    data = path.read_bytes()
    magic, version, tree, content, names = struct.unpack(">4sIIII", data[:20])
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError(f"{path} is no Qt resource file of format 1 to 3 (it starts with {magic!r}, {version}).")
    node = 14 if version == 1 else 22

    def walk(number: int, folder: str):
        start = tree + number * node
        name_at, flags = struct.unpack(">IH", data[start : start + 6])
        length = struct.unpack(">H", data[names + name_at : names + name_at + 2])[0]
        name = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be") if number else ""
        name = f"{folder}/{name}" if folder else name
        if flags & 2:  # a folder
            count, first = struct.unpack(">II", data[start + 6 : start + 14])
            for child in range(first, first + count):
                yield from walk(child, name)
            return
        at = content + struct.unpack(">I", data[start + 10 : start + 14])[0]
        raw = data[at + 4 : at + 4 + struct.unpack(">I", data[at : at + 4])[0]]
        if flags & 1:
            raw = zlib.decompress(raw[4:])
        elif flags & 4:
            raw = pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()
        yield name, raw

    return dict(walk(0, ""))


def read_credits(readme: str) -> dict[str, str]:
    """Return file -> "author; licence; source", read from the blocks of a README of this package."""
    found = {}
    for block in re.split(r"\n\s*\n", readme):
        fields, files, inside = {}, [], ""
        for line in block.splitlines():
            if match := re.match(r"(Copyright|License|Source|Comments?|Files):\s*(.*)", line):
                inside, text = match[1], match[2]
                fields[inside] = text
            elif inside == "Copyright":
                fields[inside] = f"{fields[inside]}, {line.strip().removeprefix('Copyright ')}".strip(", ")
            text = line.split(":", 1)[1] if line.startswith("Files:") else line
            if inside == "Files":
                files += re.findall(r"[\w/]+\.\w+", text)
        source = fields.get("Source") or fields.get("Comment", "").removeprefix("original source at ")
        for file in files:
            found[Path(file).name] = "; ".join((fields.get("Copyright", ""), fields.get("License", ""), source))
    return found


def load_photos(folder: Path) -> list[tuple[str, Image.Image, str]]:
    """Return (concept, picture, credit) of each photograph in `PHOTOS`, from the Debian package in `folder`."""
    resources = download_debian(folder, *PACKAGE)
    photos = []
    for (name, place), wanted in PHOTOS.items():
        files = read_resources(resources / f"{name}.rcc")
        root = min((path for path in files if f"/{place}/" in path), key=len).rsplit(f"/{place}/", 1)[0] + f"/{place}/"
        readme = files.get(f"{root}README") or files[f"{root.rsplit('/', 2)[0]}/README"]
        credits_of = read_credits(bytes(readme).decode("utf-8"))
        for file, slug in wanted.items():
            credit = credits_of[f"{file}.webp"]
            if not FREE.fullmatch(credit.split("; ")[1]):
                raise ValueError(f"{name}, {file}.webp has the licence {credit.split('; ')[1]!r}; allowed are public "
                                 "domain, CC0 and CC-BY. Remove it from PHOTOS.")  # fmt: skip
            picture = Image.open(io.BytesIO(bytes(files[f"{root}{file}.webp"]))).convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            picture.thumbnail((SIDE, SIDE), Image.LANCZOS)
            photos.append((slug, picture, credit))
    return photos


def photo_rows(photos: list, concepts: list[Concept], seed: int) -> list[dict]:
    """Return rows with two questions on each photograph in both languages.

    One question asks for the name, the other asks to choose one of four names of photographed things.
    """
    by_slug = {concept.slug: concept for concept in concepts}
    pool, rows = [by_slug[slug] for slug in dict.fromkeys(slug for slug, *_ in photos)], []
    for number, (slug, picture, credit) in enumerate(photos):
        rng, buffer = random.Random(f"{seed}/photos/{number}"), io.BytesIO()
        picture.save(buffer, "WEBP", quality=80, method=6)
        for language in LANGUAGES:
            concept = by_slug[slug]
            choice = choice_row(rng, language, True, concept, options(rng, concept, pool))
            name = Row("name", language, ask(rng, "name", language, True), concept.name(language))
            rows += [make_row(buffer.getvalue(), "photo", slug, row) | {"credit": credit} for row in (name, choice)]
    return rows
