"""Make batches of data that is read in order and never held as a whole: stages 5 to 7 for large sets and the Hub.

    streams -> mixed and shuffled rows -> units, or packs -> micro-batches of one rank and worker

Every worker of every rank reads and tokenizes all rows, so all plan the same batches and need not communicate. A
picture is decoded only by the worker whose batch has it. So a batch depends on (seed, step) alone, for any number of
ranks and workers. A run that is resumed reads the rows before its step once more.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice

from torch.utils.data import IterableDataset, get_worker_info

from minivlm.data.bad_rows import BadRow
from minivlm.data.encoder import Encoder, join
from minivlm.data.options import DataArgs
from minivlm.data.pictures import augment
from minivlm.data.plans import PackBudget, pack
from minivlm.data.rows import StreamSource


@dataclass
class Item:
    """A row that is tokenized and whose pictures are not decoded yet."""

    epoch: int
    place: str  # file and row number, from 0
    sample: dict
    tokens: int
    pictures: int
    bad_rows: list = field(default_factory=list)  # (place, reason) of bad rows between the item before and this one


class StreamedBatches(IterableDataset):
    """Yield the collated micro-batches of one rank and worker, one epoch after another, without end.

    Args:
        streams: the sources; files of one source share its number of `args.mix`.
        collate: `PaddingCollator` or, with `args.packing`, `PackingCollator`.
        args: filter, mix, packing, batch sizes, augmentation and seed.
        start_step: optimizer steps already taken. They are planned again, but none of their pictures is decoded.
    """

    BUFFER = 1000  # rows among which the order is shuffled
    WINDOW = 8  # batches that are sorted by length together

    def __init__(
        self,
        streams: list[StreamSource],
        encoder: Encoder,
        collate: Callable,
        args: DataArgs,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ):
        if args.batch_size % world_size:
            raise ValueError(f"batch_size={args.batch_size} does not divide by {world_size} ranks. Use a multiple.")
        self.streams, self.encoder, self.collate = streams, encoder, collate
        self.batch_size, self.seed, self.augment = args.batch_size, args.seed, args.augment
        self.filter = args.filter or {}
        self.budget = PackBudget(args.pack_tokens, args.pack_pictures) if args.packing else None
        files = Counter(stream.number for stream in streams)
        self.shares = [args.mix[s.number] / files[s.number] if args.mix else 1.0 for s in streams]
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.accumulation = -(-args.batch_size // (world_size * args.micro_batch_size))
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
        """Yield the batches of all ranks together, each a list of units; a unit is a list of one item, or a pack."""
        if self.budget is None:
            yield from self.padded()
            return
        packs = self.packs()
        while True:
            yield list(islice(packs, self.batch_size))

    def packs(self) -> Iterator[list[Item]]:
        """Yield the packs of one epoch after another; no pack holds rows of two epochs."""
        for _, items in groupby(self.items(), key=lambda item: item.epoch):
            yield from pack(((item, item.tokens, item.pictures) for item in items), self.budget)

    def padded(self) -> Iterator[list[list[Item]]]:
        """Yield batches of items of similar length, which need little padding."""
        items = self.items()
        for window in iter(lambda: list(islice(items, self.WINDOW * self.batch_size)), []):
            window.sort(key=lambda item: item.tokens)
            batches = [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
            random.Random(f"{self.seed}/{window[0].place}/{window[0].epoch}").shuffle(batches)
            for batch in batches:
                yield [[item] for item in batch]

    def items(self) -> Iterator[Item]:
        """Yield the good rows of one epoch after another; each carries the bad rows that came just before it."""
        epoch, bad = 0, []  # bad rows behind the last good one come with the first good one of the next epoch
        while True:
            good = 0
            for stream, index, row in self.shuffled(epoch):
                place = f"{stream.name}, row {index}"
                try:
                    sample = stream.sample(row)
                    tokens, pictures = self.encoder.size(sample)
                    if self.budget and pictures > self.budget.pictures:
                        raise BadRow(f"{pictures} pictures, more than pack_pictures={self.budget.pictures}")
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

    def shuffled(self, epoch: int) -> Iterator[tuple[StreamSource, int, dict]]:
        """Yield the rows of an epoch, shuffled within a buffer."""
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

    def mixed(self, epoch: int) -> Iterator[tuple[StreamSource, int, dict]]:
        """Yield (source, row number, stored row) of an epoch; the source of each is drawn by weight."""
        rng, shares = random.Random(f"{self.seed}/{epoch}/mix"), list(self.shares)
        readers = [enumerate(stream.read()) for stream in self.streams]
        while any(shares):
            source = rng.choices(range(len(readers)), shares)[0]
            index, row = next(readers[source], (None, None))
            if row is None:
                shares[source] = 0
            elif all(row.get(column) in values for column, values in self.filter.items()):
                yield self.streams[source], index, row

    def encode(self, unit: list[Item]) -> list[dict] | dict:
        """Return a unit as its collator takes it; a row whose picture cannot be read is replaced by a blank one."""
        samples = []
        for item in unit:
            change, bad = None, list(item.bad_rows)
            if self.augment != "none":
                rng = random.Random(f"{self.seed}/{item.epoch}/{item.place}")
                change = partial(augment, rng=rng, strong=self.augment == "strong")
            try:
                sample = self.encoder(item.sample, change)
                bad += [(item.place, note) for note in sample["notes"]]
                sample = {**sample, "place": item.place}
                samples.append(join([sample], self.encoder.processor.image_token_id, bad, item.epoch))
            except BadRow as error:
                bad.append((item.place, str(error)))
                samples.append({**self.blank, "bad_rows": bad, "epoch": item.epoch})
        return samples[0] if self.budget is None else samples
