"""Turn samples into tensors: stage 4 of the data path.

    {"images", "messages"} -> Encoder -> token ids, labels, pixel values

Labels come from the chat template's `{% generation %}` blocks: the assistant's words and the end token, nothing else.
"""

import copy
import math
from bisect import bisect_right
from functools import cached_property, partial

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import ProcessorMixin

from minivlm.data.bad_rows import CUT, BadRow
from minivlm.data.control_tokens import (
    SEPARATOR,
    control_pattern,
    count_markers,
    escape_control_tokens,
    widened,
    without_separators,
)
from minivlm.data.phrases import locate
from minivlm.data.pictures import decode_image

IGNORE = -100  # label of a token that carries no loss


class PixelValues:
    """Turn pictures into the image processor's pixel values, equal to the last bit, in a fraction of its time.

    Most processors resize a picture, then map each of the 256 values of a channel to a float. Here a processed picture
    of all greys gives that map as a table, and values are looked up in it. The result is compared with the processor's
    on a picture of noise: if they differ, the processor itself is used.
    """

    def __init__(self, image_processor):
        self.process = partial(image_processor, return_tensors="pt")
        *_, height, width = self.process([Image.new("RGB", (8, 8))])["pixel_values"].shape
        self.size, self.resample = (width, height), getattr(image_processor, "resample", None)
        greys = Image.fromarray(np.arange(width * height).reshape(height, width).astype(np.uint8)).convert("RGB")
        levels = self.process([greys])["pixel_values"][0].flatten(1)  # (3, H * W); the first 256 are those of 0 to 255
        self.table = levels[:, :256].numpy() if levels.shape[1] >= 256 else None
        noise = np.random.default_rng(0).integers(0, 256, (height // 2 + 3, 2 * width + 1, 3), dtype=np.uint8)
        trial = [Image.fromarray(noise), greys]
        if self.table is not None and not torch.equal(self(trial), self.process(trial)["pixel_values"]):
            self.table = None

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the pixel values (N, 3, H, W) of RGB pictures."""
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
        too_long: drop raises `BadRow` for a longer row, cut leaves out as many of its last turns as needed.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int = 1024, too_long: str = "drop"):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.too_long = max_length, too_long
        self.pixels = PixelValues(processor.image_processor)
        self.features = None  # see `with_features`
        self.control = control_pattern(self.tokenizer.get_added_vocab())
        self.separator_ids = self.tokenizer.encode(SEPARATOR, add_special_tokens=False)

    def with_features(self, features) -> "Encoder":
        """Return an encoder like this one that takes features from a `FeatureCache` instead of pixel values."""
        encoder = copy.copy(self)
        encoder.features = features
        return encoder

    def tokenize_messages(
        self, messages: list[dict], add_generation_prompt: bool = False, **options
    ) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of a conversation, image placeholders expanded, both of length T.

        `add_generation_prompt` opens one more turn at the end, which the model is to write. `options` are further
        ones of the chat template, as `tools`.
        """
        escaped = escape_control_tokens(messages, self.control)
        encoded = self.tokenizer.apply_chat_template(
            escaped, add_generation_prompt=add_generation_prompt,
            tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options,
        )  # fmt: skip
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if escaped != messages:
            kept = without_separators(ids, self.separator_ids)
            ids, mask = [ids[i] for i in kept], [mask[i] for i in kept]
        places = widened(ids, self.processor.image_token_id, self.processor.image_seq_length)
        ids, mask = [ids[i] for i in places], [mask[i] for i in places]
        return ids, [token if flag else IGNORE for token, flag in zip(ids, mask)]

    def blank(self) -> dict:
        """Return a row for the collators: one black picture, and no token that carries loss."""
        ids = torch.full((self.processor.image_seq_length,), self.processor.image_token_id)
        pixels = self.pixels([Image.new("RGB", (8, 8))]) if self.features is None else self.features.blank()
        row = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "pixel_values": pixels}
        return join([row], self.processor.image_token_id, [], epoch=0)

    def tokenize(self, sample: dict) -> tuple[list[int], list[int], int]:
        """Return the token ids and labels of a sample, and how many of its messages they hold; decode no picture.

        Raises:
            BadRow: markers and pictures differ in number, the row is too long, or no token carries loss.
        """
        messages = sample["messages"]
        if (markers := count_markers(messages)) != len(sample["images"]):
            raise BadRow(f"picture markers and pictures differ in number: {markers} and {len(sample['images'])}")
        try:
            ids, labels = self.tokenize_messages(messages)
            if len(ids) > self.max_length and self.too_long == "cut" and (end := self._last_fitting(messages)):
                messages = messages[:end]
                ids, labels = self.tokenize_messages(messages)
        except TemplateError as error:  # a picture in the assistant's turn, a system turn that is not the first
            raise BadRow(f"refused by the chat template: {error}") from error
        if len(ids) > self.max_length:
            raise BadRow(f"too long: {len(ids)} tokens, more than max_length={self.max_length}")
        if all(label == IGNORE for label in labels[1:]):
            raise BadRow("no answer tokens: the conversation has no assistant turn with words in it")
        return ids, labels, len(messages)

    @cached_property
    def header(self) -> str:
        """Return what the chat template writes between a question and its answer."""
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return text[text.rindex("QUESTION") + len("QUESTION") : text.rindex("ANSWER")]

    def ground(self, sample: dict, labels: list[int]) -> torch.Tensor | None:
        """Return `locate` for the phrases of a sample; None without phrases, or if the image tokens form no square.

        Raises:
            ValueError: a sample with phrases has several answers, or a phrase does not stand in its question.
        """
        side = math.isqrt(self.processor.image_seq_length)
        if not sample.get("phrases") or side**2 != self.processor.image_seq_length:
            return None
        if [message["role"] for message in sample["messages"]].count("assistant") > 1:
            raise ValueError("A sample with phrases must have one question and one answer.")
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        question = sample["messages"][-2]["content"][-1]["text"]
        return locate(sample["phrases"], question, self.header, self.tokenizer, first, side)

    def _last_fitting(self, messages: list[dict]) -> int:
        """Return the end of the last answer up to which a conversation fits into `max_length`; 0 if none fits."""
        # More messages only append tokens, so the lengths of the beginnings that end in an answer ascend.
        ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        fitting = bisect_right(ends, self.max_length, key=lambda end: len(self.tokenize_messages(messages[:end])[0]))
        return ends[fitting - 1] if fitting else 0

    def size(self, sample: dict) -> tuple[int, int]:
        """Return how many tokens and pictures `__call__` gives for a sample; raise `BadRow` as `tokenize` does."""
        ids, _, kept = self.tokenize(sample)
        whole = kept == len(sample["messages"])
        return len(ids), len(sample["images"]) if whole else count_markers(sample["messages"][:kept])

    def __call__(self, sample: dict, change=None, pictures: bool = True) -> dict[str, torch.Tensor]:
        """Encode one sample.

        Args:
            change: maps each picture to the one that is used in its place.
            pictures: False leaves pictures undecoded and gives no pixel values.

        Returns:
            `input_ids` and `labels` (T,); `pixel_values` (N, 3, H, W) of the sample's N pictures, empty without any,
            or their features (N, 1, P, V) after `with_features`; `notes`, a line if turns were cut; with
            phrases also `grounding`, which `locate` describes.

        Raises:
            BadRow: as for `tokenize`, or a picture cannot be read.
        """
        ids, labels, kept = self.tokenize(sample)
        notes, images = [], sample["images"]
        if kept < len(sample["messages"]):
            images = images[: count_markers(sample["messages"][:kept])]
            notes = [f"{CUT}: {kept} of {len(sample['messages'])} messages fit into max_length={self.max_length}"]
        if not (pictures and images):
            pixels = torch.empty(0)
        elif self.features is not None:
            pixels = self.features(images)
        else:
            decoded = [decode_image(image) for image in images]
            pixels = self.pixels(decoded if change is None else [change(image) for image in decoded])
        grounding = self.ground(sample, labels)
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixel_values": pixels,
            "notes": notes,
            **({} if grounding is None else {"grounding": grounding}),
        }


