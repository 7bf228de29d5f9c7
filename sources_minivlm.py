"""Sources of training rows: every layout that a small vision-language trainer meets, read into one form.

    file, folder, glob or Hub data set -> row -> adapter -> {"images": [...], "messages": [...]}

`messages` have typed content: `{"type": "image"}` where a picture stands, `{"type": "text", "text": ...}` for words.
An adapter is chosen by the names of a row's columns, so one run may mix layouts. Pictures stay encoded, or paths, till
they are needed: what cannot be read is a `BadRow`, which the trainer counts, and never a row that disappears.
"""

import base64
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from io import BytesIO
from itertools import accumulate, groupby
from pathlib import Path

import pyarrow
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, UnidentifiedImageError, features
from pyarrow import parquet

IMAGE_MARKER = "<image>"  # how MiniMind-V, LLaVA and others write a picture into text
CAPTION_REQUEST = "Describe this picture."  # what the user says in a row that has only a caption
PICTURE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = (("text",), ("caption",), ("question", "answer"))
WORD_COLUMNS = ("json", "txt", "conversations", "texts", "messages", "text", "caption", "question", "answer")
# Of the forty formats that Pillow knows these are read, each with its suffixes: EPS, for one, would start Ghostscript.
# Many phones' JPEGs open as MPO, which Pillow does not list: its JPEG reader recognises them.
FORMATS = {
    "PNG": ("png",),
    "JPEG": ("jpg", "jpeg", "mpo"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
} | ({"AVIF": ("avif",)} if features.check("avif") else {})
PICTURE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
LOW_RATING = "below min_rating"  # kind of a row that is left out by choice
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}
# What Python, json and Pillow raise when a row is not what its columns promise.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, RecursionError, OSError, Image.DecompressionBombError)


class BadRow(ValueError):
    """A row that cannot be trained on: counted and skipped by the trainer, up to `--max_bad_rows`.

    Up to its first colon the message names the kind, under which such rows are counted.
    """


# -------------------------------------------------------------------------------------------------- adapters


def minimind_v(row: dict) -> dict:
    """MiniMind-V parquet: `conversations` (JSON string or list of {role, content}) and `image_bytes` (one or a list).

    A picture stands in the text as `<image>`. Text-only rows carry an 8 x 8 black picture, which is left out.
    """
    messages = [message(turn["role"], split_markers(turn["content"])) for turn in turns(row["conversations"])]
    images = as_list(row["image_bytes"])
    if not any(part["type"] == "image" for m in messages for part in m["content"]):
        images = [image for image in images if not is_placeholder(image)]
    return {"images": images, "messages": messages}


def llava(row: dict) -> dict:
    """LLaVA: `conversations` of {from: human | gpt | system, value}; `image` is one, a list or left out.

    MiniMind2-V writes {role, content} instead, and several pictures as "0.jpg, 1.jpg". Both mark them by `<image>`.
    """
    conversation, images = turns(row["conversations"]), pictures(row)
    who, what = ("role", "content") if "role" in conversation[0] else ("from", "value")
    if who == "role":
        images = [name for image in images for name in (image.split(",") if isinstance(image, str) else [image])]
        images = [image.strip() if isinstance(image, str) else image for image in images]
    return {"images": images, "messages": [message(turn[who], split_markers(turn[what])) for turn in conversation]}


def cauldron(row: dict) -> dict:
    """The Cauldron and FineVision: `images` and `texts`, a list of {user, assistant}. Pictures come first."""
    spoken = [message(role, turn[role]) for turn in turns(row["texts"]) for role in ("user", "assistant")]
    return pictures_first(spoken, pictures(row))


def trl(row: dict) -> dict:
    """TRL: `messages` of {role, content}, the content a string or typed; pictures in it, or in `images` or `image`.

    Strings have no place for a picture, so there they come first. In typed content they stand where it says.
    """
    conversation, images = turns(row["messages"]), pictures(row)
    if any(turn.get("tool_calls") for turn in conversation):
        raise BadRow("tool calls are not supported in messages")
    messages = [message(turn["role"], turn["content"]) for turn in conversation]
    if all(isinstance(turn["content"], str) for turn in conversation):
        return pictures_first(messages, images)
    parts = [part for turn in conversation if not isinstance(turn["content"], str) for part in turn["content"]]
    inline = [place for part in parts if (place := part.get("image") or part.get("url") or part.get("path"))]
    if inline and images:
        raise BadRow("pictures both inside the messages and beside them")
    return {"images": inline or images, "messages": messages}


