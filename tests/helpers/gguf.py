"""Read GGUF files back, and answer questions with llama.cpp itself where llama-cpp-python is installed."""

import ctypes
import importlib
from pathlib import Path

import numpy as np
import torch

from helpers.models import SIGLIP, save
from minivlm.commands.convert import main

MARKER = "<__media__>"  # stands for a picture in a prompt; `mtmd_default_marker` of llama.cpp
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


class LlamaCpp:
    """Answer with llama.cpp, by the files that to_gguf wrote into a folder. One thread, no flash attention."""

    def __init__(self, folder, context=1024):
        # No extra of setup.cfg has it: where there is no wheel, its installation compiles llama.cpp.
        self.llama = llama_cpp = importlib.import_module("llama_cpp")
        self.mtmd = mtmd_cpp = importlib.import_module("llama_cpp.mtmd_cpp")
        self.mtmd.mtmd_log_set(importlib.import_module("llama_cpp._logger").llama_log_callback, None)
        path = str(next(Path(folder).glob("model-*.gguf")))
        self.model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, verbose=False
        )
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings, options.warmup = False, 1, False, False
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        pictures = str(next(Path(folder).glob("mmproj-*.gguf")))
        self.context = mtmd_cpp.mtmd_init_from_file(pictures.encode(), self.model.model, options)
        assert self.context is not None, f"llama.cpp does not load {pictures}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.mtmd.mtmd_free(self.context)
        self.model.close()

    def read(self, prompt, pictures):
        """Evaluate a prompt with a `MARKER` for each PIL picture, from an empty cache."""
        mtmd, model = self.mtmd, self.model
        model.reset()
        model._ctx.kv_cache_clear()
        text = mtmd.mtmd_input_text(prompt.encode(), len(prompt.encode()), True, True)
        bitmaps = [self.bitmap(picture) for picture in pictures]
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        chunks, position = mtmd.mtmd_input_chunks_init(), self.llama.llama_pos(0)
        assert mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), array, len(bitmaps)) == 0
        where = (self.llama.llama_pos(0), self.llama.llama_seq_id(0), model.n_batch, True, ctypes.byref(position))
        assert mtmd.mtmd_helper_eval_chunks(self.context, model._ctx.ctx, chunks, *where) == 0
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_input_chunks_free(chunks)
        model.n_tokens = position.value

    def bitmap(self, picture):
        data = picture.convert("RGB").tobytes()
        return self.mtmd.mtmd_bitmap_init(*picture.size, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))

    def logits(self):
        """Return the logits of the next token (V,)."""
        pointer = self.llama.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),)).copy()

    def answer(self, prompt, pictures, length=24, suppress=()):
        """Return the ids of a greedy answer, without the token that ends it."""
        self.read(prompt, pictures)
        ids = []
        while len(ids) < length:
            logits = self.logits()
            logits[list(suppress)] = -np.inf
            token = int(logits.argmax())
            if self.llama.llama_vocab_is_eog(self.model._model.vocab, token):
                break
            ids.append(token)
            self.model.eval([token])
        return ids
