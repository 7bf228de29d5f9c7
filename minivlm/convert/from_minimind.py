"""Convert the weights of MiniMind-V to a MiniVLM, and those of MiniMind to a decoder of transformers."""

import json
from functools import reduce
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

from configuration_minivlm import MiniVLMConfig
from minivlm.convert.files import new_folder, read_tensors
from minivlm.convert.minimind import PROJECTORS, TOWERS, Tensors, compare, names, read_config
from minivlm.model.backbones import IMAGE, build_processor, generation_defaults, load_weights, prepare_tokenizer
from minivlm.model.loading import check_name
from modeling_minivlm import MiniVLMForConditionalGeneration

# Put before our chat template, so that it writes MiniMind's prompts: with an empty thought before each answer, or with
# MiniMind2's system message.
TEMPLATES = {
    "mlp": "{%- set enable_thinking = enable_thinking if enable_thinking is boolean else false %}\n",
    "linear": "{%- if messages[0].role != 'system' %}{%- set messages = "
    "[{'role': 'system', 'content': 'You are a helpful assistant'}] + messages %}{%- endif %}\n",
}
# Settings of a published image processor that change the pixels.
KEPT = "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std"


def from_minimind(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vision_model: str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> list[str]:
    """Write a MiniVLM from MiniMind-V's weights, or a decoder from MiniMind's, into the folder `out`.

    Args:
        source: `.pth`, `.bin` or `.safetensors` file, or a transformers folder with config.json and weights.
        tokenizer: folder of MiniMind's tokenizer. Default: `source`, if that is a folder.
        vision_model: folder or Hub id of the tower that MiniMind-V was trained with; its files do not hold it.
        dtype: data type of the result. Default: that of the source.
        verify: also compare the saved model's logits with MiniMind's formulas; a difference is an error.

    Returns:
        Lines for the user.

    Raises:
        ValueError: a tensor does not fit, a part is missing, or the comparison failed.
    """
    tensors = read_tensors(source)
    model, processor = load_minimind(source, tensors, tokenizer, vision_model)
    model.to(dtype or common_dtype(tensors))
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        lines = [f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers, all used once"]
        if verify:
            lines += compare(type(model).from_pretrained(folder, dtype=torch.float32), tensors)
    return lines


def load_minimind(source: str | Path, tensors: Tensors, tokenizer: str | None, vision_model: str | None):
    """Return a model in fp32 with the weights `tensors` of `source`, and its processor; a decoder has a tokenizer."""
    stated, projector = read_stated(Path(source)), find_projector(tensors)
    text = read_config(tensors, stated, multimodal=projector is not None)
    table = names(text, projector, text.vocab_size)  # before the image token's row is added
    tokenizer = find_tokenizer(source, tokenizer)
    check_vision_model(source, projector, vision_model)
    if projector:
        model, processor = vision_language(text, projector, tokenizer, vision_model)
        check_image_tokens(model.config, stated, vision_model)
    else:
        model, processor = language_model(text, tokenizer)
    fill(model, tensors, table)
    return model, processor


def read_stated(source: Path) -> dict:
    """Return config.json of the folder `source`; empty if there is none."""
    path = source / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_projector(tensors: Tensors) -> str | None:
    """Return the kind of MiniMind-V's projector; None if the file is a language model's."""
    return next((kind for kind, parts in PROJECTORS.items() if f"{[*parts][-1]}.weight" in tensors), None)


def common_dtype(tensors: Tensors) -> torch.dtype:
    """Return the data type that holds the numbers of all tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


def find_tokenizer(source: str | Path, tokenizer: str | None) -> str:
    """Return the folder of the tokenizer; raise ValueError if there is none."""
    if tokenizer is None and not Path(source).is_dir():
        raise ValueError(f"{source} is a file without a tokenizer: name the folder of MiniMind's by --tokenizer.")
    tokenizer = str(tokenizer or source)
    check_name("--tokenizer", tokenizer, "tokenizer_config.json")
    return tokenizer


def check_vision_model(source: str | Path, projector: str | None, vision_model: str | None) -> None:
    """Raise ValueError if MiniMind-V comes without a tower, or MiniMind with one."""
    if projector and vision_model is None:
        raise ValueError(f"{source} holds no vision tower: name a folder or Hub id of its tower by --vision_model.")
    if vision_model and not projector:
        raise ValueError(
            f"{source} is a language model. Convert it without --vision_model, and join the two: "
            "minivlm convert build --vision_model ... --text_model OUT."
        )


def language_model(text: PreTrainedConfig, tokenizer: str):
    """Return a decoder without its weights, as transformers' own class, and its tokenizer."""
    model = AutoModelForCausalLM.from_config(text)
    processor = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    ids = {f"{key}_token_id": getattr(processor, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    return model, processor


def vision_language(text: PreTrainedConfig, projector: str, tokenizer: str, vision_model: str):
    """Return a MiniVLM without the weights of decoder and projector, and its processor; the tower has its own weights.

    `text` gets the token ids of the tokenizer, and a row for the image token if the vocabulary has none.
    """
    tower, prepared = load_tower(projector, vision_model), prepare_tokenizer(tokenizer)
    if len(prepared) - 1 > text.vocab_size:
        raise ValueError(
            f"--tokenizer {tokenizer} has {len(prepared)} entries, the weights {text.vocab_size}. Name the tokenizer "
            "of the training run."
        )
    text.vocab_size = max(text.vocab_size, len(prepared))  # MiniMind2's tokenizer has no image token: one is added
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
    model = MiniVLMForConditionalGeneration._from_config(config)
    load_weights(model.model.vision_tower, tower, vision_model)
    model.generation_config = generation_defaults(config, prepared)
    processor = build_processor(config, prepared, published_image_processor(vision_model))
    processor.chat_template = TEMPLATES[projector] + processor.chat_template
    return model, processor


def load_tower(projector: str, vision_model: str) -> PreTrainedModel:
    """Load the tower in fp32; raise ValueError if MiniMind-V uses another kind with this projector."""
    check_name("--vision_model", vision_model, "config.json")
    tower = AutoModel.from_pretrained(vision_model, dtype=torch.float32)
    tower = getattr(tower, "vision_model", tower)
    if tower.config.model_type != TOWERS[projector]:
        raise ValueError(
            f"--vision_model {vision_model} is of type {tower.config.model_type!r}, but this projector was trained on "
            f"{TOWERS[projector]!r}. Name the tower of the training run."
        )
    return tower


def check_image_tokens(config: MiniVLMConfig, stated: dict, vision_model: str) -> None:
    """Raise ValueError if config.json states another number of image tokens than the tower gives."""
    trained = stated.get("image_token_len") or len(stated.get("image_ids", [])[1:]) + 1
    if trained not in (1, config.image_seq_length):
        raise ValueError(
            f"--vision_model {vision_model} makes {config.image_seq_length} features of a picture, config.json says "
            f"{trained}. Name the tower of the training run."
        )


def published_image_processor(source: str) -> CLIPImageProcessorPil:
    """Return the image processor that the tower was published with, so that pictures are prepared as in MiniMind-V."""
    try:
        published, _ = CLIPImageProcessorPil.get_image_processor_dict(source)
    except OSError:
        raise ValueError(
            f"--vision_model {source} has no preprocessor_config.json, which says how pictures are resized and "
            "normalised. Copy it from where the tower was published."
        ) from None
    options = {"do_center_crop": False} | {key: published[key] for key in KEPT.split() if key in published}
    return CLIPImageProcessorPil(**options)


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Tensors, table: dict[str, tuple[str, tuple]]) -> None:
    """Copy every tensor to its place in `model`, exactly once; rows that we added to the vocabulary get their mean.

    Raises:
        ValueError: tensors are missing, left over, or of another size. The message lists the first twenty.
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
    known = len(tensors["model.embed_tokens.weight"])
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        if len(weight) > known:  # the image token's row, which no text uses
            weight[known:] = weight[:known].mean(0)
