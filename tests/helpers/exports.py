"""Ask the torch model what an export of it is asked, and read the files of an export."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from helpers.models import ROOT
from minivlm.data.pictures import decode_image
from minivlm.model.loading import load_trained


def answers(folder, pictures, text, max_new_tokens=24):
    """Yield our own greedy answer to one question about each picture, and what the model was given."""
    model, processor = load_trained(folder)
    model.float().eval()
    for picture in pictures:
        inputs = prompt(processor, picture, text)
        answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        yield inputs, answer[:, inputs["input_ids"].shape[1] :].tolist()


def prompt(processor, picture, text):
    """Return what the model is given for one question about a picture."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def first_pictures(count=20):
    """Return the first pictures of the test file, 128 x 128 pixels each."""
    rows = pq.read_table(ROOT / "data" / "test.parquet", columns=["image_bytes"]).slice(0, count).to_pylist()
    return [decode_image(row["image_bytes"]) for row in rows]


def read(path: Path):
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def export_once(model, folder, kept, export):
    """Write the graphs of a model into `folder`; those of a model that was exported before come from `kept`."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    graphs = kept / digest.hexdigest()
    if not graphs.is_dir():
        export(model, folder)
        shutil.copytree(folder / "onnx", graphs)
    else:
        model.set_attn_implementation("eager")  # as `export` does
        shutil.copytree(graphs, folder / "onnx")
