"""Batches: which rows go together, in which order, and how they become one tensor.

    units of rows -> sampler -> (epoch, indices) -> TrainingRows -> collator -> batch

The order is a function of (seed, epoch, step) alone, whatever the number of ranks and workers, also after a restart.
"""

import random
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import accumulate

import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from data_minivlm import IGNORE, Encoder
from sources_minivlm import BadRow, Rows

# -------------------------------------------------------------------------------------------- what goes together


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


def shuffled(count: int, rng: random.Random) -> list[int]:
    """Each of `count` units once, in the order of an epoch."""
    order = list(range(count))
    rng.shuffle(order)
    return order


def by_weight(sources: list[int], weights: list[float], rng: random.Random) -> list[int]:
    """As many units as there are, each source's share that of its weight: drawn anew each epoch, or repeated.

    Args:
        sources: number of the source of each unit.
        weights: one per source, relative to one another.
    """
    members: list[list[int]] = [[] for _ in weights]
    for unit, source in enumerate(sources):
        members[source].append(unit)
    if not all(members):
        raise ValueError(f"weights: source {members.index([]) + 1} of --data has no rows left. Name it no more.")
    ends = [round(len(sources) * end / sum(weights)) for end in accumulate(weights)]
    order = []
    for units, start, end in zip(members, [0, *ends], ends):
        repeats, rest = divmod(end - start, len(units))
        order += units * repeats + rng.sample(units, rest)
    rng.shuffle(order)
    return order


