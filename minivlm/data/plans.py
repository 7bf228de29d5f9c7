"""Decide which rows make a batch, and in which order batches come: stage 6 of the data path.

    rows -> units (a row, rows about one picture, or a pack) -> plan of an epoch -> sampler -> (epoch, unit)

The order depends on (seed, epoch, step) alone. It is the same for any number of ranks and workers, and in a run that
is resumed.
"""

import random
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from minivlm.data.bad_rows import BadRow
from minivlm.data.encoder import Encoder
from minivlm.data.rows import Rows


def rows_by_picture(rows: Rows, most: int) -> list[tuple[int, ...]]:
    """Group rows that share a picture; split groups larger than `most` evenly.

    Rows share a picture if their pictures, and all messages up to the last of them, are equal.
    """
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
    """Return a hash of a sample's pictures and of all messages up to the last of them; None without pictures."""
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
    """Return the numbers of `count` units, each once, in random order."""
    order = list(range(count))
    rng.shuffle(order)
    return order


def draw_by_weight(sources: list[int], shares: list[float], rng: random.Random) -> list[int]:
    """Draw unit numbers, as many as there are units, so that each source has its share of them.

    A source whose share is smaller than its number of units gives a random part of them, a new one each epoch. The
    units of a source with a larger share are repeated, as evenly as possible.

    Args:
        sources: number of the source of each unit.
        shares: one number per source, relative to one another.
    """
    members: list[list[int]] = [[] for _ in shares]
    for unit, source in enumerate(sources):
        members[source].append(unit)
    if not all(members):
        raise ValueError(f"mix: source {members.index([]) + 1} of --data has no rows left. Leave it out of --data.")
    ends = [round(len(sources) * end / sum(shares)) for end in accumulate(shares)]
    order = []
    for units, start, end in zip(members, [0, *ends], ends):
        repeats, rest = divmod(end - start, len(units))
        order += units * repeats + rng.sample(units, rest)
    rng.shuffle(order)
    return order


