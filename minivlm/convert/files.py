"""Read tensors from any file of weights, and write folders that are complete or absent."""

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
    """Raise ValueError if `path` exists and is not empty, so that no file of the user is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists. Choose another --out, or move it away.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `path` at the end, or removed after an error.

    Raises:
        ValueError: `path` exists and is not empty.
    """
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
    """Return all tensors of a file of weights, or of a folder with such files.

    Args:
        source: .safetensors, .pth or .bin file, or a folder that holds one. A folder may also hold several and an
            index of them.

    Raises:
        ValueError: there is no such file, it is incomplete, or it is a pickle of anything but tensors. No code in a
            pickle is run.
    """
    source = Path(source)
    if source.is_dir():
        name = next((name for name in WEIGHTS if (source / name).is_file()), None)
        if name is None:
            raise ValueError(f"{source}: no weights. Expected one of {', '.join(WEIGHTS)}, or name the file itself.")
        source = source / name
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder. Check the spelling.")
    if source.name.endswith(".index.json"):
        names = sorted(set(json.loads(source.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: tensor for name in names for key, tensor in read_tensors(source.parent / name).items()}
    with source.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{source} is a git-lfs pointer to the weights, not the weights. Run `git lfs pull`.")
    return read_safetensors(source) if source.suffix == ".safetensors" else read_pickle(source)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raise ValueError if it is incomplete."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}). Copy or download it again.") from None


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch file; raise ValueError if it is incomplete, or holds anything but tensors."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own text fills a page, and ends with how to run the code after all
        raise ValueError(
            f"{path} is a pickle of more than plain tensors, which could run code: it is not loaded. Save its state "
            "dict alone, by torch.save(model.state_dict(), file) where it was made."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a complete PyTorch file ({reason}). Copy or download it again.") from None
    others = [] if isinstance(loaded, dict) else [type(loaded).__name__]
    others = others or [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds other things than tensors: {', '.join(others[:5])}. Is it a training checkpoint with an "
            "optimizer? Name the file of weights beside it."
        )
    return loaded
