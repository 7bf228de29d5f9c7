"""Write the files beside ONNX graphs from which transformers.js loads them as a LLaVA.

Python's LLaVA is a class with weights, and expresses few towers and projectors. transformers.js runs graphs: tower and
projector are inside `vision_encoder.onnx` and may be any. It reads three things of the model: the number of decoder
blocks, whose empty caches it makes; how many image tokens a picture takes; and how a picture becomes `pixel_values`.
"""

import json
import math
from pathlib import Path

from transformers import LlavaConfig, LlavaProcessor, PreTrainedConfig, ProcessorMixin

from configuration_minivlm import MiniVLMConfig
from minivlm.convert.llava import forget_our_code, published_decoder
from minivlm.convert.onnx_graphs import LARGEST_FILE
from modeling_minivlm import MiniVLMForConditionalGeneration

# Types of decoders whose blocks transformers.js 4.3.1 counts under transformers' names (src/configs.js), and whose
# cache is a key and a value for each block.
DECODERS = """arcee cohere cohere2 ernie4_5 gemma gemma2 gemma3_text glm granite helium llama ministral mistral olmo
olmo2 olmo3 phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2""".split()


def obstacles(config: MiniVLMConfig, processor: ProcessorMixin) -> list[str]:
    """Return the reasons why transformers.js cannot run the model's graphs, a phrase each."""
    reasons, decoder = [], published_decoder(config.text_config).model_type
    if decoder not in DECODERS:
        reasons.append(f"it does not know a decoder of type {decoder!r}. It knows {', '.join(DECODERS)}")
    made, wanted = picture_size(processor.image_processor), tower_size(config)
    if made != wanted:
        shown = f"of {made[0]} x {made[1]} pixels" if made else "of different sizes"
        reasons.append(
            f"the processor makes pictures {shown}, and it runs towers of one size, here {wanted[0]} x {wanted[1]}. "
            "Set size and crop_size in processor_config.json"
        )
    return reasons


def too_large(model: MiniVLMForConditionalGeneration) -> list[str]:
    """Return a phrase if the weights of a graph do not fit into its file: transformers.js looks for no second file."""
    parts = (model.get_input_embeddings(), model.model.language_model, model.model.vision_tower)
    largest = max(sum(4 * weight.numel() for weight in part.parameters()) for part in parts)
    limit = f"the weights of a graph have {largest / 1e9:.1f} GB in fp32, more than {LARGEST_FILE / 1e9} GB"
    return [limit] if largest > LARGEST_FILE else []


def tower_size(config: MiniVLMConfig) -> tuple[int, int]:
    """Return height and width of the pictures that the tower takes."""
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def picture_size(image_processor) -> tuple[int, int] | None:
    """Return height and width of what the processor makes of every picture; None if they depend on the picture."""
    settings = image_processor.to_dict()
    size = settings.get("crop_size" if settings.get("do_center_crop") else "size") or {}
    return (size["height"], size["width"]) if size.get("height") and size.get("width") else None


def save_settings(model: MiniVLMForConditionalGeneration, processor: ProcessorMixin, folder: Path) -> list[str]:
    """Write configuration, processor and tokenizer beside the graphs; return a line for the user.

    A model that transformers.js cannot run keeps its own configuration and processor, for onnxruntime.
    """
    model.generation_config.save_pretrained(folder)
    if reasons := obstacles(model.config, processor) + too_large(model):
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return [f"transformers.js cannot run it: {'; '.join(reasons)}."]
    config = graph_config(model.config)
    config.save_pretrained(folder)
    graph_processor(processor, model.config).save_pretrained(folder)
    pictures = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    write_json(folder / "preprocessor_config.json", pictures | {"processor_class": "LlavaProcessor"})
    # In a browser it would look for 8-bit graphs, which are not written here.
    update_json(folder / "config.json", {"transformers.js_config": {"dtype": "fp32"}})
    update_json(folder / "tokenizer_config.json", {"chat_template": processor.chat_template})
    return ["transformers.js loads it as LlavaForConditionalGeneration."]


def graph_config(config: MiniVLMConfig) -> PreTrainedConfig:
    """Return the configuration that names the graphs a LLaVA; tower and decoder are described for a reader."""
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype="float32",
        vision_config=config.vision_config.to_dict(),
        text_config=published_decoder(config.text_config),
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def graph_processor(processor: ProcessorMixin, config: MiniVLMConfig) -> LlavaProcessor:
    """Return LLaVA's processor, with which transformers.js counts as many image tokens as the model has.

    transformers.js divides the picture's sides by `patch_size`, rounds down, multiplies, and adds
    `num_additional_image_tokens`. It ignores the strategy; Python counts the same with "full".
    """
    sides = tower_size(config)
    patch_size = sides[0] // config.patch_grid[0]
    patches = math.prod(side // patch_size for side in sides)
    forget_our_code(processor)
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=config.image_seq_length - patches,
    )


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def update_json(path: Path, more: dict) -> None:
    """Add or replace keys of a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | more)
