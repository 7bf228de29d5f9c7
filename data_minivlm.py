"""Rows of pictures and conversations, from the form that `sources_minivlm.py` gives them to the model's tensors.

    {"images", "messages"} -> Encoder -> token ids, labels, pixels -> collator -> batch

Labels come from the chat template's `{% generation %}` blocks: the assistant's words and the end token, nothing else.
Whatever is random about a row is a function of (seed, epoch, row index): a resumed run sees what it would have seen.
"""

import io
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from PIL import Image, ImageEnhance
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from processing_minivlm import to_rgb
from sources_minivlm import BadRow, Rows

IGNORE = -100  # label of a token that carries no loss
SHIELD = "\ufdd0"  # a Unicode noncharacter, never part of text: keeps typed control tokens from becoming real ones


# --------------------------------------------------------------------------------------------- rows to tensors


def decode_image(data: bytes | Path | Image.Image) -> Image.Image:
    """Decode one picture, or the file that a path names, to RGB, as a person would see it."""
    try:
        if isinstance(data, Image.Image):
            return to_rgb(data)
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises a dozen classes for a damaged file
        raise BadRow(f"unreadable picture: {type(error).__name__}: {error}") from error


def augment(image: Image.Image, rng: random.Random, strength: float = 1.0) -> Image.Image:
    """Shift, scale, tilt and tint a picture a little; never mirror it, since left and right are asked about."""

    def spread(limit: float) -> float:
        return rng.uniform(-limit, limit) * strength

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
    """Break up control tokens that somebody typed, so that they are read as the text they are."""

    def clean(text: str) -> str:
        return control.sub(lambda match: match[0][0] + SHIELD + match[0][1:], text.replace(SHIELD, ""))

    def part(content):
        return {**content, "text": clean(content["text"])} if content["type"] == "text" else content

    return [
        {**m, "content": clean(m["content"]) if isinstance(m["content"], str) else [part(c) for c in m["content"]]}
        for m in messages
    ]


