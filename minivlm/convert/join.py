"""Join a trained vision tower and a trained decoder into a new model on disk."""

from pathlib import Path

from transformers import set_seed

from minivlm.convert.files import new_folder
from minivlm.model.backbones import build
from minivlm.model.loading import check_names
from minivlm.model.options import ModelArgs


def join(options: ModelArgs, out: str | Path, seed: int = 0) -> list[str]:
    """Write the model that a training run would build from the same options.

    Args:
        options: `vision_model`, `text_model`, `tokenizer` and `model_config`, a dictionary, of the new model.
        out: new folder for model and processor.
        seed: of the projector's random weights.

    Returns:
        Lines for the user about the sizes of the parts.

    Raises:
        ValueError: a part does not exist, or cannot be joined to the other.
    """
    check_names(options)
    set_seed(seed)
    model, processor = build(options)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    inner = model.model
    parts = {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, "decoder": inner.language_model}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items()]
    return [f"parameters: {', '.join(sizes)}", f"{model.config.image_seq_length} image tokens per picture"]
