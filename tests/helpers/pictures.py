"""Draw random pictures, write them in any format, and measure the memory that reading them takes."""

import io

from PIL import Image


def saved(image, kind, **options) -> bytes:
    """Return the picture as a file of the format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(rng, size) -> Image.Image:
    """Return an RGB picture of random bytes; `size` is (width, height)."""
    return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))


def resident() -> int:
    """Return the resident memory of this process in bytes, as Linux counts it."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
