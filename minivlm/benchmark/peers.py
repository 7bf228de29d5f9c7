"""Drive the model of MiniMind-V, imported from a checkout of its repository; nothing of it is part of this one."""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, SiglipImageProcessor

from minivlm.benchmark.rows import Rows
from minivlm.benchmark.shapes import IMAGE, Shape
from minivlm.data.encoder import IGNORE


def make_minimind_v(folder: str, shape: Shape):
    """Return its model with the sizes of a shape and random weights.

    Raises:
        ValueError: the folder is no checkout of it, or the shape is not one that it can have.
    """
    if not (Path(folder) / "model" / "model_vlm.py").is_file():
        raise ValueError(f"--minimind_v {folder} has no model/model_vlm.py. Name a checkout of its repository.")
    if shape.vision["model_type"] != "siglip_vision_model":
        raise ValueError(
            f"--minimind_v: it knows SigLIP towers, not {shape.vision['model_type']}. Use another --shape."
        )
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("model.model_vlm")
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    text = {key: value for key, value in shape.text.items() if key != "model_type"}
    sizes = {"image_hidden_size": shape.vision["hidden_size"], "image_token_len": shape.config().image_seq_length}
    with tempfile.TemporaryDirectory() as tower:
        AutoModel.from_config(AutoConfig.for_model(**shape.vision)).save_pretrained(tower)
        SiglipImageProcessor().save_pretrained(tower)
        model = module.MiniMindVLM(module.VLMConfig(**text, **sizes, image_ids=[IMAGE]), vision_model_path=tower)
    if model.vision_encoder is None:
        raise ValueError("MiniMind-V did not load the tower that was made for it.")
    return model.train()


def minimind_v_step(folder: str, shape: Shape, rows: Rows) -> Callable[[], None]:
    """Return one step as its trainer does it on a CPU: fp32, each row padded to its full length."""
    model, length = make_minimind_v(folder, shape), shape.padded
    ids = torch.zeros(len(rows.samples), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for i, sample in enumerate(rows.samples):
        ids[i, : len(sample["input_ids"])] = sample["input_ids"]
        labels[i, : len(sample["labels"])] = sample["labels"]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        result = model(ids, labels=labels, pixel_values={"pixel_values": rows.pixels})
        (result.loss + result.aux_loss).backward()

    return step


def minimind_v_generate(folder: str, shape: Shape, prompt: dict, dtype: torch.dtype) -> Callable[[int], None]:
    """Return its own greedy loop; it takes the number of tokens."""
    model = make_minimind_v(folder, shape).to(dtype).eval()
    pixels = {"pixel_values": prompt["pixel_values"].to(dtype)}

    @torch.no_grad()
    def work(new: int) -> None:
        model.generate(
            input_ids=prompt["input_ids"], pixel_values=pixels, max_new_tokens=new, do_sample=False, eos_token_id=None,
            top_k=0, top_p=1.0, temperature=1.0,
        )  # fmt: skip

    return work
