"""Write the files beside ONNX graphs from which transformers.js loads them as a LLaVA."""

import json
import math
from pathlib import Path

from transformers import ProcessorMixin

from minivlm.convert.llava import beyond_llava, llava_config, llava_processor
from modeling_minivlm import MiniVLMForConditionalGeneration


def obstacles(model: MiniVLMForConditionalGeneration, folder: Path) -> list[str]:
    """Return the reasons why transformers.js cannot load the model with the graphs in `folder`, a phrase each."""
    reasons = [f"LLaVA cannot express {problem}" for problem in beyond_llava(model.config)]
    aside = sorted(path.name for path in (folder / "onnx").iterdir() if path.suffix != ".onnx")
    return reasons + [f"it does not look for {name}" for name in aside]


def save_settings(model: MiniVLMForConditionalGeneration, processor: ProcessorMixin, folder: Path) -> list[str]:
    """Write configuration, processor and tokenizer beside the graphs; return a line for the user.

    A model that transformers.js cannot load keeps its own configuration and processor, for onnxruntime.
    """
    model.generation_config.save_pretrained(folder)
    reasons = obstacles(model, folder)
    if reasons:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        return [f"transformers.js cannot load it: {'; '.join(reasons)}."]
    config = llava_config(model.config)
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], "float32"
    config.save_pretrained(folder)
    exported = llava_processor(processor, config)
    # transformers.js adds this number to the patches and ignores the strategy. With "full" Python counts the same.
    exported.num_additional_image_tokens = config.image_seq_length - math.prod(model.config.patch_grid)
    exported.vision_feature_select_strategy = "full"
    exported.save_pretrained(folder)
    pictures = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    write_json(folder / "preprocessor_config.json", pictures | {"processor_class": "LlavaProcessor"})
    # In a browser it would look for 8-bit graphs, which are not written here.
    update_json(folder / "config.json", {"transformers.js_config": {"dtype": "fp32"}})
    update_json(folder / "tokenizer_config.json", {"chat_template": processor.chat_template})
    return ["transformers.js loads it as LlavaForConditionalGeneration."]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def update_json(path: Path, more: dict) -> None:
    """Add or replace keys of a JSON file."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | more)
