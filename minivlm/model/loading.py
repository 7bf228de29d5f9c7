"""Load and save models; check the names of models before anything is loaded."""

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from configuration_minivlm import MiniVLMConfig
from minivlm.model.options import ModelArgs
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor

PARTS_OF_NEW = ("vision_model", "text_model", "tokenizer")  # options of a new model; one that exists has its own


def check_device(device: str | None) -> str:
    """Return the device, for None cuda if there is one, else cpu.

    Raises:
        ValueError: torch does not know it or does not see it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: not known. Use cpu, cuda or cuda:N.") from None
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ValueError(
            f"--device {device}: PyTorch sees {count or 'no'} GPU. Is CUDA_VISIBLE_DEVICES empty, the driver off, "
            f"or this a CPU build of PyTorch ({torch.__version__})? Use cpu, or auto where a command has it."
        )
    return device


def register_config() -> None:
    """Let transformers' auto classes in this process read our configuration by this checkout's code.

    The model's own files never call it: transformers would then stop asking for `trust_remote_code`.
    """
    AutoConfig.register("minivlm", MiniVLMConfig, exist_ok=True)


def check_type(path: str | Path, option: str = "") -> None:
    """Check that a folder or Hub id holds a MiniVLM, before its weights are read.

    Args:
        option: the option that names it, as for `check_name`.

    Raises:
        ValueError: no model is there, or one of another type.
    """
    check_name(option, str(path))
    model_type = MiniVLMConfig.get_config_dict(path)[0].get("model_type")
    if model_type != "minivlm":
        raise ValueError(
            f"{path} is of type {model_type!r}, not a MiniVLM. Join it with what it lacks by minivlm convert build."
        )


def load_config(path: str | Path) -> MiniVLMConfig:
    """Load the configuration of a folder or Hub id with this checkout's code, without the weights.

    Errors are those of `check_type`.
    """
    check_type(path)
    return MiniVLMConfig.from_pretrained(path)


def load_trained(path: str | Path, option: str = "") -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Load model and processor of a folder or Hub id with this checkout's code, not with the code saved beside them.

    Arguments and errors are those of `check_type`.
    """
    check_type(path, option)
    register_config()
    return MiniVLMForConditionalGeneration.from_pretrained(path), MiniVLMProcessor.from_pretrained(path)


def place(model: MiniVLMForConditionalGeneration, device: str) -> MiniVLMForConditionalGeneration:
    """Move a model to a device; on a CPU it computes in fp32, or its answers would depend on the processor's bf16."""
    return model.float() if device == "cpu" else model.to(device)


def load_processor(path: str | Path) -> MiniVLMProcessor:
    """Load the processor of a folder or Hub id with this checkout's code."""
    check_name("", str(path), "processor_config.json")
    register_config()
    return MiniVLMProcessor.from_pretrained(path)


def save_model(model, processor, folder: Path, state_dict: dict | None = None) -> None:
    """Write model, processor and their code; the old folder is replaced once the new one is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state_dict)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def check_names(args: ModelArgs) -> None:
    """Raise ValueError before anything is loaded if a folder or Hub id to start from does not exist."""
    if args.model:  # it has its own parts; those that a recipe names are not used
        check_name("--model", args.model)
        return
    for name in PARTS_OF_NEW:
        if value := getattr(args, name):
            check_name(f"--{name}", value, "tokenizer_config.json" if name == "tokenizer" else "config.json")


def check_name(option: str, name: str, file: str = "config.json") -> None:
    """Raise ValueError if `name` is neither a folder nor a Hub id that holds `file`.

    Args:
        option: the option that names it, for the message; empty for an argument without a name.
    """
    try:
        cached_file(name, file)
    except OSError as error:
        reason = str(error).split("\n")[0]
        named = f"{option} {name}".strip()
        raise ValueError(
            f"{named}: no folder with a model, and no such model on the Hub. {reason} Check the spelling; without "
            "access to huggingface.co set HF_ENDPOINT to a mirror, or give a folder."
        ) from None
