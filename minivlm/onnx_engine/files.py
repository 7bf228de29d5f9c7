"""Find the folder of graphs that the user means, and read the JSON files in it. Standard library only."""

import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """Return the content of a JSON file.

    Raises:
        OSError: it is not there.
        ValueError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}. Export the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Export the model again.")
    return content


def has_graphs(folder: Path) -> bool:
    """Return whether a folder holds exported graphs."""
    return any((folder / "onnx").glob("*.onnx"))


def find_graphs(name: str) -> Path:
    """Return the folder of graphs: `name`, or the folder `model` inside of it, where `to_web` writes them.

    Raises:
        ValueError: there are none. The message says how to make them.
    """
    for folder in (Path(name), Path(name) / "model"):
        if has_graphs(folder):
            return folder
    raise ValueError(
        f"--model {name}: no ONNX graphs in a folder of this name. Make them: minivlm convert to_onnx {name} --out "
        "runs/onnx, then ask with --model runs/onnx."
    )