def imagefolder(row: dict) -> dict:
    """A folder with `metadata.jsonl`: `file_name` (or `image`) and `text`, or `question` and `answer`."""
    images = pictures(row)
    if "question" in row:
        asked, said = row["question"], row["answer"]
    else:
        asked, said = CAPTION_REQUEST, row["text"] if "text" in row else row["caption"]
        if not images:
            raise BadRow("a caption without a picture")
    return pictures_first([message("user", asked), message("assistant", said)], images)


# Adapter -> sets of columns, any of which it recognises a row by. The first that fits is taken.
ADAPTERS = {
    minimind_v: [{"conversations", "image_bytes"}],
    llava: [{"conversations"}],
    cauldron: [{"texts"}],
    trl: [{"messages"}],
    imagefolder: [{picture, *words} for words in CAPTION_COLUMNS for picture in PICTURE_COLUMNS],
}


def find_adapter(columns) -> Callable[[dict], dict]:
    """Return the first adapter that knows these columns; raise `BadRow` if none does."""
    for adapter, known in ADAPTERS.items():
        if any(needed <= set(columns) for needed in known):
            return adapter
    known = "; ".join(
        f"{a.__name__} ({' or '.join(' + '.join(sorted(s)) for s in sets)})" for a, sets in ADAPTERS.items()
    )
    raise BadRow(f"columns {', '.join(columns)} fit no known schema: known are {known}")


def turns(value) -> list[dict]:
    """A conversation, which some files hold as a JSON string."""
    return json.loads(value) if isinstance(value, str) else value


def as_list(value) -> list:
    """One picture, a list of them, or nothing, as a list."""
    return value if isinstance(value, list) else [value] if value else []


def pictures(row: dict) -> list:
    """The pictures that a row names: of `images`, `image` and `file_name` the first that holds any."""
    return next((found for name in PICTURE_COLUMNS if (found := as_list(row.get(name)))), [])


def message(role: str, content: str | list[dict]) -> dict:
    """One turn with typed content, or a `BadRow` for a role or content that no chat template knows."""
    if role not in ROLES:
        raise BadRow(f"unknown role: {role!r}. Roles are {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": ROLES[role], "content": [typed_part(part) for part in parts]}


def typed_part(part: dict) -> dict:
    """A part of content without what else its source says about it."""
    if part["type"] == "image":
        return {"type": "image"}
    if part["type"] != "text":
        raise BadRow(f"unknown content: a part of type {part['type']!r}. Parts are text and image")
    if not isinstance(part["text"], str):
        raise BadRow(f"words that are not text: {type(part['text']).__name__}")
    try:
        part["text"].encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: legal in JSON, an exception in every tokenizer
        raise BadRow(f"words that are not text: {error}") from error
    return {"type": "text", "text": part["text"]}


def well_rated(row: dict, least: dict[str, float]) -> dict:
    """A FineVision row without the turns of which a rating is absent or below the least; without ratings as it is.

    `least` maps each rating, for example `relevance`, to the lowest value of `relevance_ratings`, one per turn, that
    is good enough (FineVision: Wiedmann et al. 2025, arXiv 2510.17269).
    """
    good = good_turns(row, least)
    if good is None:
        return row
    said = turns(row["texts"])
    if len(good) != len(said):
        raise BadRow(f"ratings and turns differ in number: {len(good)} and {len(said)}")
    if not any(good):
        raise BadRow(f"{LOW_RATING}: none of {len(said)} turns is good enough")
    return {**row, "texts": [turn for turn, keep in zip(said, good) if keep]}


def good_turns(row: dict, least: dict[str, float]) -> list[bool] | None:
    """Whether each turn is rated highly enough; None for a row without these ratings."""
    columns = [(row[f"{name}_ratings"], limit) for name, limit in least.items() if f"{name}_ratings" in row]
    each = [[value is not None and value >= limit for value in values or []] for values, limit in columns]
    return [all(turn) for turn in zip(*each)] if each else None


def pictures_first(messages: list[dict], images: list) -> dict:
    """A sample whose pictures stand before the words of the first user turn."""
    for i, turn in enumerate(messages):
        if turn["role"] == "user":
            turn = {**turn, "content": [{"type": "image"}] * len(images) + turn["content"]}
            return {"images": images, "messages": [*messages[:i], turn, *messages[i + 1 :]]}
    raise BadRow("no user turn: the conversation has nobody who asks")


