"""Turn pictures into `pixel_values` as transformers' image processors on Pillow do, equal to the last bit."""

import numpy as np
from PIL import Image

# What these types do is said by their settings alone. Others cut tiles, pad, or resize by rules of their own.
TYPES = ("BitImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")


class Pixels:
    """Resize, crop, rescale and normalise pictures.

    Args:
        settings: the image processor's, as `processor_config.json` has them under `image_processor`.

    Raises:
        ValueError: the processor does something else than these four steps.
    """

    def __init__(self, settings: dict):
        kind = str(settings.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast")
        if kind not in TYPES:
            raise ValueError(
                f"The image processor is {kind}. --engine onnx knows {', '.join(TYPES)}: use the other one."
            )
        if settings.get("do_pad"):
            raise ValueError(
                f"The image processor {kind} pads pictures, which --engine onnx cannot: use the other one."
            )
        self.size = settings["size"] if settings.get("do_resize") else None
        self.resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
        self.crop = settings["crop_size"] if settings.get("do_center_crop") else None
        self.table = levels(settings)

    def __call__(self, pictures: list[Image.Image]) -> np.ndarray:
        """Return the pixel values (N, 3, H, W), float32, of RGB pictures.

        Raises:
            ValueError: the pictures have different sizes, since the processor only scales their shorter sides.
        """
        values = [self.one(picture) for picture in pictures]
        if len({value.shape for value in values}) > 1:
            sizes = ", ".join(f"{value.shape[2]} x {value.shape[1]}" for value in values)
            raise ValueError(
                f"The image processor makes pictures of different sizes: {sizes}. Give one, or equal ones."
            )
        return np.stack(values)

    def one(self, picture: Image.Image) -> np.ndarray:
        """Return the pixel values (3, H, W) of a picture."""
        if self.size:
            picture = picture.resize(resized(picture.size, self.size), self.resample)
        if self.crop:
            width, height = self.crop["width"], self.crop["height"]
            left, top = (picture.width - width) // 2, (picture.height - height) // 2  # negative: black is added
            picture = picture.crop((left, top, left + width, top + height))
        pixels = np.asarray(picture)  # (H, W, 3), uint8
        return np.stack([self.table[channel][pixels[..., channel]] for channel in range(3)])


def resized(size: tuple[int, int], wanted: dict) -> tuple[int, int]:
    """Return the width and height that a picture of width and height `size` gets.

    Args:
        wanted: `height` and `width`, or `shortest_edge`, to which the shorter side is scaled.
    """
    if wanted.get("height") and wanted.get("width"):
        return wanted["width"], wanted["height"]
    if not wanted.get("shortest_edge") or wanted.get("longest_edge"):
        raise ValueError(
            f"The image processor has the size {wanted}. --engine onnx knows height and width, or shortest_edge."
        )
    short, (width, height) = wanted["shortest_edge"], size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def levels(settings: dict) -> np.ndarray:
    """Return (3, 256), float32: what each value of a channel becomes, by the arithmetic of transformers."""
    values = np.arange(256, dtype=np.float64)
    if settings.get("do_rescale"):
        values *= settings["rescale_factor"]
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if settings.get("do_normalize"):
        mean, std = (np.float32(settings[key]).reshape(-1, 1) for key in ("image_mean", "image_std"))
        table = (table - mean) / std
    return table
