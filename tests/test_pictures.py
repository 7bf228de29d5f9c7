"""Pictures: whatever file a data set holds is decoded to the right shape or counted, and none stops the trainer."""

import io
import os
import random
import struct
import subprocess
import zlib
from collections import Counter

import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from helpers.data import ENCODER, PROCESSOR
from helpers.pictures import noise, resident, saved
from helpers.sources import tar
from minivlm.data.encoder import BadRow
from minivlm.data.pictures import MAX_PIXELS, PICTURE_FORMATS, PICTURE_SUFFIXES, decode_image
from minivlm.data.rows import Source, load_rows

FORMATS = {"PNG": "RGBA", "JPEG": "RGB", "WEBP": "RGB", "GIF": "P", "BMP": "RGB", "TIFF": "L"}
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims so many pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def fuzzed(rng) -> bytes:
    """A picture file with something wrong with it; sometimes nothing that a decoder minds."""
    kind = rng.choice(list(FORMATS))
    data = bytearray(saved(noise(rng, (rng.randint(1, 40), rng.randint(1, 40))).convert(FORMATS[kind]), kind))
    fault = rng.choice(["truncated", "flipped", "scrambled", "empty", "bomb", "foreign", "joined"])
    if fault == "truncated":
        data = data[: rng.randrange(len(data))]
    elif fault == "flipped":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif fault == "scrambled":
        start = rng.randrange(len(data))
        data[start : start + 50] = rng.randbytes(50)
    elif fault == "empty":
        data = bytearray(rng.randrange(3))
    elif fault == "bomb":
        data = bytearray(bomb(rng.randint(1, 1 << 31), rng.randint(1 << 12, 1 << 31)))
    elif fault == "foreign":
        data = bytearray(rng.choice([b"<svg/>", b"GIF89a", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n"]) + rng.randbytes(30))
    else:
        data = data + data
    return bytes(data)


def fuzz(count: int) -> Counter:
    rng, outcomes = random.Random(0), Counter()
    for _ in range(count):
        try:
            sample = ENCODER({"images": [fuzzed(rng)], "messages": MESSAGES})
        except BadRow as error:
            outcomes[str(error).split(":")[0]] += 1
            continue
        assert sample["pixel_values"].shape == (1, 3, 32, 32) and sample["pixel_values"].isfinite().all()
        assert sample["input_ids"].tolist().count(PROCESSOR.image_token_id) == 4
        outcomes["decoded"] += 1
    return outcomes


def test_a_fuzzed_file_is_decoded_or_counted():
    outcomes = fuzz(500)
    assert set(outcomes) == {"decoded", "unreadable picture", "picture too large"} and outcomes.total() == 500
    assert min(outcomes.values()) > 10


@pytest.mark.slow
def test_ten_thousand_fuzzed_files_leak_no_memory():
    fuzz(1000)  # what Pillow's plug-ins and the allocator keep is there after this
    before = resident()
    outcomes = fuzz(10_000)
    grown = (resident() - before) / 2**20
    print(dict(outcomes), f"{grown:.1f} MiB more")
    assert outcomes.total() == 10_000 and grown < 50


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_460, 9_460), (1 << 30, 1 << 30)])
def test_a_bomb_is_refused_before_it_is_decoded(size):
    with pytest.raises(BadRow, match="picture too large: .* more than 89,478,485"):
        decode_image(bomb(*size))


def test_the_largest_picture_is_read():
    side = int(MAX_PIXELS**0.5)
    assert decode_image(saved(Image.new("1", (side, side)), "PNG")).size == (side, side)


def test_a_picture_with_a_book_in_its_metadata_is_read():
    info = PngImagePlugin.PngInfo()
    info.add_text("story", "once upon a time " * 300_000, zip=True)
    assert decode_image(saved(Image.new("RGB", (3, 2), "red"), "PNG", pnginfo=info)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (4, 2), "white")
    image = Image.new(mode, (4, 2), 65535) if mode == "I;16" else image.convert("L").convert(mode) if mode in (
        "LA", "I", "F") else image.convert(mode)  # fmt: skip
    got = decode_image(image)
    assert got.mode == "RGB" and got.size == (4, 2) and min(got.getpixel((0, 0))) >= 250


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode_image(data).getpixel((0, 0))
        assert red > 200 and blue < 50


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the picture is at the right
    assert decode_image(saved(image, "PNG", exif=exif)).getpixel((1, 0)) == (255, 255, 255)


def fits() -> bytes:
    """A FITS file of 2 x 2 bytes."""
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 2", "END"]
    return "".join(f"{card:80}" for card in cards).encode().ljust(2880) + bytes(2880)


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A file that exists once somebody has started Ghostscript, for which a script stands."""
    (tmp_path / "bin").mkdir()
    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{started}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


@pytest.mark.parametrize("kind", ["EPS", "FITS", "PPM"])
def test_other_formats_are_refused_and_ghostscript_is_not_started(kind, ghostscript, tmp_path):
    data = fits() if kind == "FITS" else saved(Image.new("RGB", (4, 4), "red"), kind)
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(data)
    for picture in (data, path):
        with pytest.raises(BadRow, match="^unreadable picture: it is no PNG, JPEG, WEBP, GIF, BMP, TIFF"):
            decode_image(picture)
    words = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
    with pytest.raises(BadRow, match="^unreadable picture: it is no PNG"):  # looked at, since it may be a placeholder
        Source(name="rows", root=tmp_path).sample({"conversations": words, "image_bytes": data})
    assert not ghostscript.exists()
    with Image.open(io.BytesIO(data)) as picture:  # Pillow by itself takes the file, and so would start it
        if kind == "EPS":
            with pytest.raises((OSError, subprocess.SubprocessError)):
                picture.load()
            assert ghostscript.exists()
        assert picture.format == kind


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_every_suffix_of_a_shard_is_of_a_format_that_is_read(suffix, tmp_path):
    Image.init()
    picture = Image.new("RGB", (16, 8), "red")
    options = {"save_all": True, "append_images": [picture]} if suffix == "mpo" else {}
    data = saved(picture, Image.EXTENSION[f".{suffix}"], **options)
    shard = tar(tmp_path / "a.tar", {f"0.{suffix}": data, "0.txt": b"a red field"})
    (image,) = load_rows([shard]).sample(0)["images"]
    assert image == data
    decoded = decode_image(image)
    red, green, blue = decoded.getpixel((8, 4))
    assert decoded.size == (16, 8) and red > 200 and max(green, blue) < 50


def test_the_formats_are_named_by_pillow():
    Image.init()
    assert set(PICTURE_FORMATS) <= set(Image.OPEN), "Image.open raises KeyError for a format that it lacks"
