"""Answer greedily with exported ONNX graphs, by onnxruntime and numpy alone.

Letters: B batch, T tokens, N pictures.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}  # data type -> end of the name: files are NAME_fp16.onnx


def generate(folder: str | Path, inputs: dict[str, np.ndarray], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most likely continuation of each prompt.

    Args:
        folder: made by `to_onnx`, or the folder `model` made by `to_web`.
        inputs: as for `Graphs.stream`.
        max_new_tokens: upper limit of an answer.

    Returns:
        Tokens (B, new tokens), with padding after an end of sequence, and the logits of the prompt (B, T, vocabulary).
    """
    steps = list(Graphs(folder).stream(inputs, max_new_tokens))
    return np.stack([token for token, _ in steps], axis=1), steps[0][1]


class Graphs:
    """Hold the opened graphs of a folder: tower with projector, embeddings and decoder.

    Args:
        folder: as for `generate`.
        dtypes: data type of each graph, a value of `DTYPES` in quantize.py. Default: those that config.json names.
        threads: of onnxruntime; 0 lets it choose.
    """

    def __init__(self, folder: str | Path, dtypes: dict[str, str] | None = None, threads: int = 0):
        import onnxruntime  # of the extra `onnx`

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        files = graph_files(Path(folder), dtypes)
        self.vision, self.embed, self.decoder = (onnxruntime.InferenceSession(file, options) for file in files)
        self.settings = read_settings(Path(folder))

    def stream(self, inputs: dict[str, np.ndarray], max_new_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each new token of the most likely continuations, (B,), and the logits of the tokens that it follows.

        The first logits are those of the prompt (B, T, vocabulary), later ones have T = 1. After an end of sequence
        comes padding; the iteration ends once all continuations have ended.

        Args:
            inputs: `input_ids` and `attention_mask` (B, T), int64, padded on the left, and `pixel_values`
                (N, 3, H, W) if there are pictures. The processor returns them with `return_tensors="np"`.
        """
        embeds, mask = self.embed.run(None, {"input_ids": inputs["input_ids"]})[0], inputs["attention_mask"]
        if "pixel_values" in inputs:
            features = self.vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]
            embeds[inputs["input_ids"] == self.settings["image"]] = features.reshape(-1, features.shape[-1])
        positions, cache = np.maximum(mask.cumsum(1) - 1, 0), empty_cache(self.decoder, len(mask))
        finished = np.zeros(len(mask), bool)
        for _ in range(max_new_tokens):
            step = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
            logits, *present = self.decoder.run(None, step)
            scores = logits[:, -1].copy()
            scores[:, self.settings["suppressed"]] = -np.inf
            token = np.where(finished, self.settings["pad"], scores.argmax(-1))
            yield token, logits
            finished |= np.isin(token, self.settings["ends"])
            if finished.all():
                return
            cache = dict(zip(cache, present))
            embeds = self.embed.run(None, {"input_ids": token[:, None]})[0]
            mask = np.concatenate((mask, np.ones_like(mask[:, :1])), axis=1)
            positions = positions[:, -1:] + 1


def graph_files(folder: Path, dtypes: dict[str, str] | None = None) -> list[Path]:
    """Return the files of tower with projector, embeddings and decoder; for `dtypes` see `Graphs`."""
    if dtypes is None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtypes = config.get("transformers.js_config", {}).get("dtype", "fp32")  # of all graphs, or of each
    chosen = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in (VISION, EMBED, DECODER)}
    return [folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx" for name, dtype in chosen.items()]


def read_settings(folder: Path) -> dict:
    """Return the tokens that matter to the loop: `image`, `ends`, `pad`, `suppressed`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    return {
        "image": config.get("image_token_index", config.get("image_token_id")),  # LLaVA's name, and ours
        "ends": np.atleast_1d(options.get("eos_token_id") or []),
        "pad": options.get("pad_token_id") or 0,
        "suppressed": options.get("suppress_tokens") or [],
    }


def empty_cache(decoder, batch: int) -> dict[str, np.ndarray]:
    """Return keys and values of no position, under the names that the decoder's graph gives them."""
    slots = [slot for slot in decoder.get_inputs() if slot.name.startswith("past_key_values.")]
    return {slot.name: np.zeros((batch, slot.shape[1], 0, slot.shape[3]), np.float32) for slot in slots}
