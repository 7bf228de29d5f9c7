"""Options of the model: where it starts, which parts of it train, how it computes."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from minivlm.cli import option
from minivlm.model.parts import check_selector
from minivlm.resources import ASSETS

# Keys of a config.json that say how a model was saved, not how it is built.
BOOKKEEPING = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path", "id2label", "label2id")


@dataclass
class ModelArgs:
    """Choose the model to train."""

    _argument_group_name = "model"

    model: str | None = option(None, "Folder or Hub id to start from. Left out: a new model around model_config.")
    model_config: str | None = option(
        None, "MiniVLMConfig of a new model: JSON, a mapping in a recipe, or the path of a config.json."
    )
    vision_model: str | None = option(None, "Folder or Hub id of a trained vision tower for a new model.")
    text_model: str | None = option(None, "Folder or Hub id of a trained causal language model for a new model.")
    tokenizer: str | None = option(
        None, "Folder or Hub id of a new model's tokenizer. Left out: text_model's, or MiniVLM's own."
    )
    train: list[str] = option(
        ["vision", "projector", "text"],
        "Parts that train: vision, projector, text, lm_head, or some blocks of one: text:first_last (MiniMind-V's "
        "freeze_llm=1), text:last_2, vision:last_2.",
    )
    lora: str | None = option(
        None, "Train a LoRA adapter instead of whole matrices, as r=16,alpha=32,targets=decoder (or vision, all)."
    )
    attn_implementation: str | None = option(
        None,
        "eager, sdpa, sdpa_packed, sdpa_branches (CPU, with share_pictures), flex_attention or flash_attention_2. "
        "Left out: sdpa where the decoder can, with packing on a CPU sdpa_packed.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")


def check_model(args: ModelArgs) -> None:
    """Raise ValueError for a part that does not exist."""
    for selector in args.train:
        if problem := check_selector(selector):
            raise ValueError(problem)


def read_model_config(path: str) -> dict:
    """Return the architecture that a config.json describes; a bare name may also be that of a file of ours.

    Raises:
        ValueError: no such file, or no JSON object in it.
    """
    file = Path(path)
    if not file.is_file() and path == file.name and (ASSETS / path).is_file():
        file = ASSETS / path
    if not file.is_file():
        raise ValueError(f"--model_config {path}: no such file. Name a config.json, or write the mapping itself.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--model_config {path}: not JSON ({error}). Name a model's config.json.") from None
    if not isinstance(values, dict):
        raise ValueError(f"--model_config {path}: not a JSON object. Name a model's config.json.")
    values = {key: value for key, value in values.items() if key not in (*BOOKKEEPING, "model_type")}
    for name in ("vision_config", "text_config"):
        values[name] = {key: value for key, value in (values.get(name) or {}).items() if key not in BOOKKEEPING}
    return values


def read_lora(text: str) -> dict[str, str]:
    """Return `r=16,alpha=32,targets=decoder` as a mapping; a key that is left out gets these values.

    Raises:
        ValueError: an unknown key or value, or the package peft is not installed.
    """
    values = {"r": "16", "alpha": "32", "targets": "decoder"}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        if key not in values or not value:
            raise ValueError(f"--lora {text}: {pair!r} is not understood. Write r=16,alpha=32,targets=decoder.")
        values[key] = value
    if values["targets"] not in ("decoder", "vision", "all"):
        raise ValueError(f"--lora targets={values['targets']}: use decoder, vision or all.")
    if not (values["r"].isdigit() and int(values["r"]) and values["alpha"].isdigit()):
        raise ValueError(f"--lora {text}: r and alpha are whole numbers from 1 up.")
    if importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs the package peft. Install it: pip install peft")
    return values
