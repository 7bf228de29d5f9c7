"""Out to classes that every engine knows, so that no code of ours is needed there: LLaVA, or the decoder alone."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3Config,
)

from configuration_minivlm import TOWERS_WITHOUT_CLASS_TOKEN, MiniVLMConfig
from modeling_minivlm import MiniVLMForConditionalGeneration
from scripts.convert.files import new_folder
from scripts.convert.verify import example, largest_difference
from scripts.evaluate import load_trained

SHARED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_parameters attention_bias
attention_dropout pad_token_id bos_token_id eos_token_id""".split()


def published_decoder(text: PreTrainedConfig) -> PreTrainedConfig:
    """Our own decoder is Qwen3's; any other is transformers' already, and a copy of its configuration is returned.

    A second model must not share it: the attention function of the first is written there, and would be lost.
    """
    if text.model_type != "minivlm_text":
        return copy.deepcopy(text)
    return Qwen3Config(**{key: getattr(text, key) for key in SHARED})


def special_tokens(vision: PreTrainedConfig) -> int:
    """Return how many class and register tokens the tower puts before its patches."""
    return 0 if vision.model_type in TOWERS_WITHOUT_CLASS_TOKEN else 1 + getattr(vision, "num_register_tokens", 0)


def beyond_llava(config: MiniVLMConfig) -> list[str]:
    """Return what LLaVA's projector and its reading of the tower cannot express, one phrase each."""
    vision, problems = config.vision_config, []
    if config.projector_type != "mlp" or config.projector_layer_norm or config.pixel_shuffle_factor > 1:
        problems.append(
            f"projector_type={config.projector_type!r} with projector_layer_norm={config.projector_layer_norm} and "
            f"pixel_shuffle_factor={config.pixel_shuffle_factor} (LLaVA: 'mlp', False, 1)"
        )
    if config.vision_feature_layer is None and vision.model_type != "clip_vision_model":
        problems.append(
            "vision_feature_layer=None, the tower's output behind its final norm (LLaVA: before it, as -2)"
        )
    special = special_tokens(vision)
    if config.vision_feature_select_strategy == "default" and special > 1:
        problems.append(f"a tower with {special} class and register tokens to drop (LLaVA drops one)")
    return problems


def llava_config(config: MiniVLMConfig) -> LlavaConfig:
    """Return the same model as a LLaVA.

    Raises:
        ValueError: LLaVA cannot express it.
    """
    problems = beyond_llava(config)
    if problems:
        raise ValueError(
            f"LlavaForConditionalGeneration cannot express {'; '.join(problems)}. Train such a model with LLaVA's "
            "settings, or serve it by trust_remote_code=True."
        )
    # The blocks behind the one that is read are not built here, so that what is read is the last hidden state.
    vision = config.vision_config
    full = config.vision_feature_select_strategy == "full" or not special_tokens(vision)
    fields = vision.to_dict() | {"num_hidden_layers": config.num_vision_layers}
    for name in ("stage_names", "out_features", "out_indices"):  # DINO's lists of blocks, one entry for each
        fields.pop(name, None)
    vision = type(vision).from_dict(fields)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # its pooling head, which LLaVA does not read either
    return LlavaConfig(
        vision_config=vision,
        text_config=published_decoder(config.text_config),
        image_token_id=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if full else "default",
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def published_weights(llava: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return the weights under the names that CLIP and SigLIP are published with, `vision_tower.vision_model.*`.

    vLLM's LLaVA knows only those. transformers reads both spellings, but a model that was not loaded from a file is
    saved without `vision_model`.
    """
    short, published = "model.vision_tower.", "model.vision_tower.vision_model."
    weights = llava.state_dict()
    if llava.config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return weights
    return {
        name if name.startswith(published) else name.replace(short, published, 1): weight
        for name, weight in weights.items()
    }


def forget_our_code(processor: ProcessorMixin) -> None:
    """Remove the names of our processor and its file from its parts, which would be saved with them."""
    for names in (vars(processor.image_processor), processor.tokenizer.init_kwargs, vars(processor.tokenizer)):
        for name in ("auto_map", "processor_class", "_processor_class"):
            names.pop(name, None)


def llava_processor(processor: ProcessorMixin, config: LlavaConfig) -> LlavaProcessor:
    """Return transformers' own processor for `config`, with the picture settings and tokenizer of ours."""
    forget_our_code(processor)
    return LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=special_tokens(config.vision_config),
    )


def to_llava(source: str | Path, out: str | Path, verify: bool = False) -> list[str]:
    """Write `source` as a `LlavaForConditionalGeneration` with its processor; returns lines for a person."""
    model, processor = load_trained(source)
    config = llava_config(model.config)
    llava = LlavaForConditionalGeneration._from_config(config)
    missing, unexpected = llava.load_state_dict(model.state_dict(), strict=False)
    # What transformers builds of a tower and nothing here reads: its final norm, its pooling head.
    lacking = [n for n in missing if not n.startswith("model.vision_tower.") or ".layers." in n]
    if lacking or unexpected:
        raise ValueError(f"Weights without a place in LLaVA: {unexpected}; without a source: {lacking}.")
    llava.generation_config = model.generation_config
    with new_folder(out) as folder:
        llava.to(model.dtype)
        llava.save_pretrained(folder, state_dict=published_weights(llava))
        llava_processor(processor, config).save_pretrained(folder)
        lines = [f"LlavaForConditionalGeneration, {sum(p.numel() for p in llava.parameters()):,} parameters"]
        if verify:
            lines += compare(model, LlavaForConditionalGeneration.from_pretrained(folder), pictured=True)
    return lines


def to_causal_lm(source: str | Path, out: str | Path, verify: bool = False) -> list[str]:
    """Write the decoder alone as transformers' own class (ours as `Qwen3ForCausalLM`) with its tokenizer."""
    model, processor = load_trained(source)
    decoder = AutoModelForCausalLM.from_config(published_decoder(model.config.text_config), dtype=model.dtype)
    decoder.base_model.load_state_dict(model.model.language_model.state_dict())
    decoder.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    decoder.generation_config = model.generation_config
    forget_our_code(processor)
    processor.tokenizer.chat_template = processor.chat_template
    with new_folder(out) as folder:
        decoder.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        lines = [f"{type(decoder).__name__}, {sum(p.numel() for p in decoder.parameters()):,} parameters"]
        if verify:
            lines += compare(model, AutoModelForCausalLM.from_pretrained(folder), pictured=False)
    return lines


@torch.no_grad()
def compare(model: MiniVLMForConditionalGeneration, exported: PreTrainedModel, pictured: bool) -> list[str]:
    """Hold the saved model's logits and greedy answer against ours, in fp32.

    Raises:
        ValueError: they differ.
    """
    model, exported = model.float().eval(), exported.float().eval()
    inputs = example(model.config, model.config.text_config.vocab_size, pictured)
    difference = largest_difference(
        exported(**inputs).logits, model(**inputs).logits, "Our logits and the exported model's"
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    answers = [m.generate(**inputs, max_new_tokens=16, do_sample=False) for m in (model, exported)]
    if not torch.equal(*answers):
        raise ValueError("The exported model gives another greedy answer, though its logits are the same.")
    return [f"largest logit difference {difference:.2e}; the same greedy answer of 16 tokens"]
