"""Find artwork and names in packages of pinned versions, and match the drawings of each set to the concepts.

Drawings are matched by code point or by name, one to one. NOTICE holds the licences.
"""

import io
import json
import re
import shutil
import subprocess
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from tools.emoji.concepts import CATEGORIES, LANGUAGES, Concept

RASTER = 160  # side in pixels of a rasterised drawing, before it is cropped and scaled down
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/streamline-emojis": "1.2.4",
    "@expo-google-fonts/noto-emoji": "0.4.7",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/emojione-monotone": "1.2.1",
    "cldr-annotations-full": "48.2.0",
    "emojibase-data": "17.0.0",
}
SYMBOLA = ("fonts-symbola", "2.60-1.1", "usr/share/fonts/truetype/ancient-scripts/Symbola_hint.ttf")


class Style(NamedTuple):
    """Describe one style: where its drawings come from and how they are matched to concepts.

    `mono` is True for drawings of one colour that may be replaced by any other.
    """

    source: str
    # "codes" (the package has a chart), "names", "numbered" or "squashed" names, "files", "font", or the style whose
    # chart fits too
    match: str
    mono: bool = False


STYLES = {
    "noto": Style("@iconify-json/noto", "codes"),
    "noto-v1": Style("@iconify-json/noto-v1", "names"),
    "fluent-flat": Style("@iconify-json/fluent-emoji-flat", "codes"),
    "fluent": Style("@iconify-json/fluent-emoji", "fluent-flat"),  # the same names as the flat set
    "fluent-3d": Style("@lobehub/fluent-emoji-3d/assets", "files"),
    "emojione": Style("@iconify-json/emojione", "names"),
    "streamline": Style("@iconify-json/streamline-emojis", "numbered"),
    "noto-line": Style("@expo-google-fonts/noto-emoji/400Regular/NotoEmoji_400Regular.ttf", "font", mono=True),
    "fluent-solid": Style("@iconify-json/fluent-emoji-high-contrast", "codes", mono=True),
    "emojione-solid": Style("@iconify-json/emojione-monotone", "names", mono=True),
    "symbola": Style("Symbola_hint.ttf", "font", mono=True),
    "fxemoji": Style("@iconify-json/fxemoji", "squashed"),
    "twemoji": Style("@iconify-json/twemoji", "codes"),
}
DEV_STYLE, TEST_STYLE = "fxemoji", "twemoji"
TRAIN_STYLES = tuple(style for style in STYLES if style not in (DEV_STYLE, TEST_STYLE))
FIRST_STYLES = TRAIN_STYLES[:5]  # for the files with questions; all of Fluent's are by one artist: all in train
REQUIRED = ("noto", "fluent-flat", "twemoji")  # a concept that one of these styles lacks is left out
# noto-v1 draws these as a plain square, circle or triangle, which are other concepts.
MISDRAWN = {"stop-button", "record-button", "upwards-button", "downwards-button"}


def find_packages(folder: Path) -> Path:
    """Return the `node_modules` in `folder`; npm installs missing packages at their pinned versions."""
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
            raise SystemExit(f"npm could not install the packages into {folder}; see its message above.")
    for name, version in PACKAGES.items():
        found = read_json(modules / name / "package.json")["version"]
        if found != version:
            raise SystemExit(f"{modules / name} is version {found}, {version} is pinned: remove it and start again.")
    if not (modules / "Symbola_hint.ttf").is_file():
        shutil.copy(download_debian(folder, *SYMBOLA), modules)
    return modules


def download_debian(folder: Path, name: str, version: str, path: str) -> Path:
    """Download a Debian package and unpack it into `folder`, without installing it.

    Return where the file or folder `path` of the package lies.
    """
    folder = folder.resolve()
    if not (folder / name / path).exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise SystemExit(
                f"`apt-get` and `dpkg-deb` are not on PATH: unpack Debian's {name} {version} into {folder / name}."
            )
        package = f"{name}={version}"
        if subprocess.run(["apt-get", "download", package], cwd=folder).returncode:
            raise SystemExit(f"apt-get could not download {package} into {folder}; see its message above.")
        found = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", found.name, name], cwd=folder, check=True)
    return folder / name / path


