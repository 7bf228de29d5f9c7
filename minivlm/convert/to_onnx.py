"""Write a model as ONNX graphs with the files that onnxruntime and transformers.js need, and check their answers."""

import importlib.util
from pathlib import Path

import torch
from transformers import ProcessorMixin

from minivlm.convert.files import new_folder
from minivlm.convert.onnx_graphs import export
from minivlm.convert.quantize import FOR_BROWSERS, shrink
from minivlm.convert.transformers_js import save_settings
from minivlm.convert.verify import example, largest_difference
from minivlm.model.loading import load_trained
from minivlm.onnx_engine.graphs import Graphs
from modeling_minivlm import MiniVLMForConditionalGeneration

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra `onnx` of setup.cfg


def to_onnx(source: str | Path, out: str | Path, verify: bool = False, dtype: str = "fp32") -> list[str]:
    """Write the model of `source` as ONNX graphs, with its processor.

    Args:
        source: folder or Hub id of a MiniVLM.
        out: new folder.
        verify: also compare the graphs with our model before their weights are rounded; a difference is an error.
        dtype: how to store the weights, a key of `DTYPES`.

    Returns:
        Lines for the user.

    Raises:
        ValueError: a package is not installed, torch's exporter cannot trace the model, or the comparison failed.
    """
    check_packages()
    model, processor = load_trained(source)
    with new_folder(out) as folder:
        settings, compared = write_graphs(model, processor, folder, verify)
        if dtype != "fp32":
            shrink(folder, dtype)
        lines = [f"{path.name}: {path.stat().st_size:,} bytes" for path in sorted((folder / "onnx").iterdir())]
    told = settings if dtype in FOR_BROWSERS else ["onnxruntime alone runs it: minivlm ask --engine onnx"]
    return lines + compared + told


def check_packages() -> None:
    """Raise ValueError if one of `PACKAGES` is not installed."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"The package {package} is not installed. Install all: pip install {' '.join(PACKAGES)}")


def write_graphs(
    model: MiniVLMForConditionalGeneration, processor: ProcessorMixin, folder: Path, verify: bool
) -> tuple[list[str], list[str]]:
    """Write the graphs of a model in fp32 and the settings beside them; return what was set, and what was compared.

    Raises:
        ValueError: torch's exporter cannot trace the model, or with `verify` the graphs differ from it.
    """
    model.float().eval()
    export(model, folder)
    settings = save_settings(model, processor, folder)
    return settings, compare(model, folder) if verify else []


@torch.no_grad()
def compare(model: MiniVLMForConditionalGeneration, folder: Path) -> list[str]:
    """Compare the graphs' logits and greedy answer for a picture and text with ours; return a line for the user.

    Raises:
        ValueError: they differ.
    """
    inputs = example(model.config, model.config.text_config.vocab_size, pictured=True)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tokens, logits = Graphs(folder).generate({name: tensor.numpy() for name, tensor in inputs.items()}, 16)
    logits = torch.from_numpy(logits)
    difference = largest_difference(logits, model(**inputs).logits, "Our logits and the graphs'")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    if tokens.tolist() != expected.tolist():
        raise ValueError("The graphs give another greedy answer, though their logits are the same.")
    return [f"largest logit difference {difference:.2e}; the same greedy answer of {expected.shape[1]} tokens"]
