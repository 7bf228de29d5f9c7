"""Batches from data that is read in order and never held whole: sets larger than the disk, and the Hub.

    streams -> mixed and shuffled rows -> units, or packs -> this rank's and worker's micro-batches

Every worker of every rank reads all rows and their words, so all agree on what each batch holds without a word between
them; pictures are decoded only by the worker whose batch they are in. The batch of a step therefore follows from
(seed, step) alone, whatever the number of ranks and workers; after a restart the rows before it are read once more.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice

from torch.utils.data import IterableDataset, get_worker_info

from batching_minivlm import pack
from data_minivlm import Encoder, augment, share_prefix
from sources_minivlm import BadRow, Stream


@dataclass
class Item:
    """A row whose words are known and whose pictures are not decoded yet."""

    epoch: int
    place: str  # file and row number, from 0
    sample: dict
    tokens: int
    pictures: int
    bad_rows: list = field(default_factory=list)  # place and reason of bad rows met since the item before


class StreamedBatches(IterableDataset):
    """This rank's and worker's collated micro-batches of endless epochs.

    Args:
        collate: `PaddingCollator` or, with `max_tokens`, `PackingCollator`.
        batch_size: rows or packs of one optimizer step, over all ranks and micro-batches.
        micro_batch_size: rows or packs that one rank puts through the model at once.
        weights: how often a source is drawn from relative to the others, until it is at its end; equal if None. The
            files of a source share its weight.
        keep: columns and the values of which a row must hold one.
        pack_budget: most tokens and most pictures of a pack; None pads rows of like length instead.
        start_step: optimizer steps already taken: they are planned again, but no picture of them is decoded.
    """

    BUFFER = 1000  # rows among which the order is shuffled
    WINDOW = 8  # batches that are sorted by length together

    def __init__(
        self,
        streams: list[Stream],
        encoder: Encoder,
        collate: Callable,
        batch_size: int,
        micro_batch_size: int,
        *,
        weights: list[float] | None = None,
        keep: dict[str, list] | None = None,
        pack_budget: tuple[int, int] | None = None,
        augment: str = "none",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ):
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not divide by {world_size} ranks. Use a multiple.")
        self.streams, self.encoder, self.collate, self.batch_size = streams, encoder, collate, batch_size
        self.keep, self.pack_budget = keep or {}, pack_budget
        files = Counter(stream.source for stream in streams)
        self.weights = [weights[s.source] / files[s.source] if weights else 1.0 for s in streams]
        self.augment, self.seed, self.rank, self.world_size = augment, seed, rank, world_size
        self.start_step = start_step
        self.accumulation = -(-batch_size // (world_size * micro_batch_size))
        self.blank = encoder.blank()

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        count = 0
        for batch in islice(self.batches(), self.start_step, None):
            mine = batch[self.rank :: self.world_size]
            for i in range(self.accumulation):
                if count % workers == number:
                    units = mine[i :: self.accumulation]
                    yield self.collate([self.encode(unit) for unit in units])
                count += 1

    def batches(self) -> Iterator[list[list[Item]]]:
        """Global batches of units; a unit is a list of one item, or of those of a pack."""
        if self.pack_budget is None:
            yield from self.like_lengths()
            return
        packs = self.packs()
        while True:
            yield list(islice(packs, self.batch_size))

    def packs(self) -> Iterator[list[Item]]:
        """Packs of one epoch after another; none holds rows of two."""
        for _, items in groupby(self.items(), key=lambda item: item.epoch):
            yield from pack(((item, item.tokens, item.pictures) for item in items), *self.pack_budget)

    def like_lengths(self) -> Iterator[list[list[Item]]]:
        items = self.items()
        for window in iter(lambda: list(islice(items, self.WINDOW * self.batch_size)), []):
            window.sort(key=lambda item: item.tokens)
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            random.Random(f"{self.seed}/{window[0].place}/{window[0].epoch}").shuffle(batches)
            for batch in batches:
                yield [[item] for item in batch]

    def items(self) -> Iterator[Item]:
        """The good rows of one epoch after another; every item brings the bad rows before it."""
        epoch, bad = 0, []  # bad rows behind the last good one are brought by the first of the next epoch
        while True:
            good = 0
            for stream, index, row in self.shuffled(epoch):
                place = f"{stream.name}, row {index}"
                try:
                    sample = stream.sample(row)
                    tokens, pictures = self.encoder.size(sample)
                    if self.pack_budget and pictures > self.pack_budget[1]:
                        raise BadRow(f"{pictures} pictures, more than pack_pictures={self.pack_budget[1]}")
                except BadRow as error:
                    bad.append((place, str(error)))
                    continue
                yield Item(epoch, place, sample, tokens, pictures, bad)
                bad, good = [], good + 1
            if not good:
                names = ", ".join(stream.name for stream in self.streams)
                example = f" {len(bad)} are bad, the first {bad[0][0]}: {bad[0][1]}." if bad else ""
                raise ValueError(f"{names}: a whole epoch without a row to train on.{example}")
            epoch += 1

    def shuffled(self, epoch: int) -> Iterator[tuple[Stream, int, dict]]:
        """The rows of an epoch, shuffled within a buffer."""
        rng, buffer = random.Random(f"{self.seed}/{epoch}/shuffle"), []
        for row in self.mixed(epoch):
            if len(buffer) < self.BUFFER:
                buffer.append(row)
                continue
            place = rng.randrange(self.BUFFER)
            yield buffer[place]
            buffer[place] = row
        rng.shuffle(buffer)
        yield from buffer

    def mixed(self, epoch: int) -> Iterator[tuple[Stream, int, dict]]:
        """Rows of all sources, each next one from a source drawn by weight."""
        rng, weights = random.Random(f"{self.seed}/{epoch}/mix"), list(self.weights)
        readers = [enumerate(stream.read()) for stream in self.streams]
        while any(weights):
            source = rng.choices(range(len(readers)), weights)[0]
            index, row = next(readers[source], (None, None))
            if row is None:
                weights[source] = 0
            elif all(row.get(column) in values for column, values in self.keep.items()):
                yield self.streams[source], index, row

    def encode(self, unit: list[Item]) -> list[dict] | dict:
        """A unit as its collator wants it; a row whose picture cannot be read leaves a blank one in its place."""
        samples = []
        for item in unit:
            change, rows, bad = None, [item.place], list(item.bad_rows)
            if self.augment != "none":
                rng = random.Random(f"{self.seed}/{item.epoch}/{item.place}")
                change = partial(augment, rng=rng, strong=self.augment == "strong")
            try:
                sample = self.encoder(item.sample, change)
                bad += [(item.place, note) for note in sample["notes"]]
                sample = share_prefix([sample], self.encoder.processor.image_token_id)
            except BadRow as error:
                bad.append((item.place, str(error)))
                sample, rows = self.blank, []
            samples.append({**sample, "rows": rows, "bad_rows": bad, "epoch": item.epoch})
        return samples[0] if self.pack_budget is None else samples
