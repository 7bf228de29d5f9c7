"""Draw every concept in every style into one array, so that training starts within seconds.

    python -m tools.emoji.drawings --packages runs/emoji-packages --output runs/drawings.npz

`Drawings.pixels` is (N, 4, 96, 96) uint8, RGBA. Each drawing is cropped to its opaque part, scaled to a longer side of
96 pixels and centred. The file drawings.parquet of the data set holds the training styles as WebP with alpha.
"""

import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from minivlm.cli import Parser, run_command
from tools.emoji.concepts import Concept
from tools.emoji.sources import REQUIRED, STYLES, draw, find_packages, load_concepts, load_drawings

SIDE = 96


@dataclass
class Drawings:
    """Hold N drawings: the pixels, the style and the concept of each."""

    pixels: np.ndarray  # (N, 4, 96, 96) uint8
    styles: np.ndarray  # (N,) names
    concepts: np.ndarray  # (N,) slugs

    @property
    def mono(self) -> np.ndarray:
        """Return (N,) bool, True for a drawing of one colour that may be replaced by any other."""
        return np.array([STYLES[style].mono for style in self.styles])

    def of(self, styles) -> "Drawings":
        """Return the drawings of the given styles."""
        keep = np.isin(self.styles, list(styles))
        return Drawings(self.pixels[keep], self.styles[keep], self.concepts[keep])

    def save(self, path: Path) -> None:
        """Write the drawings to an .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, pixels=self.pixels, styles=self.styles, concepts=self.concepts)

    @staticmethod
    def load(path: Path) -> "Drawings":
        """Read drawings from an .npz or .parquet file."""
        if path.suffix == ".parquet":
            return Drawings.unpack(path)
        with np.load(path) as found:
            return Drawings(found["pixels"], found["styles"], found["concepts"])

    def pack(self, path: Path, quality: int = 52) -> None:
        """Write a parquet file with one row per drawing; its picture is WebP with alpha.

        `processing_minivlm.to_rgb` shows such a picture on white.
        """
        pictures = []
        for pixels in tqdm(self.pixels, desc=path.name):
            buffer = io.BytesIO()
            picture = Image.fromarray(pixels.transpose(1, 2, 0), "RGBA")
            # The alpha channel takes half of the bytes, and 11 levels are enough for an edge.
            picture.save(buffer, "WEBP", quality=quality, alpha_quality=45, method=6)
            pictures.append(buffer.getvalue())
        columns = {"image_bytes": pictures, "style": self.styles, "concept": self.concepts, "mono": self.mono}
        pq.write_table(pa.table(columns), path, compression="zstd", compression_level=15, use_dictionary=["style"])

    @staticmethod
    def unpack(path: Path, slugs=None) -> "Drawings":
        """Read the drawings of a parquet file that `pack` wrote; with `slugs` only those of these concepts."""
        table = pq.read_table(path)
        if slugs is not None:
            table = table.filter(pa.compute.is_in(table["concept"], pa.array(sorted(slugs))))
        pictures = (Image.open(io.BytesIO(data)).convert("RGBA") for data in table["image_bytes"].to_pylist())
        pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])
        return Drawings(pixels, *(table[name].to_numpy(zero_copy_only=False) for name in ("style", "concept")))

    @staticmethod
    def gather(found) -> "Drawings":
        """Return drawings made of triples (style, concept, sprite)."""
        styles, concepts, sprites = zip(*found)
        pixels = np.stack([centred(sprite) for sprite in sprites])
        return Drawings(pixels, np.array(styles), np.array([concept.slug for concept in concepts]))


def centred(sprite: Image.Image, side: int = SIDE) -> np.ndarray:
    """Scale a sprite to a longer side of `side`, centre it on a transparent square, return (4, side, side)."""
    scale = side / max(sprite.size)
    # Resize with premultiplied alpha, or the colour of transparent pixels bleeds into the edge.
    sprite = sprite.convert("RGBa").resize([max(1, round(n * scale)) for n in sprite.size], Image.LANCZOS)
    sprite = sprite.convert("RGBA")
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)


def collect(packages: Path) -> Drawings:
    """Draw the concepts of the data set in every style that the packages hold, and return the drawings."""
    modules = find_packages(packages)
    concepts = load_concepts(modules)
    drawings = load_drawings(modules, concepts)
    concepts = [c for c in concepts if all(c.hexcode in drawings[style] for style in REQUIRED)]
    wanted = [(style, c, d) for style in STYLES for c in concepts for d in drawings[style].get(c.hexcode, ())]
    drawn = ((style, concept, draw(drawing)) for style, concept, drawing in tqdm(wanted, desc="drawings"))
    return Drawings.gather(row for row in drawn if row[2] is not None)


def save_concept_table(path: Path, concepts: list[Concept], held_out: set[Concept]) -> None:
    """Write the concepts to a JSON file: slug, names in both languages and category.

    `held_out` tells whether the concept is kept out of the training scenes.
    """
    table = [asdict(concept) | {"held_out": concept in held_out} for concept in concepts]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load_concept_table(path: Path) -> tuple[list[Concept], set[Concept]]:
    """Return all concepts of the file, and the set of those that no training scene shows or names."""
    table = json.loads(path.read_text(encoding="utf-8"))
    held_out = [row.pop("held_out") for row in table]
    concepts = [Concept(**row) for row in table]
    return concepts, {concept for concept, held in zip(concepts, held_out) if held}


def main(argv=None) -> None:
    """Draw everything, write the file, and print the number of concepts and drawings of each style."""
    parser = Parser(__doc__, prog="python -m tools.emoji.drawings")
    add = parser.add_argument
    add("--packages", type=Path, default=Path("runs/emoji-packages"), help="folder of the npm packages")
    add("--output", type=Path, default=Path("runs/drawings.npz"), help=".npz file to write")
    args = parser.parse_args(argv)
    drawings = collect(args.packages)
    drawings.save(args.output)
    for style in STYLES:
        found = drawings.of([style])
        print(f"{style:15} {len(set(found.concepts)):6,} concepts {len(found.styles):6,} drawings")


if __name__ == "__main__":
    sys.exit(run_command(main))
