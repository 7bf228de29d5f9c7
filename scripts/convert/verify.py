"""Hold two models' logits against each other on a prompt that both can be given."""

import torch
from transformers import PreTrainedConfig

TOLERANCE = 1e-4  # of the largest logit; fp32 rounding over 16 blocks stays below a tenth of it


def example(config: PreTrainedConfig, vocab_size: int, pictured: bool) -> dict[str, torch.Tensor]:
    """Seeded `input_ids` (1, T), and `pixel_values` (1, 3, H, W) with their placeholders among the ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (40,), generator=generator)
    if not hasattr(config, "image_token_id"):
        return {"input_ids": ids[None]}
    ids = ids[ids != config.image_token_id]
    if not pictured:
        return {"input_ids": ids[None]}
    side, picture = config.vision_config.image_size, torch.full((config.image_seq_length,), config.image_token_id)
    ids = torch.cat((ids[:4], picture, ids[4:]))
    return {"input_ids": ids[None], "pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def largest_difference(actual: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    """Raises ValueError if it is more than `TOLERANCE` of the largest logit."""
    difference, limit = (actual - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
    if not difference <= limit:  # also if it is not a number
        raise ValueError(f"{what} differ by {difference:.2e}, more than {limit:.2e}.")
    return difference
