"""Rows of pictures and conversations, from the form that `sources_minivlm.py` gives them to the model's tensors.

    {"images", "messages"} -> Encoder -> token ids, labels, pixels; `batching_minivlm.py` makes batches of them

Labels come from the chat template's `{% generation %}` blocks: the assistant's words and the end token, nothing else.
Whatever is random about a row is a function of (seed, epoch, row index): a resumed run sees what it would have seen.
"""

import math
import random
import re
import warnings
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageEnhance, PngImagePlugin
from transformers import ProcessorMixin

from processing_minivlm import to_rgb
from sources_minivlm import BadRow, Rows, open_picture

MAX_PIXELS = 89_478_485  # Pillow warns above it: a quarter of a gigabyte as RGB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a picture with a book in its metadata is a picture
IGNORE = -100  # label of a token that carries no loss
CUT = "cut at a turn"  # kind of note on a row that was shortened
SHIELD = "\ufdd0"  # a Unicode noncharacter, never part of text: keeps apart what would become one token


# --------------------------------------------------------------------------------------------- rows to tensors


def decode_image(data: bytes | Path | Image.Image) -> Image.Image:
    """Decode one picture, or the file that a path names, to RGB, as a person would see it.

    Raises:
        BadRow: it is in none of `FORMATS`, cannot be decoded, or has more than `MAX_PIXELS`, which is known before any
            is decoded.
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
    """The same thing as another hand might draw it: another flat background, other pigments, sometimes none.

    Each stored picture has one background colour, which a classifier learns by heart sooner than the thing on it; with
    this a tower names several times as many pictures of a style that it never saw.
    """
    pixels = np.asarray(image, dtype=np.float32)
    background = pixels[:1, :1]
    thing = ((np.abs(pixels - background).max(-1, keepdims=True) - 8) / 24).clip(0, 1)  # 8: noise of lossy pictures
    fresh = np.float32([255] * 3 if rng.random() < 0.3 else [rng.uniform(0, 255) for _ in range(3)])
    pixels = pixels + (fresh - background) * (1 - thing)
    mix = np.eye(3, dtype=np.float32) + np.float32([[rng.uniform(-0.12, 0.12) for _ in range(3)] for _ in range(3)])
    if rng.random() < 0.08:
        mix[:] = 1
    mix /= mix.sum(1, keepdims=True)
    gain, offset, gamma = rng.uniform(0.9, 1.1), rng.uniform(-16, 16), math.exp(rng.uniform(-0.25, 0.25))
    pixels = 255 * ((pixels @ mix.T * gain + offset).clip(0, 255) / 255) ** gamma
    return Image.fromarray(pixels.astype(np.uint8))


def augment(image: Image.Image, rng: random.Random, strong: bool = False) -> Image.Image:
    """Shift, scale, tilt and tint a picture a little; never mirror it, since left and right are asked about.

    With `strong` half as much again, after `redraw`: colours and backgrounds are then no longer those of the picture.
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


def shield(messages: list[dict], control: re.Pattern) -> list[dict]:
    """Break up control tokens that somebody typed, so that they are read as the text they are.

    An answer that starts with a line break is kept apart from the one before it, which the model is given: as one
    token the two would be half asked of it.
    """

    def clean(text: str, role: str) -> str:
        text = control.sub(lambda match: match[0][0] + SHIELD + match[0][1:], text.replace(SHIELD, ""))
        return SHIELD + text if role == "assistant" and text.startswith("\n") else text

    def part(content, role: str):
        return {**content, "text": clean(content["text"], role)} if content["type"] == "text" else content

    return [
        {
            **m,
            "content": clean(m["content"], m["role"])
            if isinstance(m["content"], str)
            else [part(c, m["role"]) for c in m["content"]],
        }
        for m in messages
    ]