def read_json(path: Path):
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def bare(hexcode: str) -> str:
    """Return code points in lower case without the variation selector.

    All packages agree on this spelling.
    """
    return hexcode.lower().replace("-fe0f", "")


def slugify(name: str) -> str:
    """Return a name as lower-case ASCII words with hyphens between them."""
    name = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", name.replace("'", "")).strip("-")


def clean_name(name: str, language: str) -> str:
    """Return CLDR's short name with plain apostrophes, without inner quotation marks and colons.

    An English name is in lower case.
    """
    name = re.sub("[“”]", "", name).replace("’", "'")
    if language == "zh":
        return re.sub(r"[:：]\s*", "", name)
    return re.sub(r"^keycap: ", "keycap ", name.lower()).replace("person: ", "person with ")


def load_concepts(modules: Path) -> list[Concept]:
    """Return every emoji that CLDR names in both languages.

    Flags, clock faces, sequences of persons, and things that differ only in size are left out.
    """
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
        # Sprites are scaled to one size, so a "medium square" could not be told from a small one.
        if re.search(r"o'clock|-thirty|^(black|white) (medium|small)|^small (orange|blue)", en):
            continue
        concepts.append(Concept(hexcode, slugify(en), en, zh, group, subgroups[str(entry["subgroup"])]))
    return concepts


def load_drawings(modules: Path, concepts: list[Concept]) -> dict[str, dict[str, list]]:
    """Return style -> hexcode -> list of drawings, mostly one.

    A drawing is the (body, left, top, width, height) of an SVG, or the path of a WebP file.
    """
    unicode_names = read_json(modules / "emojibase-data/meta/unicode-names.json")
    unicode_names = {bare(code): slugify(name) for code, name in unicode_names.items()}
    charts = {style: read_json(modules / STYLES[style].source / "chars.json") for style in REQUIRED}
    charts = {style: {bare(code): name for code, name in chart.items()} for style, chart in charts.items()}
    aliases = {  # hexcode -> all names that a set or a standard gives it
        c.hexcode: {chart[c.hexcode] for chart in charts.values() if c.hexcode in chart} | {c.slug} for c in concepts
    }
    drawings = {}
    for style, (source, match, _) in STYLES.items():
        if match == "files":
            drawings[style] = {bare(path.stem): [path] for path in sorted((modules / source).glob("*.webp"))}
            continue
        if match == "font":
            drawings[style] = {code: [drawing] for code, drawing in read_font(modules / source, aliases).items()}
            continue
        icons = read_json(modules / source / "icons.json")
        if match == "names":
            # noto-v1 uses old Unicode names for other things, and draws four buttons without their frame.
            bad = MISDRAWN if style == "noto-v1" else set()
            chart = match_names(icons, aliases, {} if bad else unicode_names, bad)
        elif match == "numbered":
            chart = match_numbered(icons["icons"], aliases, unicode_names)
        elif match == "squashed":
            chart = match_squashed(icons["icons"], aliases, unicode_names)
        else:
            chart = charts.get(style) or charts.get(match) or read_json(modules / source / "chars.json")
        found = {
            bare(code): [find_icon(icons, name) for name in ([names] if isinstance(names, str) else names)]
            for code, names in chart.items()
        }
        drawings[style] = {
            code: kept for code, icons in found.items() if (kept := [i for i in icons if i is not None])
        }
    return drawings


def match_names(icons: dict, aliases: dict[str, set], unicode_names: dict[str, str], bad: set) -> dict[str, str]:
    """Return hexcode -> the longest of its names that the set has, as a drawing or as an alias.

    Without such a name, its Unicode name is taken if the set has it. Names in `bad` are not used.
    """
    known = {**icons["icons"], **icons.get("aliases", {})}.keys() - bad
    found = {
        code: sorted(names & known) or sorted({unicode_names.get(code)} & known) for code, names in aliases.items()
    }
    return {code: max(names, key=len) for code, names in found.items() if names}


