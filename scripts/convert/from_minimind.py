"""MiniMind's and MiniMind-V's weights into this repository's form."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from backbones_minivlm import (
    IMAGE,
    build_processor,
    check_source,
    generation_defaults,
    load_weights,
    prepare_tokenizer,
)
from configuration_minivlm import MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration
from scripts.convert.files import new_folder, read_tensors
from scripts.convert.minimind import PROJECTORS, TOWERS, Tensors, compare, names, read_config

# Before our chat template, so that it writes MiniMind's prompts: an empty thought, or MiniMind2's system message.
TEMPLATES = {
    "mlp": "{%- set enable_thinking = enable_thinking if enable_thinking is boolean else false %}\n",
    "linear": "{%- if messages[0].role != 'system' %}{%- set messages = "
    "[{'role': 'system', 'content': 'You are a helpful assistant'}] + messages %}{%- endif %}\n",
}


def from_minimind(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vision_model: str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> list[str]:
    """Convert a file or transformers folder of MiniMind's into the folder `out`: a MiniVLM, or a decoder alone.

    Args:
        source: `.pth`, `.bin` or `.safetensors` file, or a folder with config.json and weights.
        tokenizer: folder of MiniMind's tokenizer; a transformers folder holds its own.
        vision_model: folder or Hub id of the tower that MiniMind-V was trained with; its file leaves it out.
        dtype: of the result; default: that of the source.
        verify: also hold its logits against `formulas`.

    Returns:
        Lines about what was done, for a person.
    """
    tensors = read_tensors(source)
    projector = next((kind for kind, parts in PROJECTORS.items() if f"{[*parts][-1]}.weight" in tensors), None)
    path = Path(source) / "config.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = read_config(tensors, stated, multimodal=projector is not None)
    if tokenizer is None and not Path(source).is_dir():
        raise ValueError(f"{source} is a file without a tokenizer: name the folder of MiniMind's by --tokenizer.")
    tokenizer = str(tokenizer or source)
    check_source("tokenizer", tokenizer, "tokenizer_config.json")
    vocab_size = text.vocab_size
    if projector:
        if vision_model is None:
            raise ValueError(
                f"{source} holds no vision tower: name a folder or Hub id of its tower by --vision_model."
            )
        model, processor = vision_language(text, projector, tokenizer, vision_model, stated)
    elif vision_model:
        raise ValueError(
            f"{source} is a language model. Convert it without --vision_model, and join the two: "
            "python -m scripts.convert build --vision_model ... --text_model OUT."
        )
    else:
        model = AutoModelForCausalLM.from_config(text)
        processor = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        ids = {f"{key}_token_id": getattr(processor, f"{key}_token_id") for key in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**ids)
    table = names(text, projector, vocab_size)
    fill(model, tensors, table)
    if text.vocab_size > vocab_size:  # the image token's own row; like nothing else, it is never looked up
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.data[vocab_size:] = weight.data[:vocab_size].mean(0)
    for tensor in tensors.values() if dtype is None else ():
        dtype = torch.promote_types(tensor.dtype, dtype or tensor.dtype)
    model.to(dtype)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        lines = [f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers, all used once"]
        if verify:
            lines += compare(type(model).from_pretrained(folder, dtype=torch.float32), tensors)
    return lines


def vision_language(text: PreTrainedConfig, projector: str, tokenizer: str, vision_model: str, stated: dict):
    """A model whose decoder and projector wait for MiniMind's weights, around a tower that has its own."""
    check_source("vision_model", vision_model, "config.json")
    tower = AutoModel.from_pretrained(vision_model, dtype=torch.float32)
    tower = getattr(tower, "vision_model", tower)
    if tower.config.model_type != TOWERS[projector]:
        raise ValueError(
            f"--vision_model {vision_model} is of type {tower.config.model_type!r}, but this projector was trained on "
            f"{TOWERS[projector]!r}. Name the tower of the training run."
        )
    prepared = prepare_tokenizer(tokenizer)
    if len(prepared) - 1 > text.vocab_size:
        raise ValueError(
            f"--tokenizer {tokenizer} has {len(prepared)} entries, the weights {text.vocab_size}. Name the tokenizer "
            "of the training run."
        )
    text.vocab_size = max(text.vocab_size, len(prepared))  # MiniMind2's has no image token: one is added
    for key in ("bos", "eos", "pad"):
        setattr(text, f"{key}_token_id", getattr(prepared, f"{key}_token_id"))
    config = MiniVLMConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=prepared.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=None,
        projector_type=projector,
        projector_layer_norm=projector == "mlp",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    trained = stated.get("image_token_len") or len(stated.get("image_ids", [])[1:]) + 1
    if trained not in (1, config.image_seq_length):
        raise ValueError(
            f"--vision_model {vision_model} makes {config.image_seq_length} features of a picture, config.json says "
            f"{trained}. Name the tower of the training run."
        )
    model = MiniVLMForConditionalGeneration._from_config(config)
    load_weights(model.model.vision_tower, tower, vision_model)
    model.generation_config = generation_defaults(config, prepared)
    processor = build_processor(config, prepared, published_image_processor(vision_model))
    processor.chat_template = TEMPLATES[projector] + processor.chat_template
    return model, processor


def published_image_processor(source: str) -> CLIPImageProcessorPil:
    """The image processor that a tower was published with, so that it sees pictures as it did in MiniMind-V."""
    try:
        published, _ = CLIPImageProcessorPil.get_image_processor_dict(source)
    except OSError:
        raise ValueError(
            f"--vision_model {source} has no preprocessor_config.json, which says how pictures are resized and "
            "normalised. Copy it from where the tower was published."
        ) from None
    kept = (
        "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std"
    )
    options = {"do_center_crop": False} | {key: published[key] for key in kept.split() if key in published}
    return CLIPImageProcessorPil(**options)


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Tensors, table: dict[str, tuple[str, tuple]]) -> None:
    """Copy every tensor to its place in `model`, exactly once.

    Raises:
        ValueError: tensors that are missing, left over, or of another size; all of them at once.
    """
    ours, problems = model.state_dict(), []
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name in sorted(table.keys() - tensors.keys() - optional):
        problems.append(f"{name} is missing")
    for name in sorted(tensors.keys() - table.keys()):
        problems.append(f"{name} {tuple(tensors[name].shape)} has no place here")
    for name in sorted(table.keys() & tensors.keys()):
        target, index = table[name]
        place, tensor = ours[target][index], tensors[name]
        if place.shape == tensor.shape:
            place.copy_(tensor)
        else:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(place.shape)}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("These weights do not fit:\n" + "\n".join(f"- {p}" for p in problems[:20] + more))
