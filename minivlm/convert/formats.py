"""Write a model in the formats of other engines, each in a folder as it goes to the Hub."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from minivlm.convert.errors import Inexpressible
from minivlm.convert.quantize import shrink
from minivlm.convert.to_gguf import check_package, to_gguf
from minivlm.convert.to_onnx import check_packages, to_onnx, write_graphs
from minivlm.convert.to_web import check_model
from minivlm.model.loading import load_trained

GRAPHS = ("fp16", "q8")  # keys of quantize.DTYPES; transformers.js loads the last unless it is told otherwise
FILES = ("f16", "q8_0")  # keys of to_gguf.FILE_TYPES; the Modelfile names the first


def write_onnx(source: str | Path, out: Path) -> None:
    """Write the graphs of the model of `source` in 16 and in 8 bits, which were compared with it in fp32.

    Raises:
        ValueError: a package is not installed, or the graphs differ from the model.
        Inexpressible: transformers.js cannot run the model.
    """
    check_packages()
    model, processor = load_trained(source)
    check_model(model, processor, source)
    out.mkdir(parents=True)
    write_graphs(model, processor, out, verify=True)
    shrink(out, *GRAPHS)


def write_int8(source: str | Path, out: Path) -> None:
    """Write the graphs of `to_onnx` that multiply in 8 bits, by onnxruntime alone."""
    to_onnx(source, out, verify=True, dtype="int8")


def write_gguf(source: str | Path, out: Path) -> None:
    """Write the files of `to_gguf` in 16 and in 8 bits into one folder, with a Modelfile for those of 16 bits.

    Raises:
        ValueError: a package is not installed.
        Inexpressible: llama.cpp cannot express the model.
    """
    check_package()
    first, *others = FILES
    to_gguf(source, out, outtype=first)
    for outtype in others:
        with tempfile.TemporaryDirectory() as place:
            to_gguf(source, Path(place, "gguf"), outtype=outtype)
            for path in Path(place, "gguf").glob("*.gguf"):
                shutil.move(path, out / path.name)


WRITERS: dict[str, Callable[[str | Path, Path], None]] = {
    "ONNX": write_onnx,
    "ONNX-int8": write_int8,
    "GGUF": write_gguf,
}


def make_formats(source: str | Path, place: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write the model of `source` in every format that can hold it.

    Args:
        place: folder in which each format gets a folder of its own.

    Returns:
        Format -> folder, and format -> the reason why it cannot hold this model.

    Raises:
        ValueError: a package is not installed, or an export failed.
    """
    made, refused = {}, {}
    for name, write in WRITERS.items():
        try:
            write(source, place / name)
            made[name] = place / name
        except Inexpressible as error:
            refused[name] = str(error)
    return made, refused