class Encoder:
    """Turn `{"images", "messages"}` into token ids, labels and pixel values by the processor's own parts.

    Args:
        max_length: longest row in tokens after image expansion; a longer one is a `BadRow`, never cut.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int = 1024):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
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
        pixels = self.processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
        row = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "pixel_values": pixels}
        return {**share_prefix([row], self.processor.image_token_id), "bad_rows": []}

    def __call__(self, row: dict, rng: random.Random | None = None, pictures: bool = True) -> dict[str, torch.Tensor]:
        """Encode one row; `rng` switches augmentation on, `pictures=False` leaves the pictures undecoded.

        Returns:
            `input_ids` and `labels` (T,), `pixel_values` (N, 3, H, W), N the pictures of the row (0 for text only).

        Raises:
            BadRow: markers and pictures differ in number, a picture cannot be read, the row is too long, or no token
                carries loss.
        """
        markers = sum(
            part["type"] == "image"
            for m in row["messages"]
            if not isinstance(m["content"], str)
            for part in m["content"]
        )
        if markers != len(row["images"]):
            raise BadRow(f"{markers} picture markers in the text but {len(row['images'])} pictures")
        try:
            ids, labels = self.tokens(row["messages"])
        except TemplateError as error:  # a picture in the assistant's turn, a system turn that is not the first
            raise BadRow(f"refused by the chat template: {error}") from error
        if len(ids) > self.max_length:
            raise BadRow(f"{len(ids)} tokens, more than max_length={self.max_length}")
        if all(label == IGNORE for label in labels[1:]):
            raise BadRow("no answer tokens: the conversation has no assistant turn with words in it")
        images = [decode_image(image) for image in row["images"]] if pictures else []
        if rng is not None:
            images = [augment(image, rng) for image in images]
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.empty(0)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


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
    """Encoded rows by (epoch, indices): the indices of one row, or of several rows about the same picture.

    A bad row is left out, and if no row is left the next good one of the data takes their place; `bad_rows` of the
    sample lists index and reason of each.
    """

    rows: Rows
    encoder: Encoder
    seed: int = 0
    augment: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> dict:
        epoch, indices = key
        bad, samples, image_token_id = [], [], self.encoder.processor.image_token_id
        spare = ((indices[-1] + i) % len(self.rows) for i in range(1, 100))
        for index in indices:
            samples += self._encode(index, f"{self.seed}/{epoch}/{indices[0]}", bad, pictures=not samples)
        while not samples:
            if (index := next(spare, None)) is None:
                raise ValueError(f"{len(bad)} bad rows in a row, from row {bad[0][0]} ({bad[0][1]}) to {bad[-1][0]}.")
            samples += self._encode(index, f"{self.seed}/{epoch}/{index}", bad)
        return {**share_prefix(samples, image_token_id), "bad_rows": bad}

    def _encode(self, index: int, seed: str, bad: list, pictures: bool = True) -> list[dict]:
        try:
            return [self.encoder(self.rows.adapt(index), random.Random(seed) if self.augment else None, pictures)]
        except BadRow as error:
            bad.append((index, f"{error}: {self.rows.where(index)}"))
            return []


# -------------------------------------------------------------------------------------------------- batches


def rows_by_picture(rows: Rows, most: int) -> list[tuple[int, ...]]:
    """Group rows that are the same up to the end of their last picture into units of at most `most` of like number."""
    groups: dict[int | str, list[int]] = {}
    for index, sample in enumerate(rows.samples()):
        # A bad row stays by itself, to be counted when it is drawn.
        key = None if isinstance(sample, BadRow) else beginning(sample)
        groups.setdefault(f"row {index}" if key is None else key, []).append(index)
    units = []
    for group in groups.values():
        pieces = -(-len(group) // most)
        units += [tuple(group[i::pieces]) for i in range(pieces)]
    return units


def beginning(sample: dict) -> int | None:
    """Hash of a sample's pictures and of all messages up to the last of them; None without pictures."""
    if not sample["images"]:
        return None
    before, shared = [], []
    for message in sample["messages"]:
        for part in [message["role"], *message["content"]]:
            before.append(part)
            if part == {"type": "image"}:
                shared = list(before)
    images = [image.tobytes() if isinstance(image, Image.Image) else image for image in sample["images"]]
    return hash((*images, repr(shared)))


