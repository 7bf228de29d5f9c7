"""Read stored rows from files and from the Hub: stage 1 of the data path.

`FORMATS` says for each suffix how a file is read as a table, how it is read row by row, and what unpacks a stored row.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pyarrow
from datasets import Dataset, IterableDataset, load_dataset
from pyarrow import parquet

from minivlm.data.bad_rows import BadRow
from minivlm.data.pictures import PICTURE_COLUMNS, PICTURE_SUFFIXES


def from_json(row: dict) -> dict:
    """Parse the text of a JSON row; rows are stored as text, since in Arrow a column has one type and in JSON many."""
    try:
        value = json.loads(row["json"])
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRow(f"not a JSON object: {type(value).__name__}")
    return value


def from_shard(row: dict) -> dict:
    """Join the files of a webdataset sample to one row: the json's keys, the txt as `text`, pictures as `images`."""
    fields = row.get("json") or {}
    fields = from_json(row) if isinstance(fields, str) else fields
    if not isinstance(fields, dict):
        raise BadRow(f"not a JSON object: {type(fields).__name__}")
    fields = {name: value for name, value in fields.items() if value is not None}  # Arrow fills absent keys with None
    if row.get("txt") is not None:
        fields.setdefault("text", row["txt"])
    names = [name for name in row if name.rpartition(".")[2].lower() in PICTURE_SUFFIXES and row[name] is not None]
    if names:
        fields = {name: value for name, value in fields.items() if name not in PICTURE_COLUMNS}
        fields["images"] = [row[name] for name in sorted(names, key=lambda name: (len(name), name))]  # 2.jpg < 10.jpg
    return fields


def read_parquet(file: Path) -> Dataset:
    """Return the table of a parquet file.

    Raises:
        ValueError: the file is not readable parquet.
    """
    try:
        metadata = parquet.read_metadata(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error}).") from error
    # The library cannot read a file without rows.
    return Dataset.from_parquet(str(file)) if metadata.num_rows else Dataset.from_dict({})


def read_json(file: Path) -> Dataset:
    """Return the rows of JSON lines or of one JSON list as a table with one column, `json`: the text of each row.

    Raises:
        ValueError: the file is a list that is not readable JSON.
    """
    content = file.read_bytes()
    if content.lstrip()[:1] == b"[":
        try:
            lines = [json.dumps(row).encode() for row in json.loads(content)]
        except ValueError as error:
            raise ValueError(f"{file}: not a readable JSON file ({error}).") from error
    else:
        lines = [line for line in content.split(b"\n") if line.strip()]
    return Dataset(pyarrow.table({"json": pyarrow.array(lines, pyarrow.large_binary())}))


def read_tar(file: Path) -> Dataset:
    """Return the samples of a webdataset shard as a table.

    Raises:
        ValueError: the file is not a readable shard.
    """
    try:
        return load_dataset("webdataset", data_files=str(file), split="train")
    except Exception as error:  # the library raises its own classes, pyarrow's and tarfile's, each for a broken shard
        raise ValueError(f"{file}: not a readable webdataset shard ({error.__cause__ or error}).") from error


def every_row(data: IterableDataset) -> Iterator[dict]:
    """Yield the rows of a streamed data set, pictures undecoded, the same in every worker.

    Iterated directly, the library would give each worker of a DataLoader its own share of the rows, and leave out what
    does not divide; it does not do so with batches, so these are batches of one.
    """
    for batch in data.decode(False).iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def stream_library(file: Path) -> Iterator[dict]:
    """Yield the stored rows of a parquet file or a webdataset shard, pictures undecoded."""
    kind = "parquet" if file.suffix == ".parquet" else "webdataset"
    try:
        yield from every_row(load_dataset(kind, data_files=str(file), split="train", streaming=True))
    except Exception as error:  # the library raises its own classes, pyarrow's and tarfile's
        raise ValueError(f"{file}: not a readable {kind} file ({error.__cause__ or error}).") from error


def stream_json(file: Path) -> Iterator[dict]:
    """Yield the stored rows of a JSON file: `{"json": text}` each. A file that is one list is read whole first."""
    with open(file, "rb") as lines:
        start = lines.peek(64).lstrip()[:1]
        if start != b"[":
            yield from ({"json": line} for line in lines if line.strip())
            return
    yield from read_json(file).with_format("arrow").to_list()


@dataclass(frozen=True)
class Format:
    """Name the functions that read files with one suffix."""

    read: Callable[[Path], Dataset]  # the whole file as a table
    stream: Callable[[Path], Iterator[dict]]  # one stored row after another
    unpack: Callable[[dict], dict] | None = None  # stored row -> row; None: they are the same


FORMATS = {
    ".parquet": Format(read_parquet, stream_library),
    ".jsonl": Format(read_json, stream_json, from_json),
    ".json": Format(read_json, stream_json, from_json),
    ".tar": Format(read_tar, stream_library, from_shard),
}


def find_files(source: str) -> list[Path]:
    """Return the files of a source, sorted; of a folder all that can hold rows, also in folders inside it.

    Raises:
        FileNotFoundError: no file, folder or glob of that name has rows.
        ValueError: a file has a suffix that `FORMATS` does not know.
    """
    paths = [Path(source)] if Path(source).exists() else sorted(map(Path, glob(source, recursive=True)))
    files = []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.suffix in FORMATS) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{source}: no such file, folder or glob with rows ({', '.join(FORMATS)}).")
    for file in files:
        if file.suffix not in FORMATS:
            raise ValueError(f"{file}: rows are read from {', '.join(FORMATS)} files, not from this.")
    return files


def load_hub(source: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load the data set that `hub:owner/name[:config[:split]]` names; with `streaming` nothing is downloaded yet."""
    name, *rest = source.removeprefix("hub:").split(":")
    if len(rest) > 2 or "/" not in name:
        raise ValueError(
            f"{source}: a Hub data set is named hub:owner/name, hub:owner/name:config or hub:owner/name:config:split."
        )
    config, split = [*rest, "", ""][:2]
    return load_dataset(name, config or None, split=split or "train", streaming=streaming)


def stream_hub(source: str) -> Iterator[dict]:
    """Yield the stored rows of a data set on the Hub, pictures undecoded."""
    yield from every_row(load_hub(source, streaming=True))
