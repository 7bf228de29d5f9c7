"""Read sources into samples, whatever layouts they mix: stage 3 of the data path.

    file, folder, glob or Hub data set -> stored row -> row -> schema -> {"images": [...], "messages": [...]}

`load_rows` gives `Rows`, one list over all files; `load_streams` gives one `StreamSource` per file, which is read in
order and never held as a whole. A row that cannot be used raises `BadRow`, which the trainer counts: none disappears.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path

from datasets import Dataset
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from minivlm.data.bad_rows import BadRow
from minivlm.data.files import FORMATS, find_files, from_shard, load_hub, stream_hub
from minivlm.data.pictures import locate
from minivlm.data.schemas import drop_low_rated, find_schema, good_turns, schema_by_name

WORD_COLUMNS = ("json", "txt", "conversations", "texts", "messages", "text", "caption", "question", "answer")
# Errors of Python, json and Pillow for a row that is not in the form that its columns promise.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError, OSError, Image.DecompressionBombError)


@dataclass(kw_only=True)
class Source:
    """Rows of one file or Hub data set: the fields that tables and streams share."""

    name: str
    root: Path  # folder that pictures may be read from
    schema: Callable[[dict], dict] | None = None  # None: chosen by each row's columns
    unpack: Callable[[dict], dict] | None = None  # stored row -> row; None: they are the same
    min_rating: dict[str, float] = field(default_factory=dict)  # see `drop_low_rated`
    number: int = 0  # place among the sources that the user named, from 0; files of one folder share it

    def unpacked(self, stored: dict) -> dict:
        """Return the row with all its columns."""
        return stored if self.unpack is None else self.unpack(stored)

    def sample(self, stored: dict) -> dict:
        """Return the sample of a stored row: `{"images", "messages"}`, each picture encoded or the path of a file.

        Raises:
            BadRow: the row is not in the form that its columns promise, or one of its pictures cannot be had.
        """
        row = self.unpacked(stored)
        schema = self.schema or find_schema(row)
        try:
            sample = schema(drop_low_rated(row, self.min_rating))
            return {**sample, "images": [locate(image, self.root) for image in sample["images"]]}
        except BadRow:
            raise
        except MALFORMED as error:
            raise BadRow(f"not in the form of {schema.__name__}: {type(error).__name__}: {error}") from error

    def check_columns(self, columns) -> None:
        """Raise ValueError if no schema was named and these columns fit none."""
        if self.schema is None:
            try:
                find_schema(columns)
            except BadRow as error:
                raise ValueError(f"{self.name}: {error}.") from error


@dataclass(kw_only=True)
class TableSource(Source):
    """A source that is held as a table, so that any of its rows can be read."""

    table: Dataset

    def __post_init__(self):
        # Arrow's own values: the library's format would decode pictures, and raise for a broken one.
        self.table = self.table.with_format("arrow")
        if self.unpack is None and {"__key__", "__url__"} <= set(self.table.column_names):
            self.unpack = from_shard
        self.columns = self.table.column_names if self.unpack is None else list(self.first_good_row())
        self.check_columns(self.columns)

    def first_good_row(self) -> dict:
        """Return the first row that can be unpacked."""
        problem = None
        for index in range(len(self.table)):
            try:
                return self[index]
            except BadRow as error:
                problem = problem or error
        raise ValueError(f"{self.name}: none of its {len(self.table)} rows can be read, the first for: {problem}.")

    def stored(self, key: int | list[int]) -> list[dict]:
        """Return one or several stored rows, read at once."""
        return self.table[key].to_pylist()

    def __getitem__(self, index: int) -> dict:
        return self.unpacked(self.stored(index)[0])

    def samples(self, indices: list[int]) -> Iterator[dict | BadRow]:
        """Yield the samples of these rows; for a bad row its `BadRow`."""
        for stored in self.stored(indices):
            try:
                yield self.sample(stored)
            except BadRow as error:
                yield error

    def column(self, name: str) -> list:
        """Return a column's value of each row."""
        if name not in self.columns:
            raise KeyError(f"{self.name} has no column {name!r}. It has {', '.join(self.columns)}.")
        if self.unpack is None:
            return self.table.data.column(name).to_pylist()
        values = []
        for index in range(len(self.table)):
            try:
                values.append(self[index].get(name))
            except BadRow as error:
                raise ValueError(f"{self.name}, row {index}: {error}. A column needs every row: mend it.") from error
        return values

    def sizes(self) -> list[int]:
        """Return the bytes of text of each row."""
        names = [name for name in WORD_COLUMNS if name in self.table.column_names]
        columns = [self.table.data.column(name).to_pylist() for name in names]
        sizes = [0] * len(self.table)
        for column in columns:
            for i, value in enumerate(column):
                sizes[i] += len(value if isinstance(value, bytes) else str(value).encode())
        return sizes


