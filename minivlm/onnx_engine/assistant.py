"""Answer conversations about pictures with the graphs of a folder."""

from functools import partial
from pathlib import Path

import numpy as np

from minivlm.data.pictures import decode_image, pictures_in
from minivlm.decoding import Answer, Decoding, check_room
from minivlm.onnx_engine.files import read_json
from minivlm.onnx_engine.graphs import Graphs, likeliest
from minivlm.onnx_engine.pixels import Pixels
from minivlm.onnx_engine.prompt import Prompt


class OnnxAssistant:
    """Answer one conversation at a time, as `Assistant` in `minivlm/inference.py` does with the model itself.

    Args:
        folder: of graphs, as `find_graphs` returns it.
        seed: of what is drawn; None for another one each time.

    Raises:
        ValueError: a graph or a setting cannot be used.
        OSError: a file is missing.
    """

    def __init__(self, folder: Path, seed: int | None = None):
        config, processor = read_json(folder / "config.json"), read_json(folder / "processor_config.json")
        self.graphs = Graphs(folder)
        self.pixels = Pixels(processor["image_processor"])
        length = processor.get("image_seq_length") or config["image_seq_length"]  # our processor's; LLaVA's config
        self.prompt = Prompt(folder, self.graphs.image, length)
        self.room = config["text_config"].get("max_position_embeddings") or 1 << 30
        self.rng = np.random.default_rng(seed)

    def encode(self, messages: list[dict]) -> dict[str, np.ndarray]:
        """Return `input_ids` and `attention_mask` (1, T), int64, and with pictures `pixel_values` (N, 3, H, W).

        Args:
            messages: in the chat format of transformers; a picture is encoded bytes, a `Path` or a Pillow picture.

        Raises:
            ValueError: a picture cannot be read, or the chat template refuses the conversation.
        """
        images = pictures_in(messages)
        ids = np.array([self.prompt.tokens(messages)], dtype=np.int64)
        encoded = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return encoded | ({"pixel_values": self.pixels([decode_image(image) for image in images])} if images else {})

    def answer(self, messages: list[dict], decoding: Decoding = Decoding()) -> Answer:
        """Return the answer to a conversation.

        Raises:
            ValueError: as for `encode`, or conversation and answer may be longer than what the model reads.
        """
        encoded = self.encode(messages)
        check_room(self.room, encoded["input_ids"].shape[1], decoding.max_new_tokens)
        choose = likeliest if not decoding.temperature else partial(draw, decoding=decoding, rng=self.rng)
        ids = self.graphs.generate(encoded, decoding.max_new_tokens, choose)[0][0].tolist()
        return Answer(self.prompt.decode(ids), len(ids), ids[-1] in self.graphs.ends)


def draw(scores: np.ndarray, decoding: Decoding, rng: np.random.Generator) -> np.ndarray:
    """Return a token (B,) drawn by the scores (B, V), among the likeliest that have the share `top_p`."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    sorted_scores = np.take_along_axis(scores, order, axis=-1).astype(np.float64) / decoding.temperature
    chances = np.exp(sorted_scores - sorted_scores[:, :1])
    chances /= chances.sum(-1, keepdims=True)
    before = chances.cumsum(-1) - chances  # of the tokens that are likelier; 0 for the first, which always stays
    chances[before >= decoding.top_p] = 0
    until = chances.cumsum(-1)
    place = (until > rng.random((len(scores), 1)) * until[:, -1:]).argmax(-1)
    return np.take_along_axis(order, place[:, None], axis=-1)[:, 0]
