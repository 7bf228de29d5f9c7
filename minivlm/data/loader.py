"""Choose the rows and make the micro-batches of one rank, by the options of data: stage 8 of the data path."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch.utils.data import DataLoader

from minivlm.data.bad_rows import BadRow, describe_bad_rows, kind_of
from minivlm.data.composed import ComposedRows, Composer
from minivlm.data.dataset import TrainingRows
from minivlm.data.encoder import Encoder
from minivlm.data.options import DataArgs
from minivlm.data.plans import (
    GlobalBatchSampler,
    PackBudget,
    PackedPlan,
    PaddedPlan,
    draw_by_weight,
    measure,
    rows_by_picture,
)
from minivlm.data.rows import Rows, StreamSource, filter_rated, filter_rows, load_rows
from minivlm.data.streaming import StreamedBatches


@dataclass
class MicroBatches:
    """The micro-batches of one rank, without end.

    Args:
        loader: yields them, collated.
        accumulation: micro-batches of one optimizer step.
        sampler: None for streamed data, whose length is not known.
    """

    loader: DataLoader
    accumulation: int
    sampler: GlobalBatchSampler | None = None

    def __iter__(self) -> Iterator[dict]:
        return iter(self.loader)

    def steps(self, epochs: float) -> int | None:
        """Return the optimizer steps of so many epochs, None if nobody knows."""
        return None if self.sampler is None else self.sampler.steps(epochs)


def choose_rows(args: DataArgs, quiet: bool = False) -> Rows:
    """Load the sources and return the rows that `filter`, `min_rating` and `max_rows` leave."""
    rows = filter_rows(load_rows(args.data), args.filter or {})
    if args.min_rating:
        count, rows = len(rows), filter_rated(rows, args.min_rating)
        if not quiet:
            print(f"{count - len(rows):,} of {count:,} rows left out: no turn is rated as min_rating asks.")
    return rows.select(range(min(args.max_rows or len(rows), len(rows))))


def check_pictures(rows: Rows, train: list[str]) -> None:
    """Raise ValueError if parts that see are to train on rows without a single picture: they would only decay.

    Args:
        train: names of the parts that train, as for `--train`.
    """
    seeing = [part for part in train if part.startswith(("vision", "projector"))]
    bad = Counter()
    for sample in rows.samples() if seeing else []:
        if isinstance(sample, BadRow):
            bad[kind_of(sample)] += 1
            example = sample
        elif sample["images"]:
            return
    if bad:
        raise ValueError(f"No row has a picture that can be had:\n{describe_bad_rows(bad)}\nThe last: {example}.")
    if seeing:
        raise ValueError(f"No row has a picture for {' and '.join(seeing)} to learn from. Use --train text.")


def make_plan(rows: Rows, encoder: Encoder, args: DataArgs, quiet: bool = False) -> PaddedPlan | PackedPlan:
    """Return the plan that says which rows make each batch of an epoch."""
    units = rows_by_picture(rows, args.share_pictures) if args.share_pictures > 1 else [(i,) for i in range(len(rows))]
    draw = None
    if args.mix:
        draw = partial(draw_by_weight, [rows.source_number(unit[0]) for unit in units], args.mix)
    if args.packing:
        tokens, pictures = measure(rows, encoder, args.workers, quiet)
        budget = PackBudget(args.pack_tokens, args.pack_pictures)
        return PackedPlan(tokens, pictures, args.batch_size, budget, args.seed, draw)
    sizes = rows.sizes()
    return PaddedPlan(units, [sum(sizes[i] for i in unit) for unit in units], args.batch_size, args.seed, draw)


def make_loader(
    rows: Rows | Composer | list[StreamSource],
    encoder: Encoder,
    collate: Callable,
    args: DataArgs,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
) -> MicroBatches:
    """Return the micro-batches of one rank from `start_step` on; rank 0 shows the progress of measuring rows.

    Args:
        rows: from `choose_rows`, from `load_composer`, or with `args.streaming` from `load_streams`.
        collate: `PackingCollator` with `args.packing`, else `PaddingCollator`.
        start_step: optimizer steps already taken.
    """
    share = {"rank": rank, "world_size": world_size, "start_step": start_step}
    if args.streaming:
        order = StreamedBatches(rows, encoder, collate, args, **share)
        return MicroBatches(DataLoader(order, batch_size=None, num_workers=args.workers), order.accumulation)
    if isinstance(rows, Rows):
        plan = make_plan(rows, encoder, args, quiet=rank > 0)
        dataset = TrainingRows(rows, encoder, seed=args.seed, augment=args.augment, packed=args.packing)
    else:  # nobody knows the lengths of pictures that are not composed yet
        plan = PaddedPlan([(i,) for i in range(len(rows))], [0] * len(rows), args.batch_size, args.seed)
        dataset = ComposedRows(rows, encoder, args.share_pictures, args.data[0])
    sampler = GlobalBatchSampler(plan, args.micro_batch_size, **share)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers)
    return MicroBatches(loader, sampler.accumulation, sampler)
