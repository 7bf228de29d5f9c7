"""Count the FLOPs of a training step by part, and those of Muon's Newton-Schulz iteration.

A product of (a, b) with (b, c) takes 2 a b c FLOPs. A backward pass takes twice its forward pass (arXiv 2104.04473,
appendix). Norms, activations and the softmax are left out, as there.
"""

from dataclasses import dataclass

from tools.scale.shapes import Sizes

NEWTON_SCHULZ_STEPS = 5  # of torch.optim.Muon


@dataclass(frozen=True)
class Rows:
    """Hold what a step, or a micro-batch of it, is made of: `count` rows of equal length.

    Args:
        tokens: of a row, those of its pictures among them.
        pictures: of a row.
    """

    count: int = 1
    tokens: int = 364
    pictures: int = 1

    def answers(self, model: Sizes) -> int:
        """Return the tokens of a row that carry loss: half of its text, as in `minivlm benchmark`.

        Raises:
            ValueError: the pictures take more tokens than the row has.
        """
        text = self.tokens - self.pictures * model.image_tokens
        if text < 0:
            raise ValueError(
                f"{self.pictures} pictures take {self.pictures * model.image_tokens} tokens, but a row has "
                f"{self.tokens}. Use longer rows or fewer pictures."
            )
        return text - text // 2


def forward_flops(model: Sizes, rows: Rows) -> dict[str, int]:
    """Return the FLOPs of the forward pass by part; `attention` is that of the decoder alone.

    Scores are counted for all pairs of tokens of a row, as PyTorch's counter and arXiv 2104.04473 do. A kernel that
    leaves out the masked half needs half of `attention`.
    """
    tower = model.tower
    picture = 2 * tower.patches * (tower.matrices + tower.inputs * tower.width)
    picture += tower.layers * 4 * tower.patches**2 * tower.width
    cost = {
        "tower": rows.pictures * picture,
        "projector": 2 * rows.pictures * model.image_tokens * model.projector,
        "decoder": 2 * rows.tokens * model.matrices,
        "attention": model.layers * 4 * rows.tokens**2 * model.heads * model.head_dim,
        "head": 2 * rows.answers(model) * model.head,
    }
    return {part: rows.count * flops for part, flops in cost.items()}


def step_flops(model: Sizes, rows: Rows, recompute: bool = False) -> dict[str, int]:
    """Return the FLOPs of a forward and a backward pass by part.

    The tower is frozen and has no backward pass. With `recompute` the blocks of the decoder run forward twice
    (arXiv 2104.04473, section 3.5).
    """
    passes = dict.fromkeys(("projector", "head"), 3) | dict.fromkeys(("decoder", "attention"), 3 + recompute)
    return {part: passes.get(part, 1) * flops for part, flops in forward_flops(model, rows).items()}


def newton_schulz_flops(model: Sizes) -> int:
    """Return the FLOPs that Muon takes to orthogonalize the gradients of all blocks, once a step.

    Each iteration on (m, n), m <= n, takes X X^T, its square, and a product with X: 4 m^2 n + 2 m^3 FLOPs (Jordan et
    al. 2024, Muon).
    """
    pairs = [sorted(matrix) for matrix in model.block]
    return model.layers * NEWTON_SCHULZ_STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in pairs)


def rows_for_share(model: Sizes, row: Rows, share: float) -> int:
    """Return the rows of a step from which Newton-Schulz is at most `share` of all FLOPs of the step."""
    total = newton_schulz_flops(model)
    return -int(-total * (1 - share) / share // sum(step_flops(model, row).values()))
