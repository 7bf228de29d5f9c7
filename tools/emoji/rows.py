"""Make rows of the data set, and write them to parquet files."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("conversations", "image_bytes", "task", "language", "style", "concept", "options")
TYPES = {
    "image_bytes": pa.binary(),
    "options": pa.list_(pa.string()),
    "box": pa.list_(pa.int32()),
}  # all other columns are strings


def make_row(picture: bytes, style: str, concept: str, task, language, question, answer, options, *box) -> dict:
    """Return a row with the columns `COLUMNS`; a further value `box`, which may be None, adds a column."""
    turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    values = (json.dumps(turns, ensure_ascii=False), picture, task, language, style, concept, options, *box)
    return dict(zip((*COLUMNS, "box"), values))


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