def split_markers(text: str) -> list[dict]:
    """Turn "<image>\\nWhat is it?" into typed content. The line break beside a marker belongs to the chat template."""
    parts = []
    for i, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] * (i > 0)
        piece = piece.removeprefix("\n") if i else piece
        parts += [{"type": "text", "text": piece}] * bool(piece)
    return parts


def is_placeholder(image: bytes | dict) -> bool:
    """Whether a picture is the 8 x 8 black one that MiniMind-V puts into rows without a picture."""
    with open_picture(image["bytes"] if isinstance(image, dict) else image) as picture:
        return picture.size == (8, 8) and picture.convert("L").getextrema() == (0, 0)


# -------------------------------------------------------------------------------------------------- pictures


def open_picture(data: bytes | Path) -> Image.Image:
    """Open a picture, or the file that a path names, without decoding it.

    Raises:
        BadRow: it is in none of `FORMATS`.
        OSError: it cannot be read.
    """
    try:
        return Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=list(FORMATS))
    except UnidentifiedImageError as error:
        raise BadRow(f"unreadable picture: it is no {', '.join(FORMATS)} file. Convert it to one of these") from error


def locate(value, root: Path) -> bytes | Path | Image.Image:
    """A picture as a row gives it: encoded, as Pillow's, or the path of a file in `root`, for `decode_image`.

    Raises:
        BadRow: it is none of these, lies outside `root` or on the network, or is not there.
    """
    if isinstance(value, dict):  # the Image feature of `datasets`, not decoded
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes | Image.Image):
        return value
    if not isinstance(value, str):
        raise BadRow(f"not a picture: {type(value).__name__}. Use encoded bytes or the name of a file")
    if value.startswith("data:"):
        return from_data_url(value)
    if "://" in value:
        raise BadRow(f"picture on the network: {value[:200]} is not fetched. Download it and name the file")
    try:
        return inside(root, value)
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise BadRow(f"missing picture: {value[:200]!r}: {error}") from error


def inside(root: Path, name: str) -> Path:
    """The file `name` of `root` or of its folder `images`. Data from elsewhere must not read the rest of the disk."""
    if "\0" in name:
        raise BadRow(f"missing picture: {name[:200]!r} is no name of a file")
    home = root.resolve()
    for folder in (home, home / "images"):
        path = (folder / name).resolve()
        if not path.is_relative_to(home):
            raise BadRow(f"picture outside its folder: {name[:200]!r} leads out of {root}. Copy it into that folder")
        if path.is_file():
            return path
    raise BadRow(f"missing picture: {name[:200]!r} is neither in {root} nor in its folder images")


def from_data_url(url: str) -> bytes:
    header, _, body = url.partition(",")
    if not header.endswith(";base64"):
        raise BadRow(f"picture in an unknown encoding: {header[:80]!r}. A data URL must be base64")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise BadRow(f"unreadable picture: data URL: {error}") from error


# ------------------------------------------------------------------------------------------------------ rows


def from_json(row: dict) -> dict:
    """A row of a JSON file. Each is parsed by itself, since Arrow has one type per column and JSON rows need not."""
    try:
        value = json.loads(row["json"])
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRow(f"not a JSON object: {type(value).__name__}")
    return value


def from_shard(row: dict) -> dict:
    """A sample of a webdataset shard: what its json says, its txt as `text`, the pictures beside them as `images`."""
    said = row.get("json") or {}
    said = from_json(row) if isinstance(said, str) else said
    if not isinstance(said, dict):
        raise BadRow(f"not a JSON object: {type(said).__name__}")
    said = {name: value for name, value in said.items() if value is not None}  # Arrow's filling of absent keys
    if row.get("txt") is not None:
        said.setdefault("text", row["txt"])
    names = [name for name in row if name.rpartition(".")[2].lower() in PICTURE_SUFFIXES and row[name] is not None]
    if names:
        said = {name: value for name, value in said.items() if name not in PICTURE_COLUMNS}
        said["images"] = [row[name] for name in sorted(names, key=lambda name: (len(name), name))]  # 2.jpg < 10.jpg
    return said


def to_sample(row: dict, adapter: Callable[[dict], dict] | None, root: Path, least: dict[str, float]) -> dict:
    """What an adapter, None: the one that knows these columns, makes of a row's `well_rated` turns; or `BadRow`."""
    adapter = adapter or find_adapter(row)
    try:
        sample = adapter(well_rated(row, least))
        return {**sample, "images": [locate(image, root) for image in sample["images"]]}
    except BadRow:
        raise
    except MALFORMED as error:
        raise BadRow(f"not in the form of {adapter.__name__}: {type(error).__name__}: {error}") from error