@dataclass(kw_only=True)
class StreamSource(Source):
    """A source whose rows are read one after another and never held all at once."""

    read: Callable[[], Iterator[dict]]  # starts at the first stored row


class Rows(Sequence):
    """Rows of several sources, which need not have the same layout, in the order given.

    `rows[i]` is a row with all its columns, `rows["name"]` a column of every source, `rows.sample(i)` the sample.

    Args:
        sources: the tables.
        indices: which rows, in which order, counted through all tables. Default: all.
    """

    def __init__(self, sources: list[TableSource], indices: Sequence[int] | None = None):
        self.sources = sources
        self.ends = list(accumulate(len(source.table) for source in sources))
        self.indices = range(self.ends[-1]) if indices is None else indices
        self.column_names = [name for name in sources[0].columns if all(name in source.columns for source in sources)]

    def __len__(self) -> int:
        return len(self.indices)

    def _find(self, index: int) -> tuple[TableSource, int]:
        index = self.indices[index]
        number = bisect_right(self.ends, index)
        return self.sources[number], index - (self.ends[number - 1] if number else 0)

    def __getitem__(self, key: int | str) -> dict | list:
        if isinstance(key, str):
            return self._gather([source.column(key) for source in self.sources])
        source, index = self._find(key)
        return source[index]

    def _gather(self, columns: list[list]) -> list:
        values = [value for column in columns for value in column]
        return [values[index] for index in self.indices]

    def select(self, indices: Sequence[int]) -> "Rows":
        """Return the rows at these positions, in this order."""
        return Rows(self.sources, [self.indices[index] for index in indices])

    def sizes(self) -> list[int]:
        """Return the bytes of text of each row, by which rows of similar length are found."""
        return self._gather([source.sizes() for source in self.sources])

    def source_number(self, index: int) -> int:
        """Return the number of the source that a row is from, from 0, in the order in which sources were named."""
        return self._find(index)[0].number

    def where(self, index: int) -> str:
        """Return file and row number, from 0, for a message."""
        source, index = self._find(index)
        return f"{source.name}, row {index}"

    def sample(self, index: int) -> dict:
        """Return the sample of a row, as `Source.sample` does; raise `BadRow` if there is none."""
        source, position = self._find(index)
        return source.sample(source.stored(position)[0])

    def samples(self, block: int = 100) -> Iterator[dict | BadRow]:
        """Yield the sample of every row, the `BadRow` for a bad one; several times as fast as `sample` row by row."""
        for start in range(0, len(self), block):
            found = map(self._find, range(start, min(start + block, len(self))))
            for _, group in groupby(found, key=lambda place: id(place[0])):
                places = list(group)
                yield from places[0][0].samples([index for _, index in places])


