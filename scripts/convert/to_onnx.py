"""ONNX graphs of a model, by torch's exporter, and the loop that runs them without torch.

Three graphs, named as Optimum and transformers.js name them: a picture is encoded once, token ids are embedded, and
the decoder takes embeddings and its cache, which is empty at the first step. All axes but widths are free.
transformers.js makes the empty cache from the names of the axes: it knows `batch_size` and takes any other for 0.
"""

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_minivlm import MiniVLMForConditionalGeneration
from scripts.convert.files import new_folder
from scripts.convert.transformers_js import save_settings
from scripts.convert.verify import example, largest_difference
from scripts.evaluate import load_trained

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
LARGEST_FILE = 1.5e9  # bytes; protobuf ends at 2 GiB, so the weights of larger graphs lie beside them


class VisionEncoder(nn.Module):
    """pixel_values (N, 3, H, W) -> image_features (N, I, D)."""

    def __init__(self, model: MiniVLMForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


class Embeddings(nn.Module):
    """input_ids (B, T) -> inputs_embeds (B, T, D); one class for what decoders call differently."""

    def __init__(self, model: MiniVLMForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


class Decoder(nn.Module):
    """Embeddings (B, T, D), keys and values (B, Hkv, P, h) of each block -> logits, longer keys and values."""

    def __init__(self, model: MiniVLMForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, past):
        cache = DynamicCache(zip(past[::2], past[1::2]))
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.lm_head(outputs.last_hidden_state), *present


def every_expert(self, hidden_states, top_k_index, top_k_weights):
    """All experts of a mixture on all tokens (S, D), most with a share of 0: no shape depends on the routing."""
    if getattr(self, "has_bias", False) or getattr(self, "is_transposed", False):
        raise RuntimeError("its experts have biases or transposed matrices")
    shares = hidden_states.new_zeros(hidden_states.shape[0], self.num_experts).scatter(1, top_k_index, top_k_weights)
    inner = self._apply_gate(hidden_states @ self.gate_up_proj.transpose(1, 2))  # (experts, S, I)
    return (inner @ self.down_proj.transpose(1, 2) * shares.T.unsqueeze(-1)).sum(0)


def to_onnx(source: str | Path, out: str | Path, verify: bool = False) -> list[str]:
    """Write `source` as ONNX graphs in fp32 with its processor; returns lines for a person."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"The package {package} is not installed: pip install -e '.[onnx]'.")
    model, processor = load_trained(source)
    model.float().eval()
    with new_folder(out) as folder:
        export(model, folder)
        settings = save_settings(model, processor, folder)
        lines = [f"{path.name}: {path.stat().st_size:,} bytes" for path in sorted((folder / "onnx").iterdir())]
        if verify:
            lines += compare(model, folder)
    return lines + settings


@torch.no_grad()
def export(model: MiniVLMForConditionalGeneration, folder: Path) -> None:
    """Write the graphs into `folder`/onnx.

    Raises:
        ValueError: torch's exporter cannot trace this tower or decoder.
    """
    (folder / "onnx").mkdir()
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is absent
    model.set_attn_implementation("eager")  # an explicit mask in the graph, at any length of the cache
    config, size = model.config.text_config, model.config.vision_config.image_size
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)
    own_experts, config._experts_implementation = config._experts_implementation, "every_expert"
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = range(config.num_hidden_layers)
    B, T, P = 2, 3, 5  # of the traced call; 0 and 1 would be taken for constants
    past = [torch.zeros(B, heads, P, head_dim) for _ in range(2 * len(blocks))]
    names = [f"{i}.{kind}" for i in blocks for kind in ("key", "value")]
    graphs = {
        VISION: (
            VisionEncoder(model),
            {"pixel_values": torch.zeros(2, 3, size, size)},
            {"pixel_values": {0: "pictures"}},
            ["pixel_values"],
            ["image_features"],
        ),
        EMBED: (
            Embeddings(model),
            {"input_ids": torch.zeros(B, T, dtype=torch.long)},
            {"input_ids": {0: "batch_size", 1: "tokens"}},
            ["input_ids"],
            ["inputs_embeds"],
        ),
        DECODER: (
            Decoder(model),
            {
                "inputs_embeds": torch.zeros(B, T, config.hidden_size),
                "attention_mask": torch.ones(B, P + T, dtype=torch.long),
                "position_ids": torch.arange(P, P + T).expand(B, T),
                "past": past,
            },
            {
                "inputs_embeds": {0: "batch_size", 1: "tokens"},
                "attention_mask": {0: "batch_size", 1: "past_and_tokens"},
                "position_ids": {0: "batch_size", 1: "tokens"},
                "past": [{0: "batch_size", 2: "past"}] * len(past),
            },
            ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            ["logits", *(f"present.{name}" for name in names)],
        ),
    }
    for name, (module, inputs, dynamic, input_names, output_names) in graphs.items():
        path = folder / "onnx" / f"{name}.onnx"
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        try:
            with warnings.catch_warnings():  # of torch about itself, and of axes that are the same one
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    module.eval(),
                    kwargs=inputs,
                    f=path,
                    input_names=input_names,
                    output_names=output_names,
                    dynamic_shapes=dynamic,
                    dynamo=True,
                    external_data=weights > LARGEST_FILE,
                    verbose=False,
                )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            family = model.config.vision_config.model_type if name == VISION else config.model_type
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise ValueError(f"torch's exporter cannot trace the {name} of type {family!r}: {reason}") from None
    config._experts_implementation = own_experts  # what the graphs are compared with


def generate(folder: str | Path, inputs: dict[str, np.ndarray], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy answers by onnxruntime alone.

    Args:
        inputs: `input_ids` and `attention_mask` (B, T), int64, left-padded, and `pixel_values` (N, 3, H, W) if any, as
            the processor returns them with `return_tensors="np"`.

    Returns:
        Tokens (B, new tokens), padding behind an end of sequence, and the prompt's logits (B, T, vocabulary).
    """
    import onnxruntime

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    image_token_id = config.get("image_token_index", config.get("image_token_id"))  # LLaVA's name, and ours
    options = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    ends, pad = np.atleast_1d(options.get("eos_token_id") or []), options.get("pad_token_id") or 0
    vision, embed, decoder = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx") for name in (VISION, EMBED, DECODER)
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = embed.run(None, {"input_ids": ids})[0]
    if "pixel_values" in inputs:
        features = vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]
        embeds[ids == image_token_id] = features.reshape(-1, features.shape[-1])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    slots = [i for i in decoder.get_inputs() if i.name.startswith("past_key_values.")]
    cache = {slot.name: np.zeros((len(ids), slot.shape[1], 0, slot.shape[3]), np.float32) for slot in slots}
    answer, first, finished = [], None, np.zeros(len(ids), bool)
    while len(answer) < max_new_tokens and not finished.all():
        step = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
        logits, *present = decoder.run(None, step)
        first = logits if first is None else first
        scores = logits[:, -1].copy()
        scores[:, options.get("suppress_tokens") or []] = -np.inf
        token = np.where(finished, pad, scores.argmax(-1))
        answer.append(token)
        finished |= np.isin(token, ends)
        cache = dict(zip(cache, present))
        embeds = embed.run(None, {"input_ids": token[:, None]})[0]
        mask = np.concatenate((mask, np.ones_like(mask[:, :1])), axis=1)
        positions = positions[:, -1:] + 1
    return np.stack(answer, axis=1), first


@torch.no_grad()
def compare(model: MiniVLMForConditionalGeneration, folder: Path) -> list[str]:
    """Hold the graphs' logits and greedy answer to a picture and text against ours.

    Raises:
        ValueError: they differ.
    """
    inputs = example(model.config, model.config.text_config.vocab_size, pictured=True)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tokens, logits = generate(folder, {name: tensor.numpy() for name, tensor in inputs.items()}, 16)
    logits = torch.from_numpy(logits)
    difference = largest_difference(logits, model(**inputs).logits, "Our logits and the graphs'")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    if tokens.tolist() != expected.tolist():
        raise ValueError("The graphs give another greedy answer, though their logits are the same.")
    return [f"largest logit difference {difference:.2e}; the same greedy answer of {expected.shape[1]} tokens"]
