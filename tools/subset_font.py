"""Rebuild the font of contact sheets: the characters that this project's texts need, of a font with Chinese in it.

    npm pack @expo-google-fonts/noto-sans-sc@0.4.3      # and unpack it
    python -m tools.subset_font package/400Regular/NotoSansSC_400Regular.ttf

Needs fonttools, which `pip install matplotlib` brings. The licence stands in minivlm/assets/OFL.txt.
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont
from pyarrow import parquet

from minivlm.cli import Parser
from minivlm.resources import FONT

ROOT = Path(__file__).resolve().parents[1]
# The OFL lets a changed font keep no Reserved Font Name, here "Source"; "Noto" is somebody's trademark.
FAMILY = "MiniVLM Sans"
NAMES = {1: FAMILY, 2: "Regular", 3: f"{FAMILY} Regular subset", 4: f"{FAMILY} Regular", 6: "MiniVLMSans-Regular"}
KEPT_NAMES = (0, 5, 9, 13, 14)  # copyright, version, designers, licence and its address
PRINTABLE = "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x100)]))
PUNCTUATION = "–—‘’“”…·•×→←✓、。〈〉《》「」『』【】〔〕〜！（），：；？～％＋－／＝￥"
TEXTS = ("conversations", "options", "concept")


def characters(data: Path) -> set[str]:
    """Printable Latin, common punctuation, and each character of a text in the parquet files of `data`."""
    found = set(PRINTABLE + PUNCTUATION)
    for file in sorted(data.glob("*.parquet")):
        names = [name for name in TEXTS if name in parquet.read_schema(file).names]  # drawings have no questions
        table = parquet.read_table(file, columns=names)
        for name in names:
            for value in table[name].unique().to_pylist() if name != "options" else table[name].to_pylist():
                found.update(*(value if isinstance(value, list) else [value or ""]))
    return found - {"\n", "\r", "\t"}


def subset_font(source: Path, wanted: set[str]) -> TTFont:
    """The font with the glyphs of `wanted` only, under a name of its own."""
    options = subset.Options(layout_features=["kern", "mark", "mkmk"], hinting=False, name_IDs=list(KEPT_NAMES))
    options.notdef_outline = True  # a box for what the font lacks, by which a contact sheet knows it
    font = subset.load_font(str(source), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=map(ord, wanted))
    subsetter.subset(font)
    for number, text in NAMES.items():
        font["name"].setName(text, number, 3, 1, 0x409)
    return font


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.subset_font")
    parser.add_argument("source", type=Path, help="A TrueType font with Chinese characters.")
    parser.add_argument("--output", type=Path, default=FONT, help="File of the small font.")
    args = parser.parse_args(argv)
    wanted = characters(ROOT / "data")
    font = subset_font(args.source, wanted)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    font.save(args.output)
    missing = "".join(sorted(wanted - set(map(chr, font.getBestCmap()))))
    size = args.output.stat().st_size
    print(f"{args.output}: {len(font.getBestCmap()):,} characters, {size:,} bytes; not in the source: {missing!r}")


if __name__ == "__main__":
    sys.exit(main())
