"""Run exported ONNX graphs by onnxruntime and numpy alone, token after token.

Letters: B batch, T tokens, N pictures, I image tokens of a picture, D width, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
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
        dtypes: data type of each graph, a value of `DTYPES` in `minivlm/convert/quantize.py`; without it those that
            config.json names.

    Raises:
        ValueError: onnxruntime is not installed or cannot read a graph.
        OSError: a file is missing.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, dtypes: dict[str, str] | None = None):
        folder = Path(folder)
        config, options = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        files = graph_files(folder, dtypes)
        self.vision, self.embed, self.decoder = (open_graph(path, threads or count_threads()) for path in files)
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
        """Return what `stream` yields: tokens (B, new tokens), and the logits of the prompt (B, T, V)."""
        steps = list(self.stream(inputs, max_new_tokens, choose))
        return np.stack([token for token, _ in steps], axis=1), steps[0][1]

    def stream(
        self,
        inputs: dict[str, np.ndarray],
        max_new_tokens: int,
        choose: Callable[[np.ndarray], np.ndarray] = likeliest,
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield each next token (B,) of a continuation of each prompt.

        With the first one come the prompt's logits (B, T, V). Behind its end token a continuation is padded. The
        iteration ends once all have ended, or at the limit.

        Args:
            inputs: `input_ids` and `attention_mask` (B, T), int64, padded on the left, and if there are pictures
                `pixel_values` (N, 3, H, W), float32.
            max_new_tokens: upper limit of an answer.
            choose: returns the next token (B,) of the scores (B, V), float32; the likeliest if it is left out.

        Raises:
            ValueError: the prompt has another number of image tokens than the pictures fill.
        """
        embeds, mask = self.embeddings(inputs), inputs["attention_mask"]
        positions, cache = np.maximum(mask.cumsum(1) - 1, 0), empty_cache(self.decoder, len(mask))
        finished = np.zeros(len(mask), bool)
        for number in range(max_new_tokens):
            logits, cache = self.step(embeds, mask, positions, cache)
            scores = logits[:, -1].copy()
            scores[:, self.suppressed] = -np.inf
            token = np.where(finished, self.pad, choose(scores))
            yield token, logits if number == 0 else None
            finished |= np.isin(token, self.ends)
            if finished.all():
                return
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


def graph_files(folder: Path, dtypes: dict[str, str] | None = None) -> list[Path]:
    """Return the files of tower with projector, embeddings and decoder; for `dtypes` see `Graphs`.

    Raises:
        ValueError: a file is missing.
    """
    if dtypes is None:
        dtypes = read_json(folder / "config.json").get("transformers.js_config", {}).get("dtype", "fp32")
    chosen = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in (VISION, EMBED, DECODER)}
    files = [folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx" for name, dtype in chosen.items()]
    if missing := [path for path in files if not path.is_file()]:
        raise ValueError(
            f"{missing[0]}: no such file, though config.json names its data type. Export the model again."
        )
    return files


def open_graph(path: Path, threads: int):
    """Return the onnxruntime session of a graph.

    Raises:
        ValueError: onnxruntime is not installed or cannot read the graph.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX graphs need the package {error.name}. Install it: pip install minivlm[onnx]") from None
    options = onnxruntime.SessionOptions()
    # By default it takes every core of the machine, and pins threads to cores that the process may not use.
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each kind of damage, below Exception alone
        raise ValueError(f"{path}: onnxruntime cannot read it: {' '.join(str(error).split())}") from error


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
