"""Compute the bytes that a rank holds: weights, gradients, moments of AdamW, activations.

DDP and FSDP 2 are as Accelerate runs them with bf16: weights, gradients and both moments in fp32. Under autocast DDP
also holds a copy of all weights in bf16 until the backward pass is over. ZeRO is as DeepSpeed runs it: weights and
gradients in bf16, a copy of the weights and both moments in fp32 (arXiv 1910.02054, section 3.1).
"""

from dataclasses import dataclass

from tools.scale.flops import Rows
from tools.scale.shapes import Sizes

LOGITS = 14  # bytes of an entry of the logits at the peak


@dataclass(frozen=True)
class Share:
    """Hold the bytes of a parameter, and whether the ranks divide them."""

    size: int
    divided: bool

    def on(self, ranks: int) -> float:
        """Return the bytes of a parameter on one of `ranks` ranks."""
        return self.size / ranks if self.divided else self.size


@dataclass(frozen=True)
class Held:
    """Hold what a strategy keeps of each parameter; frozen parameters have weights alone."""

    weights: Share
    gradients: Share
    states: Share
    gathered: bool = False  # the weights of a block come together in bf16 while it computes


HELD = {  # ZeRO: figure 1 of arXiv 1910.02054; FSDP: section 3 of arXiv 2304.11277
    "DDP": Held(Share(6, False), Share(4, False), Share(8, False)),
    "ZeRO 1": Held(Share(2, False), Share(2, False), Share(12, True)),
    "ZeRO 2": Held(Share(2, False), Share(2, True), Share(12, True)),
    "FSDP 2": Held(Share(4, True), Share(4, True), Share(8, True), gathered=True),
}


def state_bytes(model: Sizes, strategy: str, ranks: int) -> dict[str, float]:
    """Return the bytes on a rank of weights, gradients, moments, and of what is gathered for a while.

    FSDP gathers the block that computes and the next one, and makes the gradient of one in bf16. The token embeddings
    are gathered alone.
    """
    held = HELD[strategy]
    largest = max(model.matrices // model.layers, model.head)
    return {
        "weights": held.weights.on(ranks) * (model.trained + model.tower.parameters),
        "gradients": held.gradients.on(ranks) * model.trained,
        "moments": held.states.on(ranks) * model.trained,
        "gathered": 3 * 2 * largest if held.gathered and ranks > 1 else 0,
    }


def block_bytes(model: Sizes) -> int:
    """Return the bytes of a token's activations in a block under bf16 autocast, with attention that keeps no scores.

    In the order of the forward pass: two norms (input and normalized input in fp32, and a factor), the inputs of five
    matrices in bf16, query and key before their norm in fp32 and after it in bf16, what attention keeps (query, key,
    value, output, log-sum-exp), four inner activations of the MLP. A test compares the sum to what autograd keeps.
    """
    norms = 2 * (4 + 4) * model.width + 2 * 4
    inputs = 5 * 2 * model.width
    heads, width = model.heads + model.key_value_heads, model.head_dim
    head_norms = heads * ((4 + 2) * width + 4)
    attention = 2 * heads * width + 2 * heads * width + 4 * model.heads
    return norms + inputs + head_norms + attention + 4 * 2 * model.inner


def activation_bytes(model: Sizes, rows: Rows, recompute: bool = False) -> int:
    """Return the bytes of activations at the peak of a step; the frozen tower keeps none.

    With `recompute` a block keeps its input in fp32, and one block at a time has the rest (arXiv 2104.04473, section
    3.5). The logits of an answer's token take 14 bytes an entry when the backward pass begins: the logits in bf16, and
    in fp32 their log-softmax, its gradient, and the gradient of the logits.
    """
    tokens = rows.count * rows.tokens
    kept = 4 * model.width * model.layers + block_bytes(model) if recompute else block_bytes(model) * model.layers
    projector = 6 * model.tower.width + 8 + 4 * model.width
    pictures = rows.count * rows.pictures * model.image_tokens * projector
    logits = LOGITS * model.vocabulary * rows.count * rows.answers(model)
    return tokens * (kept + 8 * model.width + 4) + pictures + logits


def largest_micro_batch(model: Sizes, strategy: str, ranks: int, memory: float, row: Rows, recompute: bool) -> int:
    """Return how many rows like `row` fit into `memory` bytes of a rank at once; 0 if not one does."""
    left = memory - sum(state_bytes(model, strategy, ranks).values())
    return max(0, int(left // activation_bytes(model, row, recompute)))
