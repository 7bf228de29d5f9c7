"""Run exported ONNX graphs by onnxruntime and numpy alone, token after token.

Letters: B batch, T tokens, N pictures, I image tokens of a picture, D width, V vocabulary.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minivlm.onnx_engine.files import read_json

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
# Data type -> end of a file's name, as NAME_fp16.onnx; transformers.js has the same.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "int8": "_int8", "q4": "_q4"}


def likeliest(scores: np.ndarray) -> np.ndarray:
    """Return the token (B,) with the highest of the scores (B, V)."""
    return scores.argmax(-1)


class Graphs:
    """Hold the graphs of a model and the tokens that matter to the loop.

    Args:
        folder: made by `to_onnx`, or the folder `model` made by `to_web`.
        threads: to compute with; without it as many as `count_threads` returns.

    Raises:
        ValueError: onnxruntime is not installed or cannot read a graph.
        OSError: a file is missing.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        config, options = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        self.vision, self.embed, self.decoder = open_graphs(folder, config, threads or count_threads())
        self.image = config.get("image_token_index", config.get("image_token_id"))  # LLaVA's name, and ours
        ends = options.get("eos_token_id")
        self.ends = [] if ends is None else np.atleast_1d(ends).tolist()
        self.pad = options.get("pad_token_id") or 0
        self.suppressed = options.get("suppress_tokens") or []

    def generate(
        self,
        inputs: dict[str, np.ndarray],
        max_new_tokens: int,
        choose: Callable[[np.ndarray], np.ndarray] = likeliest,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a continuation of each prompt. It ends with an end token, or at the limit.

        Args:
            inputs: `input_ids` and `attention_mask` (B, T), int64, padded on the left; with pictures also
                `pixel_values` (N, 3, H, W), float32.
            max_new_tokens: upper limit of an answer.
            choose: returns the next token (B,) of the scores (B, V), float32; the likeliest if it is left out.

        Returns:
            Tokens (B, new tokens), with padding after an end token, and the logits of the prompt (B, T, V).

        Raises:
            ValueError: the prompt has another number of image tokens than the pictures fill.
        """
        embeds, mask = self.embeddings(inputs), inputs["attention_mask"]
        positions, cache = np.maximum(mask.cumsum(1) - 1, 0), empty_cache(self.decoder, len(mask))
        answer, prompt_logits, finished = [], None, np.zeros(len(mask), bool)
        while True:
            logits, cache = self.step(embeds, mask, positions, cache)
            prompt_logits = logits if prompt_logits is None else prompt_logits
            scores = logits[:, -1].copy()
            scores[:, self.suppressed] = -np.inf
            token = np.where(finished, self.pad, choose(scores))
            answer.append(token)
            finished |= np.isin(token, self.ends)
            if finished.all() or len(answer) == max_new_tokens:
                return np.stack(answer, axis=1), prompt_logits
            embeds = self.embed.run(None, {"input_ids": token[:, None]})[0]  # (B, 1, D)
            mask = np.concatenate((mask, np.ones_like(mask[:, :1])), axis=1)
            positions = positions[:, -1:] + 1

    def embeddings(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the embeddings (B, T, D) of a prompt, those of its image tokens from the pictures."""
        embeds = self.embed.run(None, {"input_ids": inputs["input_ids"]})[0]
        if "pixel_values" in inputs:
            features = self.vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]  # (N, I, D)
            places = inputs["input_ids"] == self.image  # (B, T)
            if (count := int(places.sum())) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"The prompt has {count} image tokens, but {features.shape[0]} pictures fill {features.shape[1]} "
                    "each. Do the graphs and the configuration beside them come from one model?"
                )
            embeds[places] = features.reshape(-1, features.shape[-1])
        return embeds

    def step(self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: dict) -> tuple:
        """Return the logits (B, T, V) of the decoder, and its longer cache.

        The cache stays in onnxruntime's own tensors: what one step returns is what the next one reads, without a copy.
        """
        from onnxruntime import OrtValue

        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        given = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
        logits, *present = self.decoder.run_with_ort_values(None, given | cache)
        return logits.numpy(), dict(zip(cache, present))


def open_graphs(folder: Path, config: dict, threads: int) -> list:
    """Return the onnxruntime sessions of tower with projector, embeddings and decoder, in the folder's data types."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX graphs need the package {error.name}. Install it: pip install minivlm[onnx]") from None
    options = onnxruntime.SessionOptions()
    # By default it takes every core of the machine, and pins threads to cores that the process may not use.
    options.intra_op_num_threads = threads
    dtypes = config.get("transformers.js_config", {}).get("dtype", "fp32")  # of all graphs, or of each
    sessions = []
    for name in (VISION, EMBED, DECODER):
        path = folder / "onnx" / f"{name}{SUFFIXES[dtypes if isinstance(dtypes, str) else dtypes[name]]}.onnx"
        if not path.is_file():
            raise ValueError(f"{path}: no such file, though config.json names its data type. Export the model again.")
        try:
            sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
        except Exception as error:  # onnxruntime has a class for each kind of damage, below Exception alone
            raise ValueError(f"{path}: onnxruntime cannot read it: {' '.join(str(error).split())}") from error
    return sessions


def count_threads() -> int:
    """Return how many threads to compute with: OMP_NUM_THREADS as for torch, else the cores that this process has."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def empty_cache(decoder, batch: int) -> dict:
    """Return keys and values of no position, under the names that the decoder's graph gives them."""
    from onnxruntime import OrtValue

    slots = [slot for slot in decoder.get_inputs() if slot.name.startswith("past_key_values.")]
    shapes = {slot.name: (batch, slot.shape[1], 0, slot.shape[3]) for slot in slots}
    return {name: OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
