"""Load and save models; check the names of models before anything is loaded."""

import os
import shutil
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import cached_file

from configuration_minivlm import MiniVLMConfig
from minivlm.model.options import ModelArgs
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor

PARTS_OF_NEW = ("vision_model", "text_model", "tokenizer")  # options of a new model; one that exists has its own


def register_config() -> None:
    """Let transformers' auto classes in this process read our configuration by this checkout's code.

    Never called by the model's own files, or loading them once would trust every later model in silence.
    """
    AutoConfig.register("minivlm", MiniVLMConfig, exist_ok=True)


def load_trained(path: str | Path) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Load model and processor of a folder or Hub id with this checkout's code, not with the code saved beside them.

    Raises:
        ValueError: no model is there, or one of another type.
    """
    check_source("model", str(path))
    model_type = MiniVLMConfig.get_config_dict(path)[0].get("model_type")
    if model_type != "minivlm":
        raise ValueError(
            f"{path} is of type {model_type!r}, not a MiniVLM. Join it with what it lacks by minivlm convert build."
        )
    register_config()
    return MiniVLMForConditionalGeneration.from_pretrained(path), MiniVLMProcessor.from_pretrained(path)


def load_processor(path: str | Path) -> MiniVLMProcessor:
    """Load the processor of a folder or Hub id with this checkout's code."""
    check_source("model", str(path), "processor_config.json")
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


def check_sources(args: ModelArgs) -> None:
    """Raise ValueError before anything is loaded if a folder or Hub id to start from does not exist."""
    if args.model:  # it has its own parts; those that a recipe names are not used
        check_source("model", args.model)
        return
    for name in PARTS_OF_NEW:
        if source := getattr(args, name):
            check_source(name, source, "tokenizer_config.json" if name == "tokenizer" else "config.json")


def check_source(option: str, source: str, file: str = "config.json") -> None:
    """Raise ValueError if `source` is neither a folder nor a Hub id that holds `file`."""
    try:
        cached_file(source, file)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--{option} {source}: neither a folder with a model nor to be had from the Hub. {reason} Check the "
            "spelling; without access to huggingface.co set HF_ENDPOINT to a mirror, or give a folder."
        ) from None
