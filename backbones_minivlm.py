"""Models to start from: a checkpoint of ours, random weights, or a trained tower and a trained decoder joined."""

from pathlib import Path

import torch
import yaml
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
from transformers.utils import cached_file

from configuration_minivlm import MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration
from options_minivlm import TrainArgs
from processing_minivlm import MiniVLMProcessor
from scripts.evaluate import load_trained, register_config

ROOT = Path(__file__).parent
PARTS_OF_NEW = ("vision_model", "text_model", "tokenizer")  # options of a new model; one that exists has its own
TURN_START, TURN_END, IMAGE = "<|im_start|>", "<|im_end|>", "<|image_pad|>"  # what our chat template writes
# Of an answer. `generate` alone stops at 20, but the embedded data's longest caption has 75. The same as the limit of
# transformers' image-text-to-text pipeline.
MAX_NEW_TOKENS = 256
NORMALISATION = {  # by family of the tower; what it was trained with
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),  # one half each
    "dino": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


def check_sources(args: TrainArgs) -> None:
    """Stop before anything is loaded if a folder or Hub id to start from does not exist."""
    if args.model:  # complete in itself
        check_source("model", args.model, "config.json")
        if given := [f"--{name} {getattr(args, name)}" for name in PARTS_OF_NEW if not from_recipe(args, name)]:
            print(f"warning: {', '.join(given)} not used: --model {args.model} has its own. Leave one of the two out.")
        return
    for name in PARTS_OF_NEW:
        if source := getattr(args, name):
            check_source(name, source, "tokenizer_config.json" if name == "tokenizer" else "config.json")


def from_recipe(args: TrainArgs, name: str) -> bool:
    """Whether an option is left out or as the recipe has it, and so was not given on the command line."""
    value = getattr(args, name)
    written = yaml.safe_load(Path(args.recipe).read_text(encoding="utf-8")) if value and args.recipe else None
    return value is None or value == (written or {}).get(name)


def check_source(option: str, source: str, file: str) -> None:
    """Stop if `source` is neither a folder nor a Hub id that holds `file`."""
    try:
        cached_file(source, file)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--{option} {source}: neither a folder with a model nor to be had from the Hub. {reason} Check the "
            "spelling; without access to huggingface.co set HF_ENDPOINT to a mirror, or give a folder."
        ) from None


def build(args: TrainArgs) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Model and processor by the options: `model`, or a new one from `model_config` and trained parts."""
    if args.model:
        model, processor = load_trained(args.model)
        if args.attn_implementation:
            model.set_attn_implementation(args.attn_implementation)
        return model.float(), processor
    config, tokenizer = model_from_scratch(args)
    tower = decoder = None
    if args.vision_model:
        tower = AutoModel.from_pretrained(args.vision_model, dtype=torch.float32)
        tower = getattr(tower, "vision_model", tower)  # of a model with a text encoder only the eyes
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


def model_from_scratch(args: TrainArgs):
    """Configuration of `model_config`, its parts those that are named, and the tokenizer that it has room for."""
    register_config()  # or AutoTokenizer would ask to run the configuration's code beside a tokenizer of ours
    text = AutoConfig.from_pretrained(args.text_model) if args.text_model else None
    if text and not hasattr(text, "vocab_size"):
        raise ValueError(
            f"--text_model {args.text_model} is of type {text.model_type!r}, which is not a causal decoder. Name a "
            "language model."
        )
    tokenizer = prepare_tokenizer(args.tokenizer or args.text_model or str(ROOT))
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


def check_agrees(part: str, source: str, wanted: dict | None, found) -> None:
    """A recipe states the sizes of what it loads, so that it can be read and tested without it: they must be true."""
    for key, value in (wanted or {}).items():
        if key != "vocab_size" and (actual := getattr(found, key, value)) != value:
            raise ValueError(
                f"model_config.{part}_config.{key}={value}, but {source} has {actual}. Correct the one or the other."
            )


def prepare_tokenizer(source: str):
    """A tokenizer that knows our chat template's tokens, and ends a turn where the template does."""
    # An answer continues from the last token of its row, so prompts are padded in front; training pads by itself. An
    # attribute that is set after loading would not be saved.
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    known = tokenizer.get_vocab()
    if missing := [token for token in (TURN_START, TURN_END, IMAGE) if token not in known]:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or TURN_END
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
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
    """Give a decoder `size` token embeddings; the new ones are the mean of the old, so none stands out."""
    old = decoder.get_input_embeddings().weight.shape[0]
    if size > old:
        decoder.resize_token_embeddings(size, mean_resizing=False)
        for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
            module.weight[old:] = module.weight[:old].mean(0)


def load_weights(target: nn.Module, source: nn.Module, name: str) -> None:
    """Copy a trained part's weights; the source may have more blocks and heads than are used, never fewer."""
    weights, needed = source.state_dict(), target.state_dict().keys()
    missing = sorted(needed - weights.keys())
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights: {', '.join(missing[:5])}. Is it the same kind of model?"
        )
    target.load_state_dict({key: weights[key] for key in needed})


def build_processor(config: MiniVLMConfig, tokenizer, image_processor=None) -> MiniVLMProcessor:
    """As many image tokens as the model makes features; CLIP's preprocessing at the tower's resolution by default."""
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
