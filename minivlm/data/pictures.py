"""Find, decode and change pictures: bytes, a data URL or a file name in, an RGB picture out."""

import base64
import io
import math
import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from minivlm.data.bad_rows import BadRow

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # or Pillow refuses pictures with long metadata
# Of the forty formats that Pillow knows these are read, each with its suffixes: EPS, for one, would start Ghostscript.
# Many phones' JPEGs open as MPO, which Pillow does not list: its JPEG reader recognises them.
PICTURE_FORMATS = {
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg", "mpo"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
} | ({"AVIF": ("avif",)} if features.check("avif") else {})
PICTURE_SUFFIXES = tuple(suffix for suffixes in PICTURE_FORMATS.values() for suffix in suffixes)
PICTURE_COLUMNS = ("images", "image", "file_name")  # of a row: where its pictures may stand
MAX_PIXELS = 89_478_485  # Pillow warns above it: a quarter of a gigabyte as RGB


def open_picture(data: bytes | Path) -> Image.Image:
    """Open a picture, or the file that a path names, without decoding it.

    Raises:
        BadRow: it is in none of `PICTURE_FORMATS`.
        OSError: it cannot be read.
    """
    try:
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=list(PICTURE_FORMATS))
    except UnidentifiedImageError as error:
        formats = ", ".join(PICTURE_FORMATS)
        raise BadRow(f"unreadable picture: it is no {formats} file. Convert it to one of these") from error


# The same function as in processing_minivlm.py, word for word (a test compares them): that file imports transformers,
# which takes seconds, and the Hub loads it alone, so it cannot import this one.
def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as a person sees it: EXIF orientation applied, first frame, transparency over white, RGB.

    16-bit greyscale keeps its high byte; Pillow's own conversion would clip it to white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # big-endian has no `point`
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def pictures_in(messages: list[dict]) -> list[bytes | Path | Image.Image]:
    """Return the pictures in messages of the chat format of transformers, in reading order, not decoded.

    Raises:
        ValueError: one is neither encoded bytes, a `Path`, nor a Pillow picture. A name would let who writes the
            messages read files; a URL would be fetched.
    """
    content = [message["content"] for message in messages if not isinstance(message["content"], str)]
    images = [part.get("image") for parts in content for part in parts if part["type"] != "text"]
    if strange := [image for image in images if not isinstance(image, bytes | Path | Image.Image)]:
        raise ValueError(f"not a picture: {type(strange[0]).__name__}. Give bytes, a Path or a Pillow picture.")
    return images


def decode_image(data: bytes | Path | Image.Image) -> Image.Image:
    """Decode one picture, or the file that a path names, to RGB, as a person would see it.

    Raises:
        BadRow: it is in none of `PICTURE_FORMATS`, cannot be decoded, or has more than `MAX_PIXELS`.
    """
    try:
        if isinstance(data, Image.Image):
            return to_rgb(data)
        with warnings.catch_warnings(), open_picture(data) as image:
            warnings.simplefilter("ignore")  # of damaged metadata, of palettes: once per picture, of no consequence
            if math.prod(image.size) > MAX_PIXELS:
                raise Image.DecompressionBombError("{:,} x {:,} pixels".format(*image.size))
            return to_rgb(image)
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow(f"picture too large: {error}, more than {MAX_PIXELS:,} pixels. Scale it down") from error
    except Exception as error:  # Pillow raises a dozen classes for a damaged file
        raise BadRow(f"unreadable picture: {type(error).__name__}: {error}") from error


