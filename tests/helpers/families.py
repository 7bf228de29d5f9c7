"""Make tiny towers, decoders and tokenizers of other projects, in folders as the Hub has them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from helpers.models import ROOT

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = {  # SigLIP 2 at a fixed resolution is published as SigLIP
    "clip_vision_model": {"image_size": 32, "patch_size": 16},
    "siglip_vision_model": {"image_size": 32, "patch_size": 16},
    "dinov2": {"image_size": 28, "patch_size": 14},
    "dinov2_with_registers": {"image_size": 28, "patch_size": 14, "num_register_tokens": 4},
    "dinov3_vit": {"image_size": 32, "patch_size": 16, "num_register_tokens": 4},
    "vit": {"image_size": 32, "patch_size": 16},
}
DECODERS = {  # SmolLM2 is published as Llama
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "llama": {},
    "gemma2": {},
    "gemma3_text": {},
    "qwen2": {},
}


def byte_tokenizer(*specials, **names):
    """Make a tokenizer of `specials` and one token per byte; `names` say which is `eos_token` and so on."""
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def plain_tokenizer():
    """Make a tokenizer that has none of our special tokens."""
    return byte_tokenizer("<end>", eos_token="<end>")


def publish(path, family):
    """Save a tiny model of `family` in the folder `path`; a decoder with a tokenizer that has none of our tokens."""
    torch.manual_seed(4)
    if family in TOWERS:
        AutoModel.from_config(AutoConfig.for_model(family, **SIZES, **TOWERS[family])).save_pretrained(path)
        return path
    tokenizer = plain_tokenizer()
    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, **DECODERS[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_parts(folder):
    """Save towers with the numbers of image tokens of MiniMind-V, and the tokenizers of its second and third version.

    Returns:
        `folder`, and the tower of each projector: "mlp" SigLIP, "linear" CLIP.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=4, **sizes)).eval()
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=2, **sizes)).eval()
    for tower, processor in ((siglip, SiglipImageProcessorPil(size={"height": 32, "width": 32})),
                             (clip, CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28))):  # fmt: skip
        for parameter in tower.parameters():  # norms at their initial 1 and 0 would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
        tower.save_pretrained(folder / tower.config.model_type)
        processor.save_pretrained(folder / tower.config.model_type)
    pad, start, end = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    second = byte_tokenizer(pad, start, end, pad_token=pad, bos_token=start, eos_token=end)
    second.save_pretrained(folder / "second")
    PreTrainedTokenizerFast.from_pretrained(ROOT, padding_side="right").save_pretrained(folder / "third")
    return {"folder": folder, "mlp": siglip, "linear": clip}