class GlobalBatchSampler(Sampler):
    """Yield this rank's micro-batches of (epoch, indices), the same global batches whatever the number of ranks.

    An epoch is shuffled by (seed, epoch) and cut into global batches of units of like length, which leaves little
    padding. Each is dealt to ranks and micro-batches in turn. Units that do not fill the last global batch of an epoch
    wait for the next epoch's shuffle.

    Args:
        units: what is drawn as one, each the indices of its rows.
        lengths: a number per unit that grows with its tokens.
        batch_size: units of one optimizer step, over all ranks and micro-batches.
        micro_batch_size: units that one rank puts through the model at once.
        start_step: optimizer steps already taken; nothing before them is read.
    """

    WINDOW = 32  # global batches that are sorted by length together

    def __init__(self, units, lengths, batch_size, micro_batch_size, rank=0, world_size=1, seed=0, start_step=0):
        if len(units) < batch_size:
            raise ValueError(
                f"The data has {len(units)} rows (or groups of rows), fewer than batch_size={batch_size}. "
                "Lower --batch_size."
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not divide by {world_size} ranks. Use a multiple.")
        self.units, self.lengths, self.batch_size = units, lengths, batch_size
        self.seed, self.start_step = seed, start_step
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(units) // batch_size
        self.accumulation = -(-batch_size // (world_size * micro_batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        step = self.start_step
        while True:
            epoch = step // self.steps_per_epoch
            batches = self.epoch_batches(epoch)
            for batch in batches[step % self.steps_per_epoch :]:
                mine = batch[self.rank :: self.world_size]
                for i in range(self.accumulation):
                    yield [(epoch, self.units[unit]) for unit in mine[i :: self.accumulation]]
                step += 1

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch as positions in `units`."""
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.units)))
        rng.shuffle(order)
        order = order[: self.steps_per_epoch * self.batch_size]
        window, batches = self.WINDOW * self.batch_size, []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        rng.shuffle(batches)
        return batches


def _finish(batch: dict, labels: torch.Tensor, samples: list[dict]) -> dict:
    """Add what both collators share: the positions that predict answers and the answers, pictures, bad rows."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    batch["logits_to_keep"] = targets != IGNORE
    batch["shift_labels"] = targets[batch["logits_to_keep"]][None]  # (1, K)
    pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    batch["bad_rows"] = [bad for sample in samples for bad in sample["bad_rows"]]
    return batch


def with_picture(samples: list[dict], blank: dict | None) -> list[dict]:
    """Add the blank row to a batch without pictures.

    Its gradient is zero, but there is one: without, a rank whose rows are all text would leave the tower out of the
    backward pass, and DDP would wait for it or fail.
    """
    if blank is None or any(len(sample["pixel_values"]) for sample in samples):
        return samples
    return [*samples, blank]


def own_labels(sample: dict) -> torch.Tensor:
    """Labels without the first token of each branch or row: the token before it belongs to another one."""
    branch = sample["branch"]
    starts = torch.cat([torch.ones(1, dtype=torch.bool), branch[1:] != branch[:-1]])
    return sample["labels"].masked_fill(starts, IGNORE)


class PaddingCollator:
    """Rows side by side, padded on the right to the longest.

    Causal attention never looks at the padding, so rows alone need no attention mask. Rows that share a picture get
    one that hides the branches from one another.

    Args:
        blank: `Encoder.blank()`, added to a batch without pictures; None adds nothing.
    """

    def __init__(self, pad_token_id: int, blank: dict | None = None):
        self.pad_token_id, self.blank = pad_token_id, blank

    def __call__(self, samples: list[dict]) -> dict:
        """Return `input_ids`, `position_ids`, `logits_to_keep` (B, T), `shift_labels` (1, K), `pixel_values`.

        With branches also `attention_mask` (B, 1, T, T), to be added to attention scores: 0 or the lowest float.
        """

        samples = with_picture(samples, self.blank)

        def pad(key: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=value)

        batch = {"input_ids": pad("input_ids", self.pad_token_id), "position_ids": pad("position_ids", 0)}
        branch = pad("branch", -1)
        if branch.max() > 1:
            query, key = branch[:, :, None], branch[:, None, :]
            seen = ((query == key) | (key == 0)).tril()  # (B, T, T)
            batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        labels = torch.nn.utils.rnn.pad_sequence(
            [own_labels(s) for s in samples], batch_first=True, padding_value=IGNORE
        )
        return _finish(batch, labels, samples)


class PackingCollator:
    """Rows one after another in a single row without padding; `position_ids` restart at 0 for each.

    transformers keeps packed rows apart by these restarts, but only without an attention mask and without a cache.

    Args:
        blank: `Encoder.blank()`, added to a batch without pictures; None adds nothing.
    """

    def __init__(self, blank: dict | None = None):
        self.blank = blank

    def __call__(self, samples: list[dict]) -> dict:
        """Return `input_ids`, `position_ids`, `logits_to_keep` (1, T), `shift_labels` (1, K) and `pixel_values`."""
        if any(sample["branch"].max() > 1 for sample in samples):
            raise ValueError("Rows that share a picture cannot be packed: position_ids cannot say what they may see.")
        samples = with_picture(samples, self.blank)
        batch = {key: torch.cat([s[key] for s in samples])[None] for key in ("input_ids", "position_ids")}
        return _finish(batch, torch.cat([own_labels(s) for s in samples])[None], samples)


def describe_bad_rows(bad_rows: Counter) -> str:
    """One line per kind of bad row: how many."""
    return "\n".join(f"  {count} x {kind}" for kind, count in bad_rows.most_common())