def match_numbered(names, aliases: dict[str, set], unicode_names: dict[str, str]) -> dict[str, list[str]]:
    """Return hexcode -> names, for a set that numbers several drawings of one thing ("dog-1", "dog-2").

    Only one-to-one matches are kept.
    """
    drawn, found = defaultdict(list), defaultdict(list)
    for name in names:
        drawn[re.sub(r"-\d$", "", name)].append(name)
    owners = defaultdict(set)
    for code, slugs in aliases.items():
        for slug in (slugs | {unicode_names.get(code)}) & drawn.keys():
            owners[slug].add(code)
    for slug, codes in owners.items():
        if len(codes) == 1:
            found[min(codes)].append(slug)
    return {code: drawn[slugs[0]] for code, slugs in found.items() if len(slugs) == 1}


def match_squashed(names, aliases: dict[str, set], unicode_names: dict[str, str]) -> dict[str, str]:
    """Return hexcode -> name, for a set that writes names without hyphens.

    Only one-to-one matches are kept.
    """
    owners = defaultdict(set)
    for code, slugs in aliases.items():
        for slug in slugs | {unicode_names.get(code, "")}:
            owners[slug.replace("-", "")].add(code)
    found = defaultdict(list)
    for name in names:
        # In fxemoji "dog" is a face and "dogside" is the animal.
        if len(owners.get(name, ())) == 1 and f"{name}side" not in names:
            found[min(owners[name])].append(name)
    return {code: names[0] for code, names in found.items() if len(names) == 1}


def find_icon(icons: dict, name: str) -> tuple | None:
    """Return (body, left, top, width, height) of an icon by its name or alias, or None."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # of the Iconify format
    return icon["body"], *(icon.get(key, icons.get(key, default)) for key, default in defaults.items())


def read_font(path: Path, codes) -> dict[str, tuple]:
    """Return hexcode -> glyph outline as an SVG, for those `codes` of one code point that the font draws."""
    from fontTools.pens.boundsPen import BoundsPen
    from fontTools.pens.svgPathPen import SVGPathPen
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    glyphs, names, drawings = font.getGlyphSet(), font.getBestCmap(), {}
    for code in codes:
        if "-" in code or (name := names.get(int(code, 16))) is None:
            continue
        bounds, outline = BoundsPen(glyphs), SVGPathPen(glyphs)
        glyphs[name].draw(bounds)
        if bounds.bounds is None:  # an empty glyph
            continue
        glyphs[name].draw(outline)
        left, bottom, right, top = bounds.bounds
        body = f'<path transform="scale(1 -1)" d="{outline.getCommands()}"/>'  # a font's y axis points up
        drawings[code] = (body, left, -top, right - left, top - bottom)
    return drawings


def draw_svg(body: str, left: float, top: float, width: float, height: float) -> Image.Image:
    """Return an icon of an Iconify set as an RGBA picture with a longer side of `RASTER`."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    scale = RASTER / max(width, height)
    import resvg_py  # only here, so that training on the drawings of data/ does not need it

    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=max(1, round(width * scale)),
        height=max(1, round(height * scale)),
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def open_sprite(path: Path) -> Image.Image:
    """Return an image file as an RGBA picture with a longer side of at most `RASTER`."""
    picture = Image.open(path).convert("RGBA")
    picture.thumbnail((RASTER, RASTER), Image.LANCZOS)
    return picture


def draw(drawing: tuple | Path) -> Image.Image | None:
    """Return a drawing as a picture cropped to its opaque part, or None if almost nothing is visible."""
    return crop(draw_svg(*drawing) if isinstance(drawing, tuple) else open_sprite(drawing))


def crop(picture: Image.Image) -> Image.Image | None:
    """Return the opaque part of a picture, or None if it is smaller than a fifth of `RASTER`."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < RASTER // 5:
        return None
    return picture.crop(box)