class LikeLengths:
    """Plan of an epoch: shuffled by (seed, epoch) and cut into batches of units of like length: less padding.

    Units that do not fill the last batch of an epoch wait for the next epoch's shuffle.

    Args:
        units: what is drawn as one, each the indices of its rows.
        lengths: a number per unit that grows with its tokens.
        batch_size: units of one optimizer step, over all ranks and micro-batches.
        draw: the units of an epoch in their order, by a random number generator; by default each once.
    """

    WINDOW = 32  # batches that are sorted by length together

    def __init__(self, units: list[tuple[int, ...]], lengths: list[int], batch_size: int, seed: int = 0, draw=None):
        if len(units) < batch_size:
            raise ValueError(
                f"The data has {len(units)} rows (or groups of rows), fewer than batch_size={batch_size}. "
                "Lower --batch_size."
            )
        self.units, self.lengths, self.batch_size, self.seed = units, lengths, batch_size, seed
        self.draw = draw or partial(shuffled, len(units))

    def steps(self, epoch: int) -> int:
        return len(self.units) // self.batch_size

    def batches(self, epoch: int) -> list[list[tuple[int, ...]]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        order = self.draw(rng)[: self.steps(epoch) * self.batch_size]
        window, batches = self.WINDOW * self.batch_size, []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        rng.shuffle(batches)
        return [[self.units[unit] for unit in batch] for batch in batches]


class Packs:
    """Plan of an epoch: shuffled by (seed, epoch), then packed by `pack`; the units are the packs.

    Packs that do not fill the last batch of an epoch wait for the next epoch's shuffle.

    Args:
        tokens: tokens of each row.
        pictures: pictures of each row.
        batch_size: packs of one optimizer step, over all ranks and micro-batches.
        max_tokens: most tokens in a pack.
        max_pictures: most pictures in a pack.
        draw: as for `LikeLengths`, of rows.
    """

    def __init__(self, tokens, pictures, batch_size: int, max_tokens: int, max_pictures: int, seed=0, draw=None):
        self.draw = draw or partial(shuffled, len(tokens))
        self.tokens, self.pictures, self.batch_size = tokens, pictures, batch_size
        self.max_tokens, self.max_pictures, self.seed = max_tokens, max_pictures, seed
        self.counts: dict[int, int] = {}
        self.planned: tuple[int, list] = (-1, [])
        if not self.steps(0):
            raise ValueError(
                f"The data fills {len(self.packs(0))} packs of {max_tokens} tokens and {max_pictures} pictures, fewer "
                f"than batch_size={batch_size}. Lower --batch_size or --pack_tokens."
            )

    def steps(self, epoch: int) -> int:
        if epoch not in self.counts:
            self.counts[epoch] = len(self.packs(epoch)) // self.batch_size
        return self.counts[epoch]

    def packs(self, epoch: int) -> list[tuple[int, ...]]:
        if self.planned[0] != epoch:
            order = self.draw(random.Random(f"{self.seed}/{epoch}"))
            rows = ((index, self.tokens[index], self.pictures[index]) for index in order)
            self.planned = epoch, [tuple(keys) for keys in pack(rows, self.max_tokens, self.max_pictures)]
        return self.planned[1]

    def batches(self, epoch: int) -> list[list[tuple[int, ...]]]:
        packs, size = self.packs(epoch), self.batch_size
        return [packs[i : i + size] for i in range(0, self.steps(epoch) * size, size)]


def pack(rows: Iterable[tuple], max_tokens: int, max_pictures: int, look_ahead: int = 512) -> Iterator[list]:
    """Put rows together so that little of `max_tokens` stays empty; each row is in exactly one pack, uncut.

    Each pack starts with the row that has waited longest, so none waits for ever. It is then filled, again and again,
    with the longest waiting row that fits (best fit): of `look_ahead` rows one nearly always closes the gap.

    Args:
        rows: (key, tokens, pictures) of each.
        max_tokens: most tokens in a pack.
        max_pictures: most pictures in a pack.
        look_ahead: rows to choose from.

    Yields:
        The keys of a pack.

    Raises:
        ValueError: a row is larger than a pack.
    """
    waiting: dict[int, tuple] = {}  # arrival -> row, longest waiting first
    by_length: list[tuple[int, int]] = []  # (tokens, arrival), sorted

    def take(arrival: int) -> tuple:
        row = waiting.pop(arrival)
        del by_length[bisect_right(by_length, (row[1], arrival)) - 1]
        return row

    def fill() -> list:
        key, tokens, pictures = take(next(iter(waiting)))
        keys = [key]
        place = bisect_right(by_length, (max_tokens - tokens, float("inf"))) - 1
        while place >= 0:
            arrival = by_length[place][1]
            if pictures + waiting[arrival][2] > max_pictures:
                place -= 1
                continue
            row = take(arrival)
            keys, tokens, pictures = [*keys, row[0]], tokens + row[1], pictures + row[2]
            place = min(place, bisect_right(by_length, (max_tokens - tokens, float("inf")))) - 1
        return keys

    for arrival, row in enumerate(rows):
        if row[1] > max_tokens or row[2] > max_pictures:
            raise ValueError(
                f"Row {row[0]} has {row[1]} tokens and {row[2]} pictures, more than a pack of {max_tokens} tokens and "
                f"{max_pictures} pictures holds. Raise --pack_tokens or --pack_pictures."
            )
        waiting[arrival] = row
        insort(by_length, (row[1], arrival))
        if len(waiting) >= look_ahead:
            yield fill()
    while waiting:
        yield fill()


class GlobalBatchSampler(Sampler):
    """Yield this rank's micro-batches of (epoch, indices), the same global batches whatever the number of ranks.

    Args:
        plan: what the global batches of an epoch are: `LikeLengths` or `Packs`.
        micro_batch_size: units that one rank puts through the model at once.
        start_step: optimizer steps already taken; nothing before them is read.
    """

    def __init__(self, plan: LikeLengths | Packs, micro_batch_size: int, rank=0, world_size=1, start_step=0):
        if plan.batch_size % world_size:
            raise ValueError(f"batch_size={plan.batch_size} does not divide by {world_size} ranks. Use a multiple.")
        self.plan, self.start_step, self.rank, self.world_size = plan, start_step, rank, world_size
        self.accumulation = -(-plan.batch_size // (world_size * micro_batch_size))

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        epoch, step = self.place(self.start_step)
        while True:
            for batch in self.plan.batches(epoch)[step:]:
                mine = batch[self.rank :: self.world_size]
                for i in range(self.accumulation):
                    yield [(epoch, unit) for unit in mine[i :: self.accumulation]]
            epoch, step = epoch + 1, 0

    def place(self, step: int) -> tuple[int, int]:
        """Epoch of a step and its number in that epoch, all from 0."""
        epoch = 0
        while step >= self.plan.steps(epoch):
            step -= self.plan.steps(epoch)
            epoch += 1
        return epoch, step

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, at least one."""
        whole = int(epochs)
        part = round((epochs - whole) * self.plan.steps(whole)) if epochs > whole else 0
        return max(1, sum(map(self.plan.steps, range(whole))) + part)


class Lengths(torch.utils.data.Dataset):
    """Tokens and pictures of the rows, block by block; 0 and 0 for a bad row, which is counted when it is drawn."""

    BLOCK = 256

    def __init__(self, rows: Rows, encoder: Encoder):
        self.rows, self.encoder = rows, encoder

    def __len__(self) -> int:
        return -(-len(self.rows) // self.BLOCK)

    def __getitem__(self, block: int) -> list[tuple[int, int]]:
        start, found = block * self.BLOCK, []
        for sample in self.rows.select(range(start, min(start + self.BLOCK, len(self.rows)))).samples():
            try:
                if isinstance(sample, BadRow):
                    raise sample
                found.append(self.encoder.size(sample))
            except BadRow:
                found.append((0, 0))
        return found


def measure(rows: Rows, encoder: Encoder, workers: int = 0, quiet: bool = False) -> tuple[list[int], list[int]]:
    """Tokens and pictures of each row, without decoding a picture."""
    blocks = DataLoader(Lengths(rows, encoder), batch_size=None, num_workers=workers, collate_fn=list)
    bar = tqdm(total=len(rows), desc="measuring rows", unit="row", disable=quiet)
    found = []
    for block in blocks:
        found += block
        bar.update(len(block))
    bar.close()
    return [tokens for tokens, _ in found], [pictures for _, pictures in found]


# ------------------------------------------------------------------------------------------------- collators


def _finish(batch: dict, labels: torch.Tensor, samples: list[dict]) -> dict:
    """Add what both collators share: the positions that predict answers and the answers, pictures, bad rows."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, T): what each position predicts
    batch["logits_to_keep"] = targets != IGNORE
    batch["shift_labels"] = targets[batch["logits_to_keep"]][None]  # (1, K)
    pixels = [sample["pixel_values"] for sample in samples if len(sample["pixel_values"])]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    batch["rows"] = [row for sample in samples for row in sample["rows"]]
    batch["bad_rows"] = [bad for sample in samples for bad in sample["bad_rows"]]
    batch["epoch"] = max(sample["epoch"] for sample in samples)
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

    def __call__(self, packs: list[list[dict]]) -> dict:
        """Return `input_ids`, `position_ids`, `logits_to_keep` (1, T), `shift_labels` (1, K) and `pixel_values`."""
        samples = [sample for pack in packs for sample in pack]
        if any(sample["branch"].max() > 1 for sample in samples):
            raise ValueError("Rows that share a picture cannot be packed: position_ids cannot say what they may see.")
        samples = with_picture(samples, self.blank)
        batch = {key: torch.cat([s[key] for s in samples])[None] for key in ("input_ids", "position_ids")}
        return _finish(batch, torch.cat([own_labels(s) for s in samples])[None], samples)
