"""Compare the logits of two models on a prompt that both can take."""

import torch
from transformers import PreTrainedConfig

TOLERANCE = 1e-4  # share of the largest logit; fp32 rounding over 16 blocks stays below a tenth of it


def example(config: PreTrainedConfig, vocab_size: int, pictured: bool) -> dict[str, torch.Tensor]:
    """Make a random prompt from a fixed seed.

    Args:
        config: of the model; one without `image_token_id` takes no picture.
        vocab_size: upper bound of the token ids.
        pictured: whether the prompt has a picture.

    Returns:
        `input_ids` (1, T), and with a picture `pixel_values` (1, 3, H, W) and its image tokens among the ids.
    """
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
    """Return the largest difference of two sets of logits.

    Args:
        what: names the two in the message of an error.

    Raises:
        ValueError: the difference is more than `TOLERANCE` of the largest logit, or is not a number.
    """
    difference, limit = (actual - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
    if not difference <= limit:  # also true if the difference is NaN
        raise ValueError(f"{what} differ by {difference:.2e}, more than {limit:.2e}.")
    return difference
