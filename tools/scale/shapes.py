"""Hold the sizes of the models whose cost is computed, and count their parameters.

The first model has the shape of MiniMind-3V. The decoders of the others have the sizes of Qwen3-0.6B and Qwen3-1.7B
(arXiv 2505.09388 and their config.json), and those of Qwen3-8B with 32 blocks instead of 36. All have the tower of the
first model, which stays frozen, and share the LM head with the token embeddings.
"""

from dataclasses import dataclass

from configuration_minivlm import MiniVLMConfig
from minivlm.benchmark.shapes import MINIMIND, Shape

QWEN = {"vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
DECODERS = {  # what differs from MiniMind-3V
    "64 M": {},
    "0.6 B": QWEN | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "1.7 B": QWEN | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "6.8 B": QWEN
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32},
}


@dataclass(frozen=True)
class Tower:
    """Hold the sizes of a vision transformer that reads a picture as `patches` patches of `inputs` numbers each."""

    width: int
    inner: int
    layers: int
    patches: int
    inputs: int

    @property
    def matrices(self) -> int:
        """Return the parameters of the blocks' matrices: four of attention, two of the MLP."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def parameters(self) -> int:
        """Return all parameters: matrices, biases, two norms a block and one more, patch and position embeddings."""
        biases = self.layers * (5 * self.width + self.inner)
        norms = (2 * self.layers + 1) * 2 * self.width
        return self.matrices + biases + norms + (self.inputs + 1 + self.patches) * self.width


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes of a model: a frozen tower, a projector with a LayerNorm and two layers, a decoder."""

    name: str
    tower: Tower
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    image_tokens: int

    @property
    def block(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of the matrices of a block: query, key, value, output, gate, up, down."""
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        attention = [(query, self.width), (key, self.width), (key, self.width), (self.width, query)]
        return [*attention, (self.inner, self.width), (self.inner, self.width), (self.width, self.inner)]

    @property
    def matrices(self) -> int:
        """Return the parameters of the matrices of all blocks of the decoder."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.block)

    @property
    def head(self) -> int:
        """Return the parameters of the LM head, which are those of the token embeddings."""
        return self.vocabulary * self.width

    @property
    def projector(self) -> int:
        """Return the parameters of the two matrices of the projector."""
        return self.tower.width * self.width + self.width**2

    @property
    def trained(self) -> int:
        """Return the parameters that train: decoder and projector, with norms and biases."""
        norms = self.layers * (2 * self.width + 2 * self.head_dim) + self.width
        return self.matrices + self.head + norms + self.projector + 2 * self.tower.width + 2 * self.width


def sizes(name: str, config: MiniVLMConfig) -> Sizes:
    """Return the sizes of a configuration with a SigLIP tower and a dense decoder."""
    vision, text = config.vision_config, config.text_config
    rows, columns = config.patch_grid
    tower = Tower(vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, rows * columns,
                  vision.num_channels * vision.patch_size**2)  # fmt: skip
    heads = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    decoder = text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers
    return Sizes(name, tower, *decoder, *heads, config.image_seq_length)


def shape_of(name: str) -> Shape:
    """Return the shape of one of the models, of which `make_ours` makes a model."""
    return Shape(MINIMIND["vision"], MINIMIND["text"] | DECODERS[name], MINIMIND["options"])


MODELS = {name: sizes(name, shape_of(name).config()) for name in DECODERS}