def share_prefix(samples: list[dict], image_token_id: int) -> dict[str, torch.Tensor]:
    """Join rows that begin with the same picture: the picture once, then the rest of each row as a branch.

    A branch attends to the common beginning and to itself, and its positions continue those of the beginning. So the
    logits of each row are the same as without the others, and eight questions about a picture cost its tokens once.

    Returns:
        `input_ids`, `labels`, `position_ids` and `branch` (T,), which is 0 in the common part and k in the k-th row's
        own; `pixel_values` of the first row; `grounding` of all rows, None if none has phrases.
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
    grounding, start = [], 0  # how far a row's own part moves
    for sample, length in zip(samples, lengths[1:]):
        if (found := sample.get("grounding")) is not None:
            found = found.clone()
            found[:, :2] += start * (found[:, :2] > 0)
            grounding.append(found)
        start += length
    positions = [torch.arange(shared)] + [shared + torch.arange(length) for length in lengths[1:]]
    return {
        **{key: torch.cat(pieces) for key, pieces in parts.items()},
        "position_ids": torch.cat(positions),
        "branch": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "pixel_values": first["pixel_values"],
        "grounding": torch.cat(grounding) if grounding else None,
    }


def join(samples: list[dict], image_token_id: int, bad_rows: list, epoch: int) -> dict:
    """Return what the collators take for samples about the same picture: `share_prefix`, and where they come from.

    Args:
        samples: with `place`, the file and number of the row; a blank row has none.
        bad_rows: (place, reason) of the rows that were left out or cut.
    """
    places = [sample["place"] for sample in samples if "place" in sample]
    return {**share_prefix(samples, image_token_id), "places": places, "bad_rows": bad_rows, "epoch": epoch}