def count_markers(messages: list[dict]) -> int:
    """Pictures that messages with typed content ask for."""
    return sum(part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"])


class Pixels:
    """Pictures to pixel values as the image processor makes them, to the bit, in a fraction of its time.

    Most processors resize, then map each of 256 values per channel to a float: that map is a table, which a ramp of
    grey tells. Whether there is no more to it is tried on one picture; if there is, the processor itself is used.
    """

    def __init__(self, image_processor):
        self.process = partial(image_processor, return_tensors="pt")
        *_, height, width = self.process([Image.new("RGB", (8, 8))])["pixel_values"].shape
        self.size, self.resample = (width, height), getattr(image_processor, "resample", None)
        ramp = Image.fromarray(np.arange(width * height).reshape(height, width).astype(np.uint8)).convert("RGB")
        levels = self.process([ramp])["pixel_values"][0].flatten(1)  # (3, H * W); the first 256 are those of 0 to 255
        self.table = levels[:, :256].numpy() if levels.shape[1] >= 256 else None
        noise = np.random.default_rng(0).integers(0, 256, (height // 2 + 3, 2 * width + 1, 3), dtype=np.uint8)
        trial = [Image.fromarray(noise), ramp]
        if self.table is not None and not torch.equal(self(trial), self.process(trial)["pixel_values"]):
            self.table = None

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """Pixel values (N, 3, H, W) of RGB pictures."""
        if self.table is None:
            return self.process(images)["pixel_values"]
        values = np.empty((len(images), 3, self.size[1], self.size[0]), dtype=np.float32)
        for image, out in zip(images, values):
            levels = np.asarray(image.resize(self.size, self.resample))  # (H, W, 3)
            for channel in range(3):
                np.take(self.table[channel], levels[..., channel], out=out[channel], mode="clip")
        return torch.from_numpy(values)


class Encoder:
    """Turn `{"images", "messages"}` into token ids, labels and pixel values by the processor's own parts.

    Args:
        max_length: longest row in tokens after image expansion.
        too_long: what becomes of a longer row: drop makes it a `BadRow`, cut leaves out its last turns, each whole.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int = 1024, too_long: str = "drop"):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.too_long = max_length, too_long
        self.pixels = Pixels(processor.image_processor)
        self.features = None  # a `FeatureCache`: its features then stand where pixel values would
        tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, tokens)))
        self.shield_ids = self.tokenizer.encode(SHIELD, add_special_tokens=False)

    def tokens(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, image placeholders expanded, both of length T."""
        shielded = shield(messages, self.control)
        encoded = self.tokenizer.apply_chat_template(
            shielded, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if shielded != messages:
            ids, mask = self._unshield(ids, mask)
        image_id, length = self.processor.image_token_id, self.processor.image_seq_length
        if image_id in ids:
            repeats = [length if token == image_id else 1 for token in ids]
            ids = [token for token, times in zip(ids, repeats) for _ in range(times)]
            mask = [flag for flag, times in zip(mask, repeats) for _ in range(times)]
        return ids, [token if flag else IGNORE for token, flag in zip(ids, mask)]

    def _unshield(self, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        kept, i, n = [], 0, len(self.shield_ids)
        while i < len(ids):
            if ids[i : i + n] == self.shield_ids:
                i += n
            else:
                kept.append(i)
                i += 1
        return [ids[i] for i in kept], [mask[i] for i in kept]

    def blank(self) -> dict:
        """A row for the collators: one black picture, and no word that carries loss."""
        ids = torch.full((self.processor.image_seq_length,), self.processor.image_token_id)
        pixels = self.pixels([Image.new("RGB", (8, 8))]) if self.features is None else self.features.blank()
        row = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "pixel_values": pixels}
        return {**share_prefix([row], self.processor.image_token_id), "rows": [], "bad_rows": [], "epoch": 0}

    def words(self, row: dict) -> tuple[list[int], list[int], int]:
        """Token ids and labels of a row, and how many of its messages they are; its pictures are left undecoded.

        Raises:
            BadRow: markers and pictures differ in number, the row is too long, or no token carries loss.
        """
        messages = row["messages"]
        if (markers := count_markers(messages)) != len(row["images"]):
            raise BadRow(f"picture markers and pictures differ in number: {markers} and {len(row['images'])}")
        try:
            ids, labels = self.tokens(messages)
            if len(ids) > self.max_length and self.too_long == "cut":
                # More messages only append tokens, so the lengths of the beginnings that end in an answer ascend.
                ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
                fitting = bisect_right(ends, self.max_length, key=lambda end: len(self.tokens(messages[:end])[0]))
                if fitting:
                    messages = messages[: ends[fitting - 1]]
                    ids, labels = self.tokens(messages)
        except TemplateError as error:  # a picture in the assistant's turn, a system turn that is not the first
            raise BadRow(f"refused by the chat template: {error}") from error
        if len(ids) > self.max_length:
            raise BadRow(f"too long: {len(ids)} tokens, more than max_length={self.max_length}")
        if all(label == IGNORE for label in labels[1:]):
            raise BadRow("no answer tokens: the conversation has no assistant turn with words in it")
        return ids, labels, len(messages)

    def size(self, row: dict) -> tuple[int, int]:
        """Tokens and pictures that `__call__` will make of a row; raises `BadRow` as `words` does."""
        ids, _, kept = self.words(row)
        return len(ids), len(row["images"]) if kept == len(row["messages"]) else count_markers(row["messages"][:kept])

    def __call__(self, row: dict, change=None, pictures: bool = True) -> dict[str, torch.Tensor]:
        """Encode one row; `change` maps each picture to another one, `pictures=False` leaves them undecoded.

        Returns:
            `input_ids` and `labels` (T,), `pixel_values` (N, 3, H, W), N the pictures of the row (0 for text only), or
            with `features` theirs, (N, 1, P, V);
            `notes`, what was done to the row: a line if it was cut.

        Raises:
            BadRow: as for `words`, or a picture cannot be read.
        """
        ids, labels, kept = self.words(row)
        notes, images = [], row["images"]
        if kept < len(row["messages"]):
            images = images[: count_markers(row["messages"][:kept])]
            notes = [f"{CUT}: {kept} of {len(row['messages'])} messages fit into max_length={self.max_length}"]
        if not (pictures and images):
            pixels = torch.empty(0)
        elif self.features is not None:
            pixels = self.features(images)
        else:
            decoded = [decode_image(image) for image in images]
            pixels = self.pixels(decoded if change is None else [change(image) for image in decoded])
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}
        return {**row, "notes": notes}


def share_prefix(samples: list[dict], image_token_id: int) -> dict[str, torch.Tensor]:
    """Join rows that begin with the same picture into one: the picture once, then every row's own words as a branch.

    A branch attends to the common beginning and to itself, and its positions go on from the beginning, so each row's
    logits are those that it would have alone. Eight questions about a picture then cost the picture once.

    Returns:
        `input_ids`, `labels`, `position_ids` and `branch` (T,): 0 in the common part, k in the k-th row's own;
        `pixel_values` of the first row.
    """
    first = samples[0]
    is_image = (first["input_ids"] == image_token_id).nonzero()
    shared = int(is_image[-1]) + 1 if len(samples) > 1 else 0
    assert all(torch.equal(s["input_ids"][:shared], first["input_ids"][:shared]) for s in samples)
    parts = {"input_ids": [first["input_ids"][:shared]], "labels": [first["labels"][:shared]]}
    lengths = [shared]
    for sample in samples:
        for key, pieces in parts.items():
            pieces.append(sample[key][shared:])
        lengths.append(len(sample["input_ids"]) - shared)
    positions = [torch.arange(shared)] + [shared + torch.arange(length) for length in lengths[1:]]
    return {
        **{key: torch.cat(pieces) for key, pieces in parts.items()},
        "position_ids": torch.cat(positions),
        "branch": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "pixel_values": first["pixel_values"],
    }


@dataclass
class TrainingRows(torch.utils.data.Dataset):
    """Encoded rows by (epoch, indices): of one row, of several about the same picture, or of a pack.

    A bad row is left out, and if no row is left the next good one of the data takes their place; `rows` of
    the sample names file and row of each, `bad_rows` also the reason, and each row that was cut.

    Args:
        augment: none, mild or strong, see `augment`.
        packed: give the rows as a list of samples, for `PackingCollator`; else as one sample, by `share_prefix`.
    """

    rows: Rows
    encoder: Encoder
    seed: int = 0
    augment: str = "none"
    packed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> dict | list[dict]:
        epoch, indices = key
        bad, samples, image_token_id = [], [], self.encoder.processor.image_token_id
        spare = ((indices[-1] + i) % len(self.rows) for i in range(1, 100))
        for index in indices:
            first = index if self.packed else indices[0]
            samples += self._encode(index, f"{self.seed}/{epoch}/{first}", bad, pictures=self.packed or not samples)
        while not samples:
            if (index := next(spare, None)) is None:
                raise ValueError(f"{len(bad)} bad rows in a row, from {bad[0][0]} ({bad[0][1]}) to {bad[-1][0]}.")
            samples += self._encode(index, f"{self.seed}/{epoch}/{index}", bad)
        if self.packed:
            none = {"rows": [], "bad_rows": [], "epoch": epoch}
            packed = [share_prefix([s], image_token_id) | none for s in samples]
            packed[0] |= {"rows": [s["place"] for s in samples], "bad_rows": bad}
            return packed
        rows = [s["place"] for s in samples]
        return {**share_prefix(samples, image_token_id), "rows": rows, "bad_rows": bad, "epoch": epoch}

    def _encode(self, index: int, seed: str, bad: list, pictures: bool = True) -> list[dict]:
        change = None
        if self.augment != "none":
            change = partial(augment, rng=random.Random(seed), strong=self.augment == "strong")
        try:
            sample = self.encoder(self.rows.adapt(index), change, pictures)
            bad += [(self.rows.where(index), note) for note in sample["notes"]]
            return [{**sample, "place": self.rows.where(index)}]
        except BadRow as error:
            bad.append((self.rows.where(index), str(error)))
            return []


def describe_bad_rows(bad_rows: Counter) -> str:
    """One line per kind of bad row: how many."""
    return "\n".join(f"  {count} x {kind}" for kind, count in bad_rows.most_common())