def filter_rows(rows: Rows, wanted: dict[str, list]) -> Rows:
    """Return the rows whose column holds one of the values, for every column of `wanted`.

    Raises:
        ValueError: there is no such column, or no row is left.
    """
    for column, values in wanted.items():
        if column not in rows.column_names:
            raise ValueError(f"filter: no column {column!r}. The data has {', '.join(rows.column_names)}.")
        rows = rows.select([i for i, value in enumerate(rows[column]) if value in set(values)])
        if not len(rows):
            raise ValueError(f"filter: no row has a {column} among {', '.join(map(str, values))}.")
    return rows


def filter_rated(rows: Rows, min_rating: dict[str, float]) -> Rows:
    """Return the rows with turns that are rated highly enough; their samples have only these turns.

    Sources without ratings keep all their rows and turns.

    Raises:
        ValueError: no source has such a rating, or no row is left.
    """
    found = {name.removesuffix("_ratings") for source in rows.sources for name in source.columns if "_ratings" in name}
    for name in min_rating.keys() - found:
        known = f"Ratings are {', '.join(sorted(found))}." if found else "No column ends in _ratings."
        raise ValueError(f"min_rating: the data has no rating {name!r}. {known}")
    good = []
    for source in rows.sources:
        names = [name for name in source.columns if name.removesuffix("_ratings") in min_rating]
        ratings = zip(*map(source.column, names)) if names else [()] * len(source.table)  # pictures stay unread
        # A row whose ratings cannot be had stays, to be counted as a bad one when it is drawn.
        good += [good_turns(dict(zip(names, values)), min_rating) for values in ratings]
    kept = [index for index in rows.indices if good[index] is None or any(good[index])]
    if not kept:
        raise ValueError(f"min_rating: no turn of {len(rows)} rows is rated so highly. Ask for less.")
    return Rows([replace(source, min_rating=min_rating) for source in rows.sources], kept)


def named_sources(sources: list[str]) -> Iterator[tuple[str, dict]]:
    """Yield each source's name without `::SCHEMA`, and its fields `schema` and `number`."""
    for number, source in enumerate(sources):
        name, _, forced = source.partition("::")
        yield name, {"schema": schema_by_name(forced) if forced else None, "number": number}


def load_rows(sources: list[str]) -> Rows:
    """Load files, folders, globs and Hub data sets, in the order given.

    A source is a parquet, jsonl, json or tar file, a folder or glob of such, or `hub:owner/name[:config[:split]]`.
    `::name` behind it forces a schema: `a.jsonl::trl`.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file cannot be read or has the columns of no known schema, or there are no rows at all.
    """
    tables = []
    for name, options in named_sources(sources):
        if name.startswith("hub:"):
            # Files that the library downloaded are named by their full path, which must lie in its own cache.
            tables.append(TableSource(name=name, root=Path(HF_HUB_CACHE), table=load_hub(name), **options))
            continue
        for file in find_files(name):
            form = FORMATS[file.suffix]
            table = form.read(file)
            if len(table):
                source = TableSource(name=str(file), root=file.parent, unpack=form.unpack, table=table, **options)
                tables.append(source)
    if not tables:
        raise ValueError(f"{', '.join(sources)}: no rows. Training needs at least one.")
    return Rows(tables)


def load_streams(sources: list[str], min_rating: dict[str, float] | None = None) -> list[StreamSource]:
    """Open the sources of `load_rows` as streams, one per file, and read only their first row.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file cannot be read or has the columns of no known schema.
    """
    streams = []
    for name, options in named_sources(sources):
        options["min_rating"] = min_rating or {}
        if name.startswith("hub:"):
            read = partial(stream_hub, name)
            streams.append(StreamSource(name=name, root=Path(HF_HUB_CACHE), read=read, **options))
            continue
        for file in find_files(name):
            form = FORMATS[file.suffix]
            read = partial(form.stream, file)
            streams.append(StreamSource(name=str(file), root=file.parent, unpack=form.unpack, read=read, **options))
    for stream in streams:
        row = next(stream.read(), {})
        if row and stream.unpack is None:
            stream.check_columns(row)
    return streams
