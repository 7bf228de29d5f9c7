"""Write a model as a class that other engines know: a LLaVA, or the decoder alone. They need no code of ours."""

from copy import deepcopy
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
from minivlm.convert.files import new_folder
from minivlm.convert.verify import example, largest_difference
from minivlm.model.loading import load_trained
from modeling_minivlm import MiniVLMForConditionalGeneration

SHARED = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_parameters attention_bias
attention_dropout pad_token_id bos_token_id eos_token_id""".split()


def published_decoder(text: PreTrainedConfig) -> PreTrainedConfig:
    """Return a new configuration of transformers' own class for a decoder; our decoder is the same as Qwen3's."""
    if text.model_type == "minivlm_text":
        return Qwen3Config(**{key: getattr(text, key) for key in SHARED})
    # A copy: a configuration around it resets how its attention is computed, which the model in memory would follow.
    return deepcopy(text)


def special_tokens(vision: PreTrainedConfig) -> int:
    """Return how many class and register tokens the tower puts before its patches."""
    return 0 if vision.model_type in TOWERS_WITHOUT_CLASS_TOKEN else 1 + getattr(vision, "num_register_tokens", 0)


def beyond_llava(config: MiniVLMConfig) -> list[str]:
    """Return the settings of projector and tower that LLaVA cannot express, a phrase each."""
    vision, problems = config.vision_config, []
    if config.is_convolutional:
        problems.append(f"a tower of type {vision.model_type!r} (LLaVA reads patches of a transformer)")
    if config.projector_type != "mlp" or config.projector_layer_norm or config.pixel_shuffle_factor > 1:
        problems.append(
            f"projector_type={config.projector_type!r} with projector_layer_norm={config.projector_layer_norm} and "
            f"pixel_shuffle_factor={config.pixel_shuffle_factor} (LLaVA: 'mlp', False, 1)"
        )
    if config.vision_feature_layer is None and vision.model_type != "clip_vision_model":
        problems.append("vision_feature_layer=None, the tower's output after its final norm (LLaVA: before it, as -2)")
    special = special_tokens(vision)
    if config.vision_feature_select_strategy == "default" and special > 1:
        problems.append(f"a tower with {special} class and register tokens to drop (LLaVA drops one)")
    return problems


def llava_config(config: MiniVLMConfig) -> LlavaConfig:
    """Return the configuration of the same model as a LLaVA.

    Raises:
        ValueError: LLaVA cannot express it; the message lists every reason.
    """
    problems = beyond_llava(config)
    if problems:
        raise ValueError(
            f"LlavaForConditionalGeneration cannot express {'; '.join(problems)}. Train such a model with LLaVA's "
            "settings, or serve it by trust_remote_code=True."
        )
    # Our tower ends with the block whose output is used, so LLaVA takes its last hidden state.
    vision = config.vision_config
    full = config.vision_feature_select_strategy == "full" or not special_tokens(vision)
    fields = vision.to_dict() | {"num_hidden_layers": config.num_vision_layers}
    for name in ("stage_names", "out_features", "out_indices"):  # DINO's lists with an entry for each block
        fields.pop(name, None)
    vision = type(vision).from_dict(fields)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # the pooling head, which LLaVA does not use either
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
    """Return the weights under the names of published CLIP and SigLIP models, `vision_tower.vision_model.*`.

    vLLM's LLaVA knows only these names. transformers reads them, too, but saves a new model without `vision_model`.
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
    """Remove the names of our processor class and file from its parts, or they would be saved with the export."""
    for names in (vars(processor.image_processor), processor.tokenizer.init_kwargs, vars(processor.tokenizer)):
        for name in ("auto_map", "processor_class", "_processor_class"):
            names.pop(name, None)


def llava_processor(processor: ProcessorMixin, config: LlavaConfig) -> LlavaProcessor:
    """Return transformers' own processor for `config`, with our picture settings and tokenizer."""
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
    """Write the model of `source` as a `LlavaForConditionalGeneration` with its processor.

    Args:
        source: folder or Hub id of a MiniVLM.
        out: new folder.
        verify: also compare the saved model with ours; a difference is an error.

    Returns:
        Lines for the user.

    Raises:
        ValueError: LLaVA cannot express the model, or the comparison failed.
    """
    model, processor = load_trained(source)
    config = llava_config(model.config)
    llava = LlavaForConditionalGeneration._from_config(config)
    missing, unexpected = llava.load_state_dict(model.state_dict(), strict=False)
    # Parts of a tower that transformers builds and LLaVA does not use: its final norm, its pooling head.
    lacking = [n for n in missing if not n.startswith("model.vision_tower.") or ".layers." in n]
    if lacking or unexpected:
        raise ValueError(
            f"LLaVA has no place for the weights {unexpected}, and the model lacks its weights {lacking}."
        )
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
    """Write the decoder alone as transformers' own class, ours as `Qwen3ForCausalLM`, with its tokenizer.

    Arguments and result are those of `to_llava`.
    """
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
    """Compare logits and greedy answer of the saved model with ours, in fp32; return a line for the user.

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
