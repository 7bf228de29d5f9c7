"""Rows of pictures and conversations, from a file to the tensors that the model trains on.

    parquet row -> adapter -> {"images", "messages"} -> encode -> token ids, labels, pixels -> collator -> batch

Labels come from the chat template's `{% generation %}` blocks: the assistant's words and the end token, nothing else.
Whatever is random about a row is a function of (seed, epoch, row index), so a resumed run sees what it would have seen.
"""

import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image, ImageEnhance
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from processing_minivlm import to_rgb

IMAGE_MARKER = "<image>"  # how MiniMind-V, LLaVA and others write a picture into text
IGNORE = -100  # label of a token that carries no loss
SHIELD = "\ufdd0"  # a Unicode noncharacter, never part of text: keeps typed control tokens from becoming real ones


# --------------------------------------------------------------------------------------------------- sources


def load_rows(sources: list[str]) -> Dataset:
    """Load parquet files (paths, folders or globs) into one map-style dataset, in the order given.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file is not parquet, lacks the columns of every known schema, or there are no rows at all.
    """
    parts = []
    for source in sources:
        path = Path(source)
        files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else sorted(glob(source))
        if not files:
            raise FileNotFoundError(f"{source}: no such parquet file, folder with parquet files, or glob.")
        for file in files:
            try:
                part = Dataset.from_parquet(file)
            except Exception as error:  # pyarrow and datasets each raise several classes for an unreadable file
                raise ValueError(f"{file}: not a readable parquet file ({error}).") from error
            find_adapter(part.column_names, file)
            parts.append(part)
    rows = concatenate_datasets(parts)
    if not len(rows):
        raise ValueError(f"{', '.join(sources)}: no rows. Training needs at least one.")
    return rows


# -------------------------------------------------------------------------------------------------- adapters


def minimind_v(row: dict) -> dict:
    """MiniMind-V parquet: `conversations` (JSON string or list of {role, content}) and `image_bytes` (one or a list).

    A picture stands in the text as `<image>`. Text-only rows carry an 8 x 8 black picture, which is left out.
    """
    turns = row["conversations"]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    images = row["image_bytes"] or []
    images = images if isinstance(images, list) else [images]
    messages = [{"role": turn["role"], "content": split_markers(turn["content"])} for turn in turns]
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        images = [image for image in images if not is_placeholder(image)]
    return {"images": images, "messages": messages}


ADAPTERS = {minimind_v: {"conversations", "image_bytes"}}  # adapter -> the columns it recognises a source by


def find_adapter(columns: list[str], source: str):
    """Return the adapter whose columns are all among `columns`; its row is `{"images": [...], "messages": [...]}`."""
    for adapter, needed in ADAPTERS.items():
        if needed <= set(columns):
            return adapter
    known = "; ".join(f"{adapter.__name__}: {', '.join(sorted(needed))}" for adapter, needed in ADAPTERS.items())
    raise ValueError(f"{source}: columns {', '.join(columns)} fit no known schema. Known are {known}.")


def split_markers(text: str) -> list[dict]:
    """Turn "<image>\\nWhat is it?" into typed content. The line break beside a marker belongs to the chat template."""
    parts = []
    for i, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] * (i > 0)
        piece = piece.removeprefix("\n") if i else piece
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def is_placeholder(image: bytes) -> bool:
    """Whether a picture is the 8 x 8 black one that MiniMind-V puts into rows without a picture."""
    with Image.open(io.BytesIO(image)) as picture:
        return picture.size == (8, 8) and picture.convert("L").getextrema() == (0, 0)


# --------------------------------------------------------------------------------------------- rows to tensors


class BadRow(ValueError):
    """A row that cannot be trained on: counted and skipped by the trainer, up to `--max_bad_rows`."""


