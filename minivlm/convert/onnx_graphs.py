"""Trace a model into three ONNX graphs by torch's exporter.

The names are those of Optimum and transformers.js. A picture is encoded once, token ids are embedded, and the decoder
takes embeddings and its cache, which is empty at the first step. All axes but widths are free. transformers.js makes
the empty cache from the names of the axes: it knows `batch_size`, and takes any other for 0.

Letters: B batch, T tokens, P cached positions, N pictures, I image tokens of a picture, D width, Hkv key-value heads,
h width of a head.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from minivlm.onnx_engine.graphs import DECODER, EMBED, VISION
from modeling_minivlm import MiniVLMForConditionalGeneration

LARGEST_FILE = 1.5e9  # bytes; protobuf ends at 2 GiB, so larger weights are written to a file beside the graph
B, T, P, N = 2, 3, 5, 2  # sizes of the traced call; the exporter would take 0 and 1 for constants


class VisionEncoder(nn.Module):
    """Turn pixel_values (N, 3, H, W) into image_features (N, I, D)."""

    def __init__(self, model: MiniVLMForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


class Embeddings(nn.Module):
    """Turn input_ids (B, T) into inputs_embeds (B, T, D); the input has this name for every decoder."""

    def __init__(self, model: MiniVLMForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


class Decoder(nn.Module):
    """Turn embeddings (B, T, D) and a cache (B, Hkv, P, h) of each block into logits and a longer cache."""

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


@dataclass
class Graph:
    """Describe a graph: the module to trace, its inputs in a traced call, and the names in the file."""

    module: nn.Module
    inputs: dict  # name -> tensor or list of tensors
    axes: dict  # the same names -> index -> name of each free axis
    input_names: list[str]
    output_names: list[str]


def vision_graph(model: MiniVLMForConditionalGeneration) -> Graph:
    """Describe the graph of tower and projector."""
    size = model.config.vision_config.image_size
    inputs, axes = {"pixel_values": torch.zeros(N, 3, size, size)}, {"pixel_values": {0: "pictures"}}
    return Graph(VisionEncoder(model), inputs, axes, [*inputs], ["image_features"])


def embeddings_graph(model: MiniVLMForConditionalGeneration) -> Graph:
    """Describe the graph of the token embeddings."""
    inputs = {"input_ids": torch.zeros(B, T, dtype=torch.long)}
    return Graph(
        Embeddings(model), inputs, {"input_ids": {0: "batch_size", 1: "tokens"}}, [*inputs], ["inputs_embeds"]
    )


def decoder_graph(model: MiniVLMForConditionalGeneration) -> Graph:
    """Describe the graph of decoder and LM head, with a cache of keys and values for each block."""
    config = model.config.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    inputs = {
        "inputs_embeds": torch.zeros(B, T, config.hidden_size),
        "attention_mask": torch.ones(B, P + T, dtype=torch.long),
        "position_ids": torch.arange(P, P + T).expand(B, T),
    }
    axes = {
        "inputs_embeds": {0: "batch_size", 1: "tokens"},
        "attention_mask": {0: "batch_size", 1: "past_and_tokens"},
        "position_ids": {0: "batch_size", 1: "tokens"},
        "past": [{0: "batch_size", 2: "past"}] * len(names),
    }
    past = [torch.zeros(B, config.num_key_value_heads, P, head_dim) for _ in names]
    return Graph(
        Decoder(model),
        inputs | {"past": past},
        axes,
        [*inputs, *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
    )


def every_expert(self, hidden_states, top_k_index, top_k_weights):
    """Apply all experts to all tokens (S, D), most with a share of 0, so that no shape depends on the routing.

    A method of a mixture's experts, for transformers to call.
    """
    if getattr(self, "has_bias", False) or getattr(self, "is_transposed", False):
        raise RuntimeError("its experts have biases or transposed matrices")
    shares = hidden_states.new_zeros(hidden_states.shape[0], self.num_experts).scatter(1, top_k_index, top_k_weights)
    inner = self._apply_gate(hidden_states @ self.gate_up_proj.transpose(1, 2))  # (experts, S, I)
    return (inner @ self.down_proj.transpose(1, 2) * shares.T.unsqueeze(-1)).sum(0)


@contextmanager
def all_experts(config: PreTrainedConfig) -> Iterator[None]:
    """Let a mixture compute all its experts while it is traced."""
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)
    own, config._experts_implementation = config._experts_implementation, "every_expert"
    try:
        yield
    finally:
        config._experts_implementation = own


@torch.no_grad()
def export(model: MiniVLMForConditionalGeneration, folder: Path) -> None:
    """Write the graphs of `model` into `folder`/onnx.

    Raises:
        ValueError: torch's exporter cannot trace this tower or decoder.
    """
    (folder / "onnx").mkdir()
    # The exporter warns that torchvision is absent, which nothing here needs.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    model.set_attn_implementation("eager")  # it takes an explicit mask, of any length of the cache
    with all_experts(model.config.text_config):
        graphs = {VISION: vision_graph(model), EMBED: embeddings_graph(model), DECODER: decoder_graph(model)}
        for name, graph in graphs.items():
            try:
                trace(graph, folder / "onnx" / f"{name}.onnx")
            except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
                part = model.config.vision_config if name == VISION else model.config.text_config
                reason = str(error.__cause__ or error).strip().split("\n")[0]
                raise ValueError(
                    f"torch's exporter cannot trace the {name} of type {part.model_type!r}: {reason} Nothing was "
                    "written. Another version of torch may trace it, or use to_llava."
                ) from None


def trace(graph: Graph, path: Path) -> None:
    """Write one graph; weights beyond `LARGEST_FILE` go to a file beside it."""
    weights = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    with warnings.catch_warnings():  # torch warns about its own code, and about axes that have one size
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=graph.inputs,
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_shapes=graph.axes,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.save(path, external_data=weights > LARGEST_FILE)
