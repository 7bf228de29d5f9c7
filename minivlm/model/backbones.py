"""Build the model to start from: a checkpoint, random weights, or a trained tower joined to a trained decoder."""

import json

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

import minivlm.model.branch_attention  # noqa: F401  registers sdpa_packed and sdpa_branches
from configuration_minivlm import MiniVLMConfig
from minivlm.model.loading import load_trained, register_config
from minivlm.model.options import ModelArgs
from minivlm.resources import ASSETS
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor

TURN_START, TURN_END, IMAGE = "<|im_start|>", "<|im_end|>", "<|image_pad|>"  # tokens of our chat template
# Of an answer. `generate` alone stops at 20, but the embedded data's longest caption has 75. The same as the limit of
# transformers' image-text-to-text pipeline.
MAX_NEW_TOKENS = 256
NORMALISATION = {  # family of the tower -> mean and standard deviation that it was trained with
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),  # one half each
    "dino": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


def build(args: ModelArgs) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Return model and processor: those of `args.model`, or new ones from `model_config` and trained parts."""
    if args.model:
        model, processor = load_trained(args.model)
        if args.attn_implementation:
            model.set_attn_implementation(args.attn_implementation)
        return model.float(), processor
    config, tokenizer = model_from_scratch(args)
    tower = decoder = None
    if args.vision_model:
        tower = AutoModel.from_pretrained(args.vision_model, dtype=torch.float32)
        tower = getattr(tower, "vision_model", tower)  # CLIP and SigLIP also hold a text encoder
    if args.text_model:
        decoder = AutoModelForCausalLM.from_pretrained(args.text_model, dtype=torch.float32)
        resize_vocabulary(decoder, config.text_config.vocab_size)
    model = MiniVLMForConditionalGeneration._from_config(config, attn_implementation=args.attn_implementation)
    model.generation_config = generation_defaults(config, tokenizer)
    if tower is not None:
        load_weights(model.model.vision_tower, tower, args.vision_model)
    if decoder is not None:
        load_weights(model.model.language_model, decoder.base_model, args.text_model)
        if not config.tie_word_embeddings:
            load_weights(model.lm_head, decoder.get_output_embeddings(), args.text_model)
    return model, build_processor(config, tokenizer)


def model_from_scratch(args: ModelArgs):
    """Return configuration and tokenizer of a new model.

    The configurations of `vision_model` and `text_model` replace those in `model_config`.

    Raises:
        ValueError: a named model is of the wrong kind or size, or the vocabulary is smaller than the tokenizer.
    """
    register_config()  # or AutoTokenizer would ask to run the configuration's code beside a tokenizer of ours
    text = AutoConfig.from_pretrained(args.text_model) if args.text_model else None
    if text and not hasattr(text, "vocab_size"):
        raise ValueError(
            f"--text_model {args.text_model} is of type {text.model_type!r}, which is not a causal decoder. Name a "
            "language model."
        )
    tokenizer = prepare_tokenizer(args.tokenizer or args.text_model or str(ASSETS))
    options = dict(args.model_config or {})
    if text:
        check_agrees("text", args.text_model, options.get("text_config"), text)
        text.vocab_size = max(text.vocab_size, len(tokenizer))
        options |= {"text_config": text, "tie_word_embeddings": text.tie_word_embeddings}
    if args.vision_model:
        vision = AutoConfig.from_pretrained(args.vision_model)
        vision = getattr(vision, "vision_config", vision)
        check_agrees("vision", args.vision_model, options.get("vision_config"), vision)
        options["vision_config"] = vision
    options["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE)
    config = MiniVLMConfig(**options)
    if config.text_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"`vocab_size`={config.text_config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} entries. "
            "Raise text_config.vocab_size in model_config."
        )
    return config, tokenizer


def as_json(value):
    """Return a value as it comes back from a file: `id2label` has numbers as keys in memory and strings in JSON."""
    return json.loads(json.dumps(value, default=str))


def check_agrees(part: str, source: str, wanted: dict | None, found) -> None:
    """Raise ValueError if a recipe states other sizes than the backbone `source` that it loads has."""
    for key, value in (wanted or {}).items():
        actual = getattr(found, key, value)
        if key != "vocab_size" and as_json(actual) != as_json(value):
            raise ValueError(
                f"model_config.{part}_config.{key}={value}, but {source} has {actual}. Correct the one or the other."
            )


def prepare_tokenizer(source: str):
    """Load a tokenizer, add the tokens of our chat template, and end an answer where the template ends a turn."""
    # An answer continues from the last token of its row, so prompts are padded in front; training pads by itself. An
    # attribute that is set after loading would not be saved.
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    known = tokenizer.get_vocab()
    if missing := [token for token in (TURN_START, TURN_END, IMAGE) if token not in known]:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or TURN_END
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def generation_defaults(config: MiniVLMConfig, tokenizer) -> GenerationConfig:
    """Return what `generate` does unless its caller says otherwise, for generation_config.json."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        # An image token in an answer asks for a picture that is absent. Prompt lookup would copy one from the prompt.
        suppress_tokens=[config.image_token_id],
    )


@torch.no_grad()
def resize_vocabulary(decoder: nn.Module, size: int) -> None:
    """Give a decoder `size` token embeddings; each new one is the mean of the old ones, so that none stands out."""
    old = decoder.get_input_embeddings().weight.shape[0]
    if size > old:
        decoder.resize_token_embeddings(size, mean_resizing=False)
        for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
            module.weight[old:] = module.weight[:old].mean(0)


def load_weights(target: nn.Module, source: nn.Module, name: str) -> None:
    """Copy the weights of a trained part; the source may have more blocks and heads than the target.

    Raises:
        ValueError: the source lacks weights that the target needs.
    """
    weights, needed = source.state_dict(), target.state_dict().keys()
    missing = sorted(needed - weights.keys())
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights: {', '.join(missing[:5])}. Is it the same kind of model?"
        )
    target.load_state_dict({key: weights[key] for key in needed})


def build_processor(config: MiniVLMConfig, tokenizer, image_processor=None) -> MiniVLMProcessor:
    """Return a processor with the model's number of image tokens; the default is CLIP's preprocessing at its size."""
    if image_processor is None:
        side, family = config.vision_config.image_size, config.vision_config.model_type
        mean, std = next((v for k, v in NORMALISATION.items() if family.startswith(k)), NORMALISATION["clip"])
        # Squeezed, not cropped: what stands at the border of a picture can be asked about.
        size = {"height": side, "width": side}
        image_processor = CLIPImageProcessorPil(
            do_center_crop=False, size=size, image_mean=list(mean), image_std=list(std)
        )
    return MiniVLMProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        image_seq_length=config.image_seq_length,
    )
