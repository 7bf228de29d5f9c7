"""Make rows of the data set, and write them to parquet files."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tools.emoji.questions import Row

COLUMNS = ("conversations", "image_bytes", "task", "language", "style", "concept", "options")
TYPES = {
    "image_bytes": pa.binary(),
    "options": pa.list_(pa.string()),
    "box": pa.list_(pa.int32()),
}  # all other columns are strings


def make_row(picture: bytes, style: str, concept: str, row: Row, with_box: bool = False) -> dict:
    """Return a row of a file: the columns `COLUMNS`, and with `with_box` a column `box`, which may be None."""
    turns = [{"role": "user", "content": f"<image>\n{row.question}"}, {"role": "assistant", "content": row.answer}]
    values = (json.dumps(turns, ensure_ascii=False), picture, row.task, row.language, style, concept, row.options)
    return dict(zip(COLUMNS, values)) | ({"box": row.box} if with_box else {})


def write(rows: list[dict], path: Path, seed: int, shuffle: bool) -> None:
    """Write rows to a parquet file that stores each picture once per row group.

    Rows of one group share the picture through the group's dictionary.
    """
    if shuffle:  # so that the first rows are a fair sample
        random.Random(f"{seed}/{path.name}").shuffle(rows)
    schema = pa.schema([(name, TYPES.get(name, pa.string())) for name in rows[0]])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(
        table, path, compression="zstd", compression_level=15, use_dictionary=list(COLUMNS[1:-1]),
        dictionary_pagesize_limit=2**28, row_group_size=len(rows) if shuffle else 10_000,
    )  # fmt: skip
