"""Make pictures, rows and files of rows as training reads them, and an encoder for the tiny model."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from helpers.models import make_processor
from minivlm.data.encoder import Encoder

PROCESSOR = make_processor()
ENCODER = Encoder(PROCESSOR, max_length=512)


def png(seed=0, size=(32, 32)) -> bytes:
    """Return a PNG file of noise; `size` is (height, width)."""
    noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def row(question="What is it?", answer="a dog", images=1, seed=0) -> dict:
    """Return a row with MiniMind-V's columns; its pictures are drawn from `seed` and the numbers after it."""
    turns = [{"role": "user", "content": "<image>\n" * images + question}, {"role": "assistant", "content": answer}]
    return {"conversations": json.dumps(turns), "image_bytes": [png(seed + i) for i in range(images)]}


def write(path, rows) -> str:
    """Write rows to a Parquet file and return its path."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def loss_of(model, batch, answers):
    """Return the loss of a collated batch: the sum over its answer tokens, divided by `answers`."""
    batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        labels = batch["shift_labels"]
        return model(**batch, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(answers)).loss
