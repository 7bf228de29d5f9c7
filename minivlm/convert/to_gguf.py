"""Write a model as GGUF files for llama.cpp, Ollama and LM Studio: the decoder, and tower with projector beside it."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import ProcessorMixin

from configuration_minivlm import MiniVLMConfig
from minivlm.convert.errors import Inexpressible
from minivlm.convert.files import new_folder
from minivlm.convert.gguf_text import beyond_qwen3, chat_template, read_tokenizer, text_metadata, text_tensors
from minivlm.convert.gguf_vision import (
    CLASS_TOKEN,
    beyond_mtmd,
    beyond_preprocessing,
    has_class_token,
    vision_metadata,
    vision_tensors,
)
from minivlm.model.loading import load_config, load_processor, load_trained

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama_ftype of include/llama.h
BLOCK = 32  # numbers that share a scale in q8_0
LARGEST = 65504  # in f16
MODELFILE = '''# Run: ollama create minivlm -f Modelfile
{files}
TEMPLATE """{{{{- range .Messages }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER temperature 0
'''


def to_gguf(
    source: str | Path, out: str | Path, *, outtype: str = "f16", text_only: bool = False, force: bool = False
) -> list[str]:
    """Write the model of `source` as `model-*.gguf`, `mmproj-*.gguf` and a Modelfile for Ollama.

    Args:
        source: folder or Hub id of a MiniVLM.
        out: new folder.
        outtype: data type of the matrices: "f32", "f16" or "q8_0".
        text_only: write the decoder alone.
        force: also write a tower with a class token, which llama.cpp gets wrong.

    Returns:
        Lines for the user.

    Raises:
        ValueError: the package gguf is not installed.
        Inexpressible: llama.cpp cannot express the model. Nothing is written.
    """
    check_package()
    config, processor = load_config(source), load_processor(source)
    check_text(config, processor)
    if not text_only:
        check_pictures(config, processor, force)
    model, _ = load_trained(source)
    with new_folder(out) as folder:
        paths = [folder / f"model-{outtype.upper()}.gguf"]
        write(paths[0], "qwen3", text_metadata(model, processor), text_tensors(model), outtype)
        if not text_only:
            paths.append(folder / f"mmproj-{outtype.upper()}.gguf")
            write(paths[1], "clip", vision_metadata(config, processor), vision_tensors(model), outtype)
        files = "\n".join(f"FROM ./{path.name}" for path in paths)
        (folder / "Modelfile").write_text(MODELFILE.format(files=files), encoding="utf-8")
        lines = [f"{path.name}: {path.stat().st_size:,} bytes" for path in paths]
    return lines + notes(config, processor, text_only)


def check_package() -> None:
    """Raise ValueError if the package that writes GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("The package gguf is not installed. Install it: pip install gguf")


def check_text(config: MiniVLMConfig, processor: ProcessorMixin) -> None:
    """Raise Inexpressible if the model file cannot express the decoder or its tokenizer."""
    if problems := beyond_qwen3(config.text_config):
        raise Inexpressible(
            f"to_gguf cannot express {'; '.join(problems)}. Export the decoder by to_causal_lm, and convert it by "
            "llama.cpp's own converter."
        )
    read_tokenizer(processor)


def check_pictures(config: MiniVLMConfig, processor: ProcessorMixin, force: bool) -> None:
    """Raise Inexpressible if llama.cpp cannot express tower, projector or image processor, or gets the tower wrong."""
    problems = beyond_mtmd(config)
    problems += [] if problems else beyond_preprocessing(processor, config.vision_config)
    if problems:
        raise Inexpressible(
            f"llama.cpp cannot express {'; '.join(problems)}. Train a SigLIP tower with the default projector, or "
            "write the decoder alone by --text_only."
        )
    if has_class_token(config) and not force:
        raise Inexpressible(
            f"llama.cpp gives wrong answers with {CLASS_TOKEN}. Train a SigLIP tower, write the decoder alone by "
            "--text_only, or write all the same by --force, for a llama.cpp with the repair."
        )


def notes(config: MiniVLMConfig, processor: ProcessorMixin, text_only: bool) -> list[str]:
    """Return lines about what llama.cpp does in another way than this repository."""
    lines = []
    if not chat_template(processor.chat_template)[1]:
        lines.append("The chat template is not ours: check how llama.cpp places pictures in it.")
    if text_only:
        return [*lines, "The decoder alone, without pictures, as --text_only asks."]
    if has_class_token(config):
        lines.append(f"llama.cpp gives wrong answers with {CLASS_TOKEN}. Written by --force.")
    return [*lines, "Give llama.cpp square pictures: it pads others to a square, and this repository squeezes them."]


def write(path: Path, architecture: str, metadata: dict, tensors: dict[str, torch.Tensor], outtype: str) -> None:
    """Write a GGUF file.

    Args:
        metadata: name -> a value of Python's own types; whole numbers become 32 bits wide, without a sign.
        tensors: name -> weights, in the order of the file.
        outtype: data type of the matrices; vectors and position embeddings keep 32 bits.
    """
    import gguf  # of the extra `gguf`

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("mmproj" if architecture == "clip" else "model")
    writer.add_file_type(FILE_TYPES[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in metadata.items():
        add[type(value)](name, value)
    for name, tensor in tensors.items():
        data = tensor.detach().float().numpy()
        kind = gguf.GGMLQuantizationType[data_type(name, data, outtype).upper()]
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def data_type(name: str, data: np.ndarray, outtype: str) -> str:
    """Return the data type of a tensor in a file of `outtype`, by the rules of llama.cpp's converter.

    Raises:
        ValueError: a number is too large for 16 bits.
    """
    if outtype == "f32" or data.ndim == 1 or name == "v.position_embd.weight":
        return "f32"
    # The convolution over patches has no q8_0. A row of q8_0 holds whole blocks.
    if outtype == "q8_0" and data.ndim == 2 and data.shape[-1] % BLOCK == 0:
        return "q8_0"
    if not np.abs(data).max() <= LARGEST:  # also true if a number is NaN
        raise ValueError(f"{name} has numbers beyond {LARGEST}, the limit of f16. Use --outtype f32.")
    return "f16"
