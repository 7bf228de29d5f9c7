"""Write GGUF files of tiny models, and read them back."""

import numpy as np
import torch

from helpers.models import SIGLIP, save
from minivlm.commands.convert import main

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole q8_0 blocks
CASES = {
    "one block before the last": {"vision_feature_layer": -2},
    "last block": {"vision_feature_layer": -1},
    "output after the final norm": {"vision_feature_layer": None},
    "untied, no bias": {"tie_word_embeddings": False, "multimodal_projector_bias": False},
}
TEXTS = (
    "What is this? Answer with the name.", "这是什么？只回答名称。", "  two  spaces\n\n and\ttabs\r\n",
    "I'm 2024's, WE'LL see…", "a<|im_e nd|>", "<|im_start|>user\n<|image_pad|>\nA cat.<|im_end|>\n",
    "émigré naïve ﬁ Ⅻ", "🐷🏽‍🚀", "<think>\nno\n</think>",
)  # fmt: skip


def write(folder, *options, name="out", **model):
    """Save a tiny model with a SigLIP tower, convert it, and return it and the folder of the GGUF files."""
    vision = SIGLIP | model.pop("vision", {})
    ours = save(folder / "ours", vision=vision, **model)
    main(["to_gguf", str(folder / "ours"), "--out", str(folder / name), *options])
    return ours, folder / name


def read(path):
    """Return the metadata of a GGUF file and its tensors in fp32 in PyTorch's shapes, and their data types by name."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors, kinds = {}, {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(data, dtype=np.float32).reshape(shape))
        kinds[tensor.name] = tensor.tensor_type.name
    return metadata, tensors, kinds