def decode_image(data: bytes | Image.Image) -> Image.Image:
    """Decode one picture to RGB, as a person would see it."""
    try:
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
        return to_rgb(image)
    except Exception as error:  # Pillow raises a dozen classes for a damaged file
        raise BadRow(f"unreadable picture: {type(error).__name__}: {error}") from error


def augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shift, scale, tilt and tint a picture a little; never mirror it, since left and right are asked about."""
    width, height = image.size
    scale, shear = rng.uniform(0.9, 1.25), rng.uniform(-0.12, 0.12)
    aspect, tilt = rng.uniform(0.9, 1.1), rng.uniform(-0.12, 0.12)
    a, b, d, e = scale * aspect, shear + tilt, -tilt, scale / aspect
    # The centre of the picture moves by at most a twelfth of its width, then the map is applied around it.
    x, y = width * (0.5 + rng.uniform(-1, 1) / 12), height * (0.5 + rng.uniform(-1, 1) / 12)
    matrix = (a, b, x - a * width / 2 - b * height / 2, d, e, y - d * width / 2 - e * height / 2)
    image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0)))
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(rng.uniform(0.75, 1.25))
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

    def __call__(self, row: dict, rng: random.Random | None = None) -> dict[str, torch.Tensor]:
        """Encode one row; `rng` switches augmentation on.

        Returns:
            `input_ids` and `labels` (T,), `pixel_values` (N, 3, H, W), N the pictures of the row (0 for text only).

        Raises:
            BadRow: markers and pictures differ in number, a picture cannot be read, the row is too long, or no token
                carries loss.
        """
        markers = sum(
            part["type"] == "image" for m in row["messages"] if not isinstance(m["content"], str) for part in m["content"]
        )
        if markers != len(row["images"]):
            raise BadRow(f"{markers} picture markers in the text but {len(row['images'])} pictures")
        ids, labels = self.tokens(row["messages"])
        if len(ids) > self.max_length:
            raise BadRow(f"{len(ids)} tokens, more than max_length={self.max_length}")
        if all(label == IGNORE for label in labels[1:]):
            raise BadRow("no answer tokens: the conversation has no assistant turn with words in it")
        images = [decode_image(image) for image in row["images"]]
        if rng is not None:
            images = [augment(image, rng) for image in images]
        if images:
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.empty(0)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


@dataclass
class TrainingRows(torch.utils.data.Dataset):
    """Encoded rows by (epoch, index). A bad row is replaced by the next good one, and the loss of it reported."""

    rows: Dataset
    encoder: Encoder
    seed: int = 0
    augment: bool = False
    adapter: object = field(init=False)

    def __post_init__(self):
        self.adapter = find_adapter(self.rows.column_names, "rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        bad = []
        for attempt in range(100):
            i = (index + attempt) % len(self.rows)
            rng = random.Random(f"{self.seed}/{epoch}/{index}") if self.augment else None
            try:
                try:
                    row = self.adapter(self.rows[i])
                except (KeyError, TypeError, AttributeError, OSError, json.JSONDecodeError) as error:
                    raise BadRow(f"not in the form of {self.adapter.__name__}: {type(error).__name__}: {error}") from error
                return {**self.encoder(row, rng), "bad_rows": bad}
            except BadRow as error:
                bad.append((i, str(error)))
        raise ValueError(f"100 bad rows in a row, from row {bad[0][0]} ({bad[0][1]}) to {bad[-1][0]} ({bad[-1][1]}).")


# -------------------------------------------------------------------------------------------------- batches


class GlobalBatchSampler(Sampler):
    """Yield this rank's micro-batches of (epoch, index), the same global batches whatever the number of ranks.

    An epoch is shuffled by (seed, epoch) and cut into global batches of rows of like length, which leaves little
    padding. Each is dealt to ranks and micro-batches in turn. Rows that do not fill the last global batch of an epoch
    wait for the next epoch's shuffle.

    Args:
        lengths: a number per row that grows with its tokens.
        batch_size: rows of one optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows that one rank puts through the model at once.
        start_step: optimizer steps already taken; nothing before them is read.
    """

    WINDOW = 32  # global batches that are sorted by length together

    def __init__(self, lengths, batch_size, micro_batch_size, rank=0, world_size=1, seed=0, start_step=0):
        if len(lengths) < batch_size:
            raise ValueError(
                f"The data has {len(lengths)} rows, fewer than batch_size={batch_size}. Lower --batch_size."
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not divide by {world_size} ranks. Use a multiple.")
        self.lengths, self.batch_size, self.seed, self.start_step = lengths, batch_size, seed, start_step
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.steps_per_epoch = len(lengths) // batch_size
        self.accumulation = -(-batch_size // (world_size * micro_batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            epoch = step // self.steps_per_epoch
            batches = self.epoch_batches(epoch)
            for batch in batches[step % self.steps_per_epoch :]:
                mine = batch[self.rank :: self.world_size]
                for i in range(self.accumulation):
                    yield [(epoch, index) for index in mine[i :: self.accumulation]]
                step += 1

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The global batches of an epoch as row indices."""
        rng = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        order = order[: self.steps_per_epoch * self.batch_size]
        window, batches = self.WINDOW * self.batch_size, []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        rng.shuffle(batches)
        return batches


