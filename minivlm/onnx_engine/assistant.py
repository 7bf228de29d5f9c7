"""Answer conversations about pictures with the graphs of a folder."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from minivlm.data.pictures import decode_image, pictures_in
from minivlm.decoding import Answer, Decoding, Pieces, check_room
from minivlm.onnx_engine.files import read_json
from minivlm.onnx_engine.graphs import Graphs, likeliest
from minivlm.onnx_engine.pixels import Pixels
from minivlm.onnx_engine.prompt import Prompt


class OnnxAssistant:
    """Answer conversations one after another, as `Assistant` in `minivlm/inference.py` does with the model itself.

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

    def answer(self, encoded: list[dict], decoding: Decoding = Decoding()) -> list[Answer]:
        """Return the answers to conversations that `encode` returned.

        Raises:
            ValueError: conversation and answer may be longer than what the model reads.
        """
        answers = []
        for chat in encoded:
            ids = list(self.ids(chat, decoding))
            answers.append(Answer(self.prompt.decode(ids), len(ids), ids[-1] in self.graphs.ends))
        return answers

    def stream(self, encoded: dict, decoding: Decoding = Decoding()) -> "OnnxStream":
        """Start the answer to one conversation that `encode` returned; iterate over the result for its pieces."""
        return OnnxStream(self, self.ids(encoded, decoding))

    def ids(self, encoded: dict, decoding: Decoding) -> Iterator[int]:
        """Return the tokens of an answer, each computed when it is asked for; raise at once what `answer` raises."""
        check_room(self.room, encoded["input_ids"].shape[1], decoding.max_new_tokens)
        choose = likeliest if not decoding.temperature else partial(draw, decoding=decoding, rng=self.rng)
        return (int(token[0]) for token, _ in self.graphs.stream(encoded, decoding.max_new_tokens, choose))


class OnnxStream:
    """Yield the text of an answer piece by piece, each computed when it is asked for.

    Attributes:
        tokens, first, seconds: as those of `AnswerStream`.
    """

    def __init__(self, assistant: OnnxAssistant, ids: Iterator[int]):
        self.tokens, self.first, self.seconds, self.start = 0, None, None, perf_counter()
        self.texts = self._run(assistant, ids)

    def __iter__(self) -> Iterator[str]:
        return self.texts

    def _run(self, assistant: OnnxAssistant, ids: Iterator[int]) -> Iterator[str]:
        pieces = Pieces(assistant.prompt.decode)
        try:
            for token in ids:
                self.first = self.first or perf_counter() - self.start
                self.tokens += 1
                if piece := pieces.add([token]):
                    yield piece
            if piece := pieces.rest():
                yield piece
        finally:
            self.seconds = perf_counter() - self.start

    def stop(self) -> None:
        """End the answer."""
        self.texts.close()


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
