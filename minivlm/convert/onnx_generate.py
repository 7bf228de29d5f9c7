"""Answer greedily with exported ONNX graphs, by onnxruntime and numpy alone.

Letters: B batch, T tokens, N pictures.
"""

import json
from pathlib import Path

import numpy as np

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}  # data type -> end of the name: files are NAME_fp16.onnx


def generate(folder: str | Path, inputs: dict[str, np.ndarray], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most likely continuation of each prompt.

    Args:
        folder: made by `to_onnx`, or the folder `model` made by `to_web`.
        inputs: `input_ids` and `attention_mask` (B, T), int64, padded on the left, and `pixel_values` (N, 3, H, W) if
            there are pictures. The processor returns them with `return_tensors="np"`.
        max_new_tokens: upper limit of an answer.

    Returns:
        Tokens (B, new tokens), with padding after an end of sequence, and the logits of the prompt (B, T, vocabulary).
    """
    vision, embed, decoder = open_graphs(Path(folder))
    settings = read_settings(Path(folder))
    embeds, mask = embed.run(None, {"input_ids": inputs["input_ids"]})[0], inputs["attention_mask"]
    if "pixel_values" in inputs:
        features = vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]
        embeds[inputs["input_ids"] == settings["image"]] = features.reshape(-1, features.shape[-1])
    positions, cache = np.maximum(mask.cumsum(1) - 1, 0), empty_cache(decoder, len(mask))
    answer, prompt_logits, finished = [], None, np.zeros(len(mask), bool)
    while len(answer) < max_new_tokens and not finished.all():
        step = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
        logits, *present = decoder.run(None, step)
        prompt_logits = logits if prompt_logits is None else prompt_logits
        scores = logits[:, -1].copy()
        scores[:, settings["suppressed"]] = -np.inf
        token = np.where(finished, settings["pad"], scores.argmax(-1))
        answer.append(token)
        finished |= np.isin(token, settings["ends"])
        cache = dict(zip(cache, present))
        embeds = embed.run(None, {"input_ids": token[:, None]})[0]
        mask = np.concatenate((mask, np.ones_like(mask[:, :1])), axis=1)
        positions = positions[:, -1:] + 1
    return np.stack(answer, axis=1), prompt_logits


def open_graphs(folder: Path) -> list:
    """Return the onnxruntime sessions of tower with projector, embeddings and decoder, in the folder's data types."""
    import onnxruntime  # of the extra `onnx`

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtypes = config.get("transformers.js_config", {}).get("dtype", "fp32")  # of all graphs, or of each
    sessions = []
    for name in (VISION, EMBED, DECODER):
        suffix = SUFFIXES[dtypes if isinstance(dtypes, str) else dtypes[name]]
        sessions.append(onnxruntime.InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx"))
    return sessions


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