@dataclass
class Part:
    """The rows of one file: a table, how a row is unpacked, and the folder that its pictures may be read from."""

    name: str
    table: Dataset
    root: Path
    adapter: Callable[[dict], dict] | None = None  # None: by each row's columns
    unpack: Callable[[dict], dict] | None = None  # None: the table's columns are the row's
    least: dict[str, float] = field(default_factory=dict)  # see `well_rated`
    source: int = 0  # number of the source that the file belongs to

    def __post_init__(self):
        # Arrow's own values: the library's format would decode pictures, and raise for a broken one.
        self.table = self.table.with_format("arrow")
        if self.unpack is None and {"__key__", "__url__"} <= set(self.table.column_names):
            self.unpack = from_shard
        self.columns = self.table.column_names if self.unpack is None else list(self.first_good_row())
        if self.adapter is None:
            try:
                find_adapter(self.columns)
            except BadRow as error:
                raise ValueError(f"{self.name}: {error}.") from error

    def first_good_row(self) -> dict:
        problem = None
        for index in range(len(self.table)):
            try:
                return self[index]
            except BadRow as error:
                problem = problem or error
        raise ValueError(f"{self.name}: none of its {len(self.table)} rows can be read, the first for: {problem}.")

    def __getitem__(self, index: int) -> dict:
        row = self.table[index].to_pylist()[0]
        return row if self.unpack is None else self.unpack(row)

    def samples(self, indices: list[int]) -> Iterator[dict | BadRow]:
        """What the adapter makes of these rows, or why it cannot; one read for all of them."""
        for row in self.table[indices].to_pylist():
            try:
                yield self.sample(row if self.unpack is None else self.unpack(row))
            except BadRow as error:
                yield error

    def sample(self, row: dict) -> dict:
        return to_sample(row, self.adapter, self.root, self.least)

    def column(self, name: str) -> list:
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
        """Bytes of text per row."""
        names = [name for name in WORD_COLUMNS if name in self.table.column_names]
        columns = [self.table.data.column(name).to_pylist() for name in names]
        sizes = [0] * len(self.table)
        for column in columns:
            for i, value in enumerate(column):
                sizes[i] += len(value if isinstance(value, bytes) else str(value).encode())
        return sizes


class Rows(Sequence):
    """Rows of several files, which need not have the same layout, in the order given.

    `rows[i]` is a row with all its columns, `rows["name"]` a column that every file has, `rows.adapt(i)` the sample.
    """

    def __init__(self, parts: list[Part], indices: Sequence[int] | None = None):
        self.parts = parts
        self.ends = list(accumulate(len(part.table) for part in parts))
        self.indices = range(self.ends[-1]) if indices is None else indices
        self.column_names = [name for name in parts[0].columns if all(name in part.columns for part in parts)]

    def __len__(self) -> int:
        return len(self.indices)

    def _find(self, index: int) -> tuple[Part, int]:
        index = self.indices[index]
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def __getitem__(self, key: int | str) -> dict | list:
        if isinstance(key, str):
            return self._gather([part.column(key) for part in self.parts])
        part, index = self._find(key)
        return part[index]

    def _gather(self, columns: list[list]) -> list:
        values = [value for column in columns for value in column]
        return [values[index] for index in self.indices]

    def select(self, indices: Sequence[int]) -> "Rows":
        """The rows at these positions, in this order."""
        return Rows(self.parts, [self.indices[index] for index in indices])

    def sizes(self) -> list[int]:
        """Bytes of text per row: what rows of like length are found by."""
        return self._gather([part.sizes() for part in self.parts])

    def source(self, index: int) -> int:
        """Number of the source that a row is from, from 0, in the order in which they were named."""
        return self._find(index)[0].source

    def where(self, index: int) -> str:
        """File and row number, from 0, for a message."""
        part, index = self._find(index)
        return f"{part.name}, row {index}"

    def adapt(self, index: int) -> dict:
        """The sample of a row: `{"images", "messages"}`, each picture encoded bytes or the path of a file that exists.

        Raises:
            BadRow: the row is not in the form that its columns promise, or one of its pictures cannot be had.
        """
        part, position = self._find(index)
        return part.sample(part[position])

    def samples(self, block: int = 100) -> Iterator[dict | BadRow]:
        """`adapt` of every row, the `BadRow` in place of a bad one. Several times as fast as row by row."""
        for start in range(0, len(self), block):
            found = map(self._find, range(start, min(start + block, len(self))))
            for _, group in groupby(found, key=lambda place: id(place[0])):
                places = list(group)
                yield from places[0][0].samples([index for _, index in places])