def _gather(samples: list[dict]) -> tuple[torch.Tensor | None, list]:
    """All pictures of the samples in reading order, (N, 3, H, W) or None, and the bad rows met on the way."""
    pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
    return torch.cat(pixels) if pixels else None, [bad for sample in samples for bad in sample["bad_rows"]]


class PaddingCollator:
    """Rows side by side, padded on the right to the longest.

    Causal attention never looks at the padding, so no attention mask is needed. The LM head is asked for the span of
    positions that carry loss in some row (`logits_to_keep`), since over a 6,400-word vocabulary it would otherwise
    cost as much as a fifth of a small decoder.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict]) -> dict:
        """Return `input_ids` (B, T), `shift_labels` (B, K), `logits_to_keep` (K,), `pixel_values` (N, 3, H, W)."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([s["input_ids"] for s in samples], batch_first=True, padding_value=self.pad_token_id)
        labels = pad([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE)
        supervised = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]  # positions whose next token carries loss
        keep = torch.arange(int(supervised[0]), int(supervised[-1]) + 1)
        pixels, bad = _gather(samples)
        batch = {"input_ids": ids, "shift_labels": labels[:, keep + 1], "logits_to_keep": keep, "bad_rows": bad}
        return batch if pixels is None else {**batch, "pixel_values": pixels}


class PackingCollator:
    """Rows one after another in a single row without padding; `position_ids` restart at 0 for each.

    transformers keeps packed rows apart by these restarts, but only without an attention mask and without a cache.
    """

    def __call__(self, samples: list[dict]) -> dict:
        """Return `input_ids`, `position_ids` (1, T), `shift_labels` (1, K), `logits_to_keep` (K,), `pixel_values`."""
        ids = torch.cat([s["input_ids"] for s in samples])[None]
        positions = torch.cat([torch.arange(len(s["input_ids"])) for s in samples])[None]
        labels = torch.cat([s["labels"] for s in samples])
        labels[positions[0] == 0] = IGNORE  # nothing of its own row predicts a row's first token
        keep = (labels[1:] != IGNORE).nonzero()[:, 0]
        pixels, bad = _gather(samples)
        batch = {"input_ids": ids, "position_ids": positions, "shift_labels": labels[None, keep + 1]}
        batch |= {"logits_to_keep": keep, "bad_rows": bad}
        return batch if pixels is None else {**batch, "pixel_values": pixels}


def describe_bad_rows(bad_rows: Counter) -> str:
    """One line per kind of bad row: how many, and the first row's index."""
    return "\n".join(f"  {count} x {kind}" for kind, count in bad_rows.most_common())