class PaddedPlan:
    """Plan an epoch: shuffle the units by (seed, epoch), then cut batches of similar length, which need less padding.

    Units that do not fill the last batch are left out of this epoch; the next epoch shuffles all again.

    Args:
        units: row numbers of each unit.
        lengths: a number per unit that grows with its tokens.
        batch_size: units of one optimizer step, over all ranks and micro-batches.
        draw: returns the unit numbers of an epoch, given a random number generator. Default: each once.
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
        """Return the number of batches in an epoch."""
        return len(self.units) // self.batch_size

    def batches(self, epoch: int) -> list[list[tuple[int, ...]]]:
        """Return the batches of an epoch, each a list of units."""
        rng = random.Random(f"{self.seed}/{epoch}")
        order = self.draw(rng)[: self.steps(epoch) * self.batch_size]
        window, batches = self.WINDOW * self.batch_size, []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        rng.shuffle(batches)
        return [[self.units[unit] for unit in batch] for batch in batches]


@dataclass(frozen=True)
class PackBudget:
    """Limits of a pack: most tokens and most pictures."""

    tokens: int
    pictures: int


class PackedPlan:
    """Plan an epoch: shuffle the rows by (seed, epoch), then fill packs with them; the units are the packs.

    Packs that do not fill the last batch are left out of this epoch; the next epoch shuffles all again.

    Args:
        tokens: tokens of each row.
        pictures: pictures of each row.
        batch_size: packs of one optimizer step, over all ranks and micro-batches.
        budget: limits of a pack.
        draw: as for `PaddedPlan`, but it returns row numbers.
    """

    def __init__(self, tokens, pictures, batch_size: int, budget: PackBudget, seed: int = 0, draw=None):
        self.draw = draw or partial(shuffled, len(tokens))
        self.tokens, self.pictures, self.batch_size = tokens, pictures, batch_size
        self.budget, self.seed = budget, seed
        self.counts: dict[int, int] = {}  # epoch -> its number of batches
        self.planned: tuple[int, list] = (-1, [])  # the last epoch that was asked for, and its packs
        if not self.steps(0):
            raise ValueError(
                f"The data fills {len(self.packs(0))} packs of {budget.tokens} tokens and {budget.pictures} pictures, "
                f"fewer than batch_size={batch_size}. Lower --batch_size or --pack_tokens."
            )

    def steps(self, epoch: int) -> int:
        """Return the number of batches in an epoch."""
        if epoch not in self.counts:
            self.counts[epoch] = len(self.packs(epoch)) // self.batch_size
        return self.counts[epoch]

    def packs(self, epoch: int) -> list[tuple[int, ...]]:
        """Return the packs of an epoch, each the numbers of its rows."""
        if self.planned[0] != epoch:
            order = self.draw(random.Random(f"{self.seed}/{epoch}"))
            rows = ((index, self.tokens[index], self.pictures[index]) for index in order)
            self.planned = epoch, [tuple(keys) for keys in pack(rows, self.budget)]
        return self.planned[1]

    def batches(self, epoch: int) -> list[list[tuple[int, ...]]]:
        """Return the batches of an epoch, each a list of packs."""
        packs, size = self.packs(epoch), self.batch_size
        return [packs[i : i + size] for i in range(0, self.steps(epoch) * size, size)]


class WaitingRows:
    """Rows (key, tokens, pictures) that wait for a pack, found by their arrival and by their length."""

    def __init__(self):
        self.rows: dict[int, tuple] = {}  # arrival -> row; the row that has waited longest comes first
        self.by_length: list[tuple[int, int]] = []  # (tokens, arrival), sorted

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, arrival: int, row: tuple) -> None:
        """Add a row that arrives later than all others."""
        self.rows[arrival] = row
        insort(self.by_length, (row[1], arrival))

    def take(self, arrival: int) -> tuple:
        """Remove and return a row."""
        row = self.rows.pop(arrival)
        del self.by_length[bisect_right(self.by_length, (row[1], arrival)) - 1]
        return row

    def longest_fitting(self, tokens: int) -> int:
        """Return the place in `by_length` of the longest row of at most so many tokens; -1 if there is none."""
        return bisect_right(self.by_length, (tokens, float("inf"))) - 1

    def take_pack(self, budget: PackBudget) -> list:
        """Remove the row that has waited longest and the rows that fill its pack; return their keys."""
        key, tokens, pictures = self.take(next(iter(self.rows)))
        keys = [key]
        place = self.longest_fitting(budget.tokens - tokens)
        while place >= 0:
            arrival = self.by_length[place][1]
            if pictures + self.rows[arrival][2] > budget.pictures:
                place -= 1
                continue
            row = self.take(arrival)
            keys, tokens, pictures = [*keys, row[0]], tokens + row[1], pictures + row[2]
            place = min(place - 1, self.longest_fitting(budget.tokens - tokens))
        return keys


def pack(rows: Iterable[tuple], budget: PackBudget, look_ahead: int = 512) -> Iterator[list]:
    """Put rows together so that few tokens of a pack stay empty; each row is in exactly one pack, uncut.

    A pack starts with the row that has waited longest, so no row waits for ever. Then it takes the longest row that
    still fits, until none does. With `look_ahead` rows to choose from, one of them nearly always fills the gap.

    Args:
        rows: (key, tokens, pictures) of each.
        look_ahead: rows that wait at most.

    Yields:
        The keys of a pack.

    Raises:
        ValueError: a row is larger than a pack.
    """
    waiting = WaitingRows()
    for arrival, row in enumerate(rows):
        if row[1] > budget.tokens or row[2] > budget.pictures:
            raise ValueError(
                f"Row {row[0]} has {row[1]} tokens and {row[2]} pictures, more than a pack of {budget.tokens} tokens "
                f"and {budget.pictures} pictures holds. Raise --pack_tokens or --pack_pictures."
            )
        waiting.add(arrival, row)
        if len(waiting) >= look_ahead:
            yield waiting.take_pack(budget)
    while len(waiting):
        yield waiting.take_pack(budget)


class GlobalBatchSampler(Sampler):
    """Yield one rank's micro-batches of (epoch, unit), without end; all ranks together have the batches of the plan.

    Args:
        plan: gives the batches of each epoch.
        micro_batch_size: units that one rank puts through the model at once.
        start_step: optimizer steps already taken; their rows are not read again.
    """

    def __init__(self, plan: PaddedPlan | PackedPlan, micro_batch_size: int, rank=0, world_size=1, start_step=0):
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
        """Return the epoch of a step and the step's number in it, both from 0."""
        epoch = 0
        while step >= self.plan.steps(epoch):
            step -= self.plan.steps(epoch)
            epoch += 1
        return epoch, step

    def steps(self, epochs: float) -> int:
        """Return the optimizer steps of so many epochs, at least one."""
        whole = int(epochs)
        part = round((epochs - whole) * self.plan.steps(whole)) if epochs > whole else 0
        return max(1, sum(map(self.plan.steps, range(whole))) + part)


class RowSizes(torch.utils.data.Dataset):
    """Give tokens and pictures of the rows, block by block; (0, 0) for a bad row, which is reported when drawn."""

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
    """Return the tokens of each row and the pictures of each row; no picture is decoded."""
    blocks = DataLoader(RowSizes(rows, encoder), batch_size=None, num_workers=workers, collate_fn=list)
    bar = tqdm(total=len(rows), desc="measuring rows", unit="row", disable=quiet)
    found = []
    for block in blocks:
        found += block
        bar.update(len(block))
    bar.close()
    return [tokens for tokens, _ in found], [pictures for _, pictures in found]
