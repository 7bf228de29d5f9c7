"""Make a model of about 40,000 parameters, its processor, prompts and pictures: tests of it take seconds."""

from pathlib import Path

import torch
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, set_seed

from configuration_minivlm import MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 128  # the tokenizer has 6,400 entries; the model's tests write token ids themselves

SIGLIP = {"model_type": "siglip_vision_model"}
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 32,
    "patch_size": 16,  # 2 x 2 patches: a picture takes 4 image tokens
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = {
    "model_type": "minivlm_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads, so that a confusion of the two shows
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # greedy answers of an untrained model then differ from token to token
}


def make_config(vision=None, text=None, **options) -> MiniVLMConfig:
    """Return the tiny configuration; `vision` and `text` replace entries of VISION and TEXT."""
    return MiniVLMConfig(vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), **options)


def make_model(config=None, seed=0, **options) -> MiniVLMForConditionalGeneration:
    """Make a seeded model whose norms and biases are random, too: with 1 and 0 a mix-up of them would not show."""
    set_seed(seed)
    model = MiniVLMForConditionalGeneration(config or make_config(**options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    # No end-of-sequence token: every sequence that is compared has the full length.
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    return model


def make_prompt(*parts, image_token=12, image_tokens=4) -> torch.Tensor:
    """Return token ids (1, T): an int in `parts` adds that many text tokens, "image" one picture's image tokens."""
    ids, text = [], 20
    for part in parts:
        if part == "image":
            ids += [image_token] * image_tokens
        else:
            ids += [20 + (text + 7 * i) % 100 for i in range(part)]
            text += 7 * part
    return torch.tensor([ids])


def make_pixels(pictures: int, seed=0, size=32) -> torch.Tensor:
    """Return `pixel_values` (N, 3, H, W) of different pictures."""
    return torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(actual, expected, atol=1e-5):
    """Assert that two tensors agree within `atol` plus `atol` times the value."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=atol)


def make_processor(size=32, image_tokens=4) -> MiniVLMProcessor:
    """Return the processor of the tiny model, with the tokenizer and the chat template of the repository."""
    image_processor = CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT, padding_side="left")
    template = (ROOT / "chat_template.jinja").read_text()
    return MiniVLMProcessor(image_processor, tokenizer, chat_template=template, image_seq_length=image_tokens)


def save(folder, **options):
    """Save a tiny model with the full vocabulary and its processor in `folder`; return the model."""
    text = options.pop("text", {}) | {"vocab_size": 6400}
    model = make_model(make_config(options.pop("vision", {}), text, **options))
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    make_processor(size=size, image_tokens=model.config.image_seq_length).save_pretrained(folder)
    return model