def redraw(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture with another flat background and other colours, sometimes in greys.

    Each picture of the emoji data has a background of one colour. A classifier learns these backgrounds instead of the
    shapes. With this change a tower names several times as many pictures of a style that it has not been trained on.
    """
    pixels = np.asarray(image, dtype=np.float32)
    background = pixels[:1, :1]
    thing = ((np.abs(pixels - background).max(-1, keepdims=True) - 8) / 24).clip(0, 1)  # 8: noise of lossy pictures
    fresh = np.float32([255] * 3 if rng.random() < 0.3 else [rng.uniform(0, 255) for _ in range(3)])
    pixels = pixels + (fresh - background) * (1 - thing)
    mix = np.eye(3, dtype=np.float32) + np.float32([[rng.uniform(-0.12, 0.12) for _ in range(3)] for _ in range(3)])
    if rng.random() < 0.08:
        mix[:] = 1  # greys
    mix /= mix.sum(1, keepdims=True)
    gain, offset, gamma = rng.uniform(0.9, 1.1), rng.uniform(-16, 16), math.exp(rng.uniform(-0.25, 0.25))
    pixels = 255 * ((pixels @ mix.T * gain + offset).clip(0, 255) / 255) ** gamma
    return Image.fromarray(pixels.astype(np.uint8))


def augment(image: Image.Image, rng: random.Random, strong: bool = False) -> Image.Image:
    """Shift, scale, tilt and tint a picture a little; never mirror it, since questions ask for left and right.

    `strong` first replaces colours and background by `redraw`, then changes one and a half times as much.
    """
    if strong:
        image = redraw(image, rng)

    def spread(limit: float) -> float:
        return rng.uniform(-limit, limit) * (1.5 if strong else 1.0)

    width, height = image.size
    scale, aspect, shear, tilt = math.exp(0.07 + spread(0.17)), math.exp(spread(0.1)), spread(0.12), spread(0.12)
    a, b, d, e = scale * aspect, shear + tilt, -tilt, scale / aspect
    # The centre of the picture moves by at most a twelfth of its width, then the map is applied around it.
    x, y = width * (0.5 + spread(1 / 12)), height * (0.5 + spread(1 / 12))
    matrix = (a, b, x - a * width / 2 - b * height / 2, d, e, y - d * width / 2 - e * height / 2)
    image = image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0))
    )
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(1 + spread(0.25))
    return image


def locate(value, root: Path) -> bytes | Path | Image.Image:
    """Return what `decode_image` takes for a picture as a row gives it; a file must lie in the folder `root`.

    Args:
        value: encoded bytes, a Pillow picture, a data URL, the name of a file, or `{"bytes", "path"}` of `datasets`.

    Raises:
        BadRow: it is none of these, lies outside `root` or on the network, or is not there.
    """
    if isinstance(value, dict):  # the Image feature of `datasets`, not decoded
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes | Image.Image):
        return value
    if not isinstance(value, str):
        raise BadRow(f"not a picture: {type(value).__name__}. Use encoded bytes or the name of a file")
    if value.startswith("data:"):
        return from_data_url(value)
    if "://" in value:
        raise BadRow(f"picture on the network: {value[:200]} is not fetched. Download it and name the file")
    try:
        return inside(root, value)
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise BadRow(f"missing picture: {value[:200]!r}: {error}") from error


def inside(root: Path, name: str) -> Path:
    """Return the path of the file `name` in `root` or in its folder `images`.

    A name that leads out of `root` is refused: a downloaded data set must not read the rest of the disk.
    """
    if "\0" in name:
        raise BadRow(f"missing picture: {name[:200]!r} is no name of a file")
    home = root.resolve()
    for folder in (home, home / "images"):
        path = (folder / name).resolve()
        if not path.is_relative_to(home):
            raise BadRow(f"picture outside its folder: {name[:200]!r} leads out of {root}. Copy it into that folder")
        if path.is_file():
            return path
    raise BadRow(f"missing picture: {name[:200]!r} is neither in {root} nor in its folder images")


def to_data_url(picture: Image.Image) -> str:
    """Return a picture as a data URL of a PNG file, without loss."""
    picture.save(file := io.BytesIO(), "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def from_data_url(url: str) -> bytes:
    """Return the bytes inside a base64 data URL."""
    header, _, body = url.partition(",")
    if not header.endswith(";base64"):
        raise BadRow(f"picture in an unknown encoding: {header[:80]!r}. A data URL must be base64")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise BadRow(f"unreadable picture: data URL: {error}") from error
