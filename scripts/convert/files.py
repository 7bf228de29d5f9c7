"""What every conversion needs: tensors from any file of weights, and a folder that is whole or not there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def check_free(path: Path) -> None:
    """Raises ValueError if `path` exists and is not empty: nothing of a user is written over."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists. Choose another --out, or move it away.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` once all is written, and nothing if that fails."""
    path = Path(path)
    check_free(path)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_tensors(source: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors, .pth or .bin file, or of the folder that holds one (or several, by their index).

    Raises:
        ValueError: no such file, not whole, or a pickle that holds anything else than tensors; none of it is executed.
    """
    source = Path(source)
    if source.is_dir():
        name = next((name for name in WEIGHTS if (source / name).is_file()), None)
        if name is None:
            raise ValueError(f"{source}: no weights. Expected one of {', '.join(WEIGHTS)}, or name the file itself.")
        source = source / name
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder.")
    if source.name.endswith(".index.json"):
        names = sorted(set(json.loads(source.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: tensor for name in names for key, tensor in read_tensors(source.parent / name).items()}
    with source.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{source} is git-lfs's pointer to the weights, not the weights. Run `git lfs pull`.")
    return read_safetensors(source) if source.suffix == ".safetensors" else read_pickle(source)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Copy or download it again.") from None


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # its text goes on for a page, and ends with how to run the code after all
        raise ValueError(
            f"{path} is a pickle of more than plain tensors, which could run code: it is not loaded. Save its state "
            "dict alone, by torch.save(model.state_dict(), file) where it was made."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is no whole PyTorch file ({reason}). Copy or download it again.") from None
    others = [] if isinstance(loaded, dict) else [type(loaded).__name__]
    others = others or [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds other things than tensors: {', '.join(others[:5])}. Is it a training checkpoint with an "
            "optimizer? Name the file of weights beside it."
        )
    return loaded
