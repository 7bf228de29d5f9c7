"""Answer with llama.cpp itself, by llama-cpp-python, which no extra of setup.cfg installs: it compiles llama.cpp."""

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MARKER = "<__media__>"  # stands for a picture in a prompt; `mtmd_default_marker` of llama.cpp


class LlamaCpp:
    """Answer with the files that to_gguf wrote into a folder, on the CPU, without flash attention.

    Args:
        context: most tokens of prompt and answer.
        outtype: choose the files of this type where a folder holds several.
    """

    def __init__(self, folder: str | Path, context: int = 1024, threads: int = 1, outtype: str = "*"):
        self.llama = llama_cpp = importlib.import_module("llama_cpp")
        self.mtmd = mtmd_cpp = importlib.import_module("llama_cpp.mtmd_cpp")
        self.mtmd.mtmd_log_set(importlib.import_module("llama_cpp._logger").llama_log_callback, None)
        path, pictures = (
            str(next(Path(folder).glob(f"{part}-{outtype.upper()}.gguf"))) for part in ("model", "mmproj")
        )
        self.model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.print_timings, options.warmup = False, threads, False, False
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = mtmd_cpp.mtmd_init_from_file(pictures.encode(), self.model.model, options)
        assert self.context is not None, f"llama.cpp does not load {pictures}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.mtmd.mtmd_free(self.context)
        self.model.close()

    def read(self, prompt: str, pictures: Sequence[Image.Image]) -> None:
        """Evaluate a prompt with a `MARKER` for each picture, from an empty cache."""
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

    def bitmap(self, picture: Image.Image):
        """Return a picture as llama.cpp takes it."""
        data = picture.convert("RGB").tobytes()
        return self.mtmd.mtmd_bitmap_init(*picture.size, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))

    def logits(self) -> np.ndarray:
        """Return the logits of the next token (V,)."""
        pointer = self.llama.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),)).copy()

    def stream(
        self, prompt: str, pictures: Sequence[Image.Image], length: int, suppress: Sequence[int] = ()
    ) -> Iterator[int]:
        """Yield the ids of a greedy answer, the token that ends it included."""
        self.read(prompt, pictures)
        for _ in range(length):
            logits = self.logits()
            logits[list(suppress)] = -np.inf
            token = int(logits.argmax())
            yield token
            if self.llama.llama_vocab_is_eog(self.model._model.vocab, token):
                return
            self.model.eval([token])

    def answer(
        self, prompt: str, pictures: Sequence[Image.Image], length: int = 24, suppress: Sequence[int] = ()
    ) -> list[int]:
        """Return the ids of a greedy answer, without the token that ends it."""
        ids = list(self.stream(prompt, pictures, length, suppress))
        return ids[:-1] if ids and self.llama.llama_vocab_is_eog(self.model._model.vocab, ids[-1]) else ids
