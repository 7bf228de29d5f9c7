"""Name the shapes that are measured, and make models of them with random weights."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from configuration_minivlm import MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration

IMAGE = 12  # token of a picture's place in our vocabulary


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a model, of the rows that it trains on, and of what it is asked."""

    vision: dict
    text: dict
    options: dict = field(default_factory=dict)
    captions: tuple[int, int] = (104, 314)  # shortest and longest row with a caption, tokens with those of the picture
    instructions: tuple[int, int] = (100, 500)
    padded: int = 768  # to which MiniMind-V pads each row
    prompt: int = 30  # tokens of a question beside the picture
    answer: int = 64

    @property
    def fits_llava(self) -> bool:
        """Return whether transformers' LLaVA takes the tower; it takes no convolutional one."""
        return "hidden_size" in self.vision

    def config(self) -> MiniVLMConfig:
        """Return the configuration of our model."""
        return MiniVLMConfig(vision_config=self.vision, text_config=self.text, image_token_id=IMAGE, **self.options)


MINIMIND = {  # MiniMind-3V
    "vision": {
        "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 256, "patch_size": 32,
    },
    "text": {
        "model_type": "minivlm_text", "vocab_size": 6400, "hidden_size": 768, "intermediate_size": 2432,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96,
        "max_position_embeddings": 32768,
    },
    "options": {"vision_feature_layer": None, "projector_layer_norm": True, "tie_word_embeddings": True},
}  # fmt: skip
TINY = {  # for tests
    "vision": MINIMIND["vision"] | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                    "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    "text": MINIMIND["text"] | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "options": MINIMIND["options"],
}  # fmt: skip
SHAPES = {
    "minimind-3v": Shape(**MINIMIND),
    "tiny": Shape(**TINY, captions=(8, 20), instructions=(8, 40), padded=48, prompt=5, answer=6),
}


def read_shape(name: str) -> Shape:
    """Return a shape by name, or that of a model's folder, whose rows are those of the embedded data.

    Raises:
        ValueError: neither a name nor a folder with a config.json.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"--shape {name} is neither {' nor '.join(SHAPES)} nor a folder with a config.json.")
    config = MiniVLMConfig.from_pretrained(name)
    options = {key: getattr(config, key) for key in MINIMIND["options"]}
    rows = {"captions": (90, 160), "instructions": (80, 120), "padded": 256}
    return Shape(config.vision_config.to_dict(), config.text_config.to_dict(), options, **rows)


def make_ours(shape: Shape) -> MiniVLMForConditionalGeneration:
    """Return our model of a shape, with random weights and a frozen tower."""
    torch.manual_seed(0)
    model = MiniVLMForConditionalGeneration(shape.config())
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def make_llava(shape: Shape) -> LlavaForConditionalGeneration:
    """Return transformers' own LLaVA with a Qwen 3 of the same shape: what a user could build without us.

    Its projector has no LayerNorm, and its tower's features are those before the last norm. Neither costs time.
    """
    torch.manual_seed(0)
    text = {key: value for key, value in shape.text.items() if key != "model_type"}
    config = LlavaConfig(
        vision_config=shape.vision, text_config=Qwen3Config(**text), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model.train()