def keep_rows(rows: Rows, keep: dict[str, list]) -> Rows:
    """Keep the rows whose `column` holds one of the values, for every column of `keep`.

    Raises:
        ValueError: there is no such column, or no row is left.
    """
    for column, values in keep.items():
        if column not in rows.column_names:
            raise ValueError(f"keep: no column {column!r}. The data has {', '.join(rows.column_names)}.")
        rows = rows.select([i for i, value in enumerate(rows[column]) if value in set(values)])
        if not len(rows):
            raise ValueError(f"keep: no row has a {column} among {', '.join(map(str, values))}.")
    return rows


# --------------------------------------------------------------------------------------------------- sources


def keep_rated(rows: Rows, least: dict[str, float]) -> Rows:
    """Keep the `well_rated` turns of each row, and the rows that have any; files without ratings are kept whole.

    Raises:
        ValueError: no file has such a rating, or no row is left.
    """
    found = {name.removesuffix("_ratings") for part in rows.parts for name in part.columns if "_ratings" in name}
    for name in least.keys() - found:
        known = f"Ratings are {', '.join(sorted(found))}." if found else "No column ends in _ratings."
        raise ValueError(f"min_rating: the data has no rating {name!r}. {known}")
    good = []
    for part in rows.parts:
        part.least = least
        names = [name for name in part.columns if name.removesuffix("_ratings") in least]
        ratings = zip(*map(part.column, names)) if names else [()] * len(part.table)  # pictures stay unread
        # A row whose ratings cannot be had stays, to be counted as a bad one when it is drawn.
        good += [good_turns(dict(zip(names, values)), least) for values in ratings]
    kept = [i for i, index in enumerate(rows.indices) if good[index] is None or any(good[index])]
    if not kept:
        raise ValueError(f"min_rating: no turn of {len(rows)} rows is rated so highly. Ask for less.")
    return rows.select(kept)


def load_rows(sources: list[str]) -> Rows:
    """Load files, folders, globs and Hub data sets, in the order given.

    A source is a parquet, jsonl, json or tar file, a folder or glob of such, or `hub:owner/name[:config[:split]]`.
    `::name` behind it forces an adapter: `a.jsonl::trl`.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file cannot be read or has the columns of no known schema, or there are no rows at all.
    """
    parts = []
    for source, (name, adapter) in enumerate(named_sources(sources)):
        if name.startswith("hub:"):
            # Files that the library downloaded are named by their full path, which must lie in its own cache.
            parts.append(Part(name, load_hub(name), Path(HF_HUB_CACHE), adapter, source=source))
            continue
        for file in find_files(name):
            table, unpack = READERS[file.suffix](file)
            if len(table):
                parts.append(Part(str(file), table, file.parent, adapter, unpack, source=source))
    if not parts:
        raise ValueError(f"{', '.join(sources)}: no rows. Training needs at least one.")
    return Rows(parts)


@dataclass
class Stream:
    """The rows of one source, read one after another and never held all at once."""

    name: str
    read: Callable[[], Iterator[dict]]
    root: Path
    adapter: Callable[[dict], dict] | None = None  # None: by each row's columns
    unpack: Callable[[dict], dict] | None = None  # None: a row is as it is read
    least: dict[str, float] = field(default_factory=dict)  # see `well_rated`
    source: int = 0  # number of the source that the file belongs to

    def sample(self, row: dict) -> dict:
        """As `Rows.adapt`."""
        return to_sample(row if self.unpack is None else self.unpack(row), self.adapter, self.root, self.least)


def load_streams(sources: list[str], least: dict[str, float] | None = None) -> list[Stream]:
    """The sources of `load_rows`, a file each, without reading more of them than their first row.

    Raises:
        FileNotFoundError: a source matches no file.
        ValueError: a file cannot be read or has the columns of no known schema.
    """
    streams = []
    for source, (name, adapter) in enumerate(named_sources(sources)):
        if name.startswith("hub:"):
            streams.append(Stream(name, partial(stream_hub, name), Path(HF_HUB_CACHE), adapter, source=source))
            continue
        for file in find_files(name):
            unpack = UNPACKERS[file.suffix]
            read = partial(STREAMERS[file.suffix], file)
            streams.append(Stream(str(file), read, file.parent, adapter, unpack, source=source))
    for stream in streams:
        stream.least = least or {}
        row = next(stream.read(), {})
        if row and stream.adapter is None and stream.unpack is None:
            try:
                find_adapter(row)
            except BadRow as error:
                raise ValueError(f"{stream.name}: {error}.") from error
    return streams


def named_sources(sources: list[str]) -> Iterator[tuple[str, Callable[[dict], dict] | None]]:
    """Split `a.jsonl::trl` into the name and the adapter that it forces, None where it forces none."""
    for source in sources:
        name, _, forced = source.partition("::")
        yield name, adapter_by_name(forced) if forced else None


def adapter_by_name(name: str) -> Callable[[dict], dict]:
    named = {adapter.__name__: adapter for adapter in ADAPTERS}
    if name not in named:
        raise ValueError(f"::{name}: no such adapter. Adapters are {', '.join(named)}.")
    return named[name]


def find_files(source: str) -> Iterator[Path]:
    """The files of a source, sorted; of a folder those that can hold rows, however deep."""
    paths = [Path(source)] if Path(source).exists() else sorted(map(Path, glob(source, recursive=True)))
    files = []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.suffix in READERS) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{source}: no such file, folder or glob with rows ({', '.join(READERS)}).")
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(f"{file}: rows are read from {', '.join(READERS)} files, not from this.")
    return files


def read_parquet(file: Path) -> tuple[Dataset, None]:
    try:
        metadata = parquet.read_metadata(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error}).") from error
    # The library cannot make a table of a file without rows.
    return (Dataset.from_parquet(str(file)) if metadata.num_rows else []), None


def read_json(file: Path) -> tuple[Dataset, Callable]:
    """The rows of JSON lines or of one JSON list, each still as text."""
    content = file.read_bytes()
    if content.lstrip()[:1] == b"[":
        try:
            lines = [json.dumps(row).encode() for row in json.loads(content)]
        except ValueError as error:
            raise ValueError(f"{file}: not a readable JSON file ({error}).") from error
    else:
        lines = [line for line in content.split(b"\n") if line.strip()]
    return Dataset(pyarrow.table({"json": pyarrow.array(lines, pyarrow.large_binary())})), from_json


def read_tar(file: Path) -> tuple[Dataset, Callable]:
    try:
        return load_dataset("webdataset", data_files=str(file), split="train"), from_shard
    except Exception as error:  # the library raises its own classes, pyarrow's and tarfile's, each for a broken shard
        raise ValueError(f"{file}: not a readable webdataset shard ({error.__cause__ or error}).") from error


READERS = {".parquet": read_parquet, ".jsonl": read_json, ".json": read_json, ".tar": read_tar}


def load_hub(source: str, streaming: bool = False) -> Dataset | IterableDataset:
    name, *rest = source.removeprefix("hub:").split(":")
    if len(rest) > 2 or "/" not in name:
        raise ValueError(
            f"{source}: a Hub data set is named hub:owner/name, hub:owner/name:config or with :split behind."
        )
    config, split = [*rest, "", ""][:2]
    return load_dataset(name, config or None, split=split or "train", streaming=streaming)


def stream_library(file: Path) -> Iterator[dict]:
    """Rows of a parquet file or a webdataset shard, pictures undecoded."""
    kind = "parquet" if file.suffix == ".parquet" else "webdataset"
    try:
        yield from every_row(load_dataset(kind, data_files=str(file), split="train", streaming=True))
    except Exception as error:  # the library raises its own classes, pyarrow's and tarfile's
        raise ValueError(f"{file}: not a readable {kind} file ({error.__cause__ or error}).") from error


def stream_json(file: Path) -> Iterator[dict]:
    with open(file, "rb") as lines:
        start = lines.peek(64).lstrip()[:1]
        if start != b"[":
            yield from ({"json": line} for line in lines if line.strip())
            return
    yield from read_json(file)[0].with_format("arrow").to_list()  # one list must be read whole


def stream_hub(source: str) -> Iterator[dict]:
    yield from every_row(load_hub(source, streaming=True))


def every_row(data: IterableDataset) -> Iterator[dict]:
    """The rows of a streamed data set, pictures undecoded.

    Iterated directly, it would give each worker of a DataLoader other rows, and leave some out where they do not
    divide; batches of one are the same for all.
    """
    for batch in data.decode(False).iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


STREAMERS = {".parquet": stream_library, ".jsonl": stream_json, ".json": stream_json, ".tar": stream_library}
UNPACKERS = {".parquet": None, ".jsonl": from_json, ".json": from_json, ".tar": from_shard}
