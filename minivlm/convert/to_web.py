"""Write a model as a folder that any static server shows as a page: its graphs, the page, and the list of its scripts.

The page runs the graphs by transformers.js in the user's browser. It loads three files of other projects: from a CDN,
or from copies beside the page. They are 15 MB and not in this repository. The browser refuses a file whose digest is
not the one written here, so a page that was tested loads the same bytes everywhere.
"""

import base64
import hashlib
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from transformers import ProcessorMixin

from minivlm.convert.errors import Inexpressible
from minivlm.convert.files import new_folder
from minivlm.convert.quantize import shrink
from minivlm.convert.to_onnx import check_packages, write_graphs
from minivlm.convert.transformers_js import obstacles, too_large, write_json
from minivlm.model.loading import load_trained
from minivlm.resources import FONT, PACKAGE, WEB
from modeling_minivlm import MiniVLMForConditionalGeneration

CDN = "https://cdn.jsdelivr.net"
# On the Hub a large file of a Space may be sent on to another host, and the page's rules hold for it, too.
HOSTS = f"{CDN} https://huggingface.co https://*.hf.co"
OWN_HOST = "connect-src 'self'"  # in the page's Content-Security-Policy


@dataclass(frozen=True)
class Script:
    """Describe a file of another project: package and version on npm, size in bytes, digest as browsers write it."""

    package: str
    size: int
    integrity: str


JS, RUNTIME = "@huggingface/transformers@4.3.1", "onnxruntime-web@1.31.0-dev.20260914-8d85527a0"  # the former's choice
LIBRARY = {
    "transformers.min.js": Script(
        JS, 586_230, "sha384-AFNtlNOt2vbygtlRCUX2TDgkE+EyonjbCLxAfqezYwJJDVlozUhg+yKs4cPwyjHR"
    ),
    "ort-wasm-simd-threaded.mjs": Script(
        RUNTIME, 24_381, "sha384-rwgdUeIyqfd2lxMuhdqXYPnZiluDqSM5liz/q+ulIt4vYtB52NCoTVWBkm1KFOeN"
    ),
    "ort-wasm-simd-threaded.wasm": Script(  # half as large as the one with WebGPU, which the page does not use
        RUNTIME, 14_264_838, "sha384-LrOPe1yNsLVzhsriuQfxO06RWx/XakR0S8uiOMx7HVJP6N/IEaR1EAgJMFeTanif"
    ),
}


def to_web(
    source: str | Path, out: str | Path, dtype: str = "q8", library: Path | None = None, verify: bool = False
) -> list[str]:
    """Write the model of `source` and a page that asks it.

    Args:
        source: folder or Hub id of a MiniVLM.
        out: new folder.
        dtype: how to store the weights, a key of `DTYPES`.
        library: folder with npm's archives of `LIBRARY`. The page then loads no file of another host.
        verify: also compare the graphs with our model before their weights are rounded; a difference is an error.

    Returns:
        Lines for the user.

    Raises:
        ValueError: a file of `LIBRARY` is not in `library`, or as for `to_onnx`.
        Inexpressible: transformers.js cannot run the model.
    """
    check_packages()
    scripts = {} if library is None else read_library(library)
    model, processor = load_trained(source)
    check_model(model, processor, source)
    with new_folder(out) as folder:
        graphs = folder / "model"
        graphs.mkdir()
        _, lines = write_graphs(model, processor, graphs, verify)
        shrink(graphs, dtype)
        write_page(folder, scripts)
        sizes = [path.stat().st_size for path in (graphs / "onnx").iterdir()]
    where = f"{CDN}, with checked digests" if library is None else "the folder itself: it works without a network"
    return [
        *lines,
        f"graphs ({dtype}): {sum(sizes) / 1e6:.1f} MB",
        f"transformers.js comes from {where}",
        f"To look at it: python -m http.server --bind 127.0.0.1 --directory {out}",
    ]


def check_model(model: MiniVLMForConditionalGeneration, processor: ProcessorMixin, source: str | Path) -> None:
    """Raise Inexpressible if transformers.js cannot run the model of `source`."""
    if reasons := obstacles(model.config, processor) + too_large(model):
        raise Inexpressible(f"transformers.js cannot run {source}: {'; '.join(reasons)}.")


def read_library(folder: Path) -> dict[str, bytes]:
    """Return the files of `LIBRARY`, and the licence of transformers.js, from the archives that `npm pack` wrote.

    Raises:
        ValueError: a file is in none of them, or is not the expected one.
    """
    found = {}
    for path in sorted(folder.glob("*.tgz")):
        with tarfile.open(path) as archive:
            for name in LIBRARY.keys() - found.keys():
                if f"package/dist/{name}" in archive.getnames():
                    data = archive.extractfile(f"package/dist/{name}").read()
                    if digest(data) == LIBRARY[name].integrity:
                        found[name] = data
            if "transformers.min.js" in found and "package/LICENSE" in archive.getnames():
                found.setdefault("LICENSE", archive.extractfile("package/LICENSE").read())
    missing = sorted(LIBRARY.keys() - found.keys())
    if missing:
        raise ValueError(
            f"--library {folder}: no npm archive there holds {', '.join(missing)} of the version that was tested. "
            f"Fetch them: npm pack --pack-destination {folder} {JS} {RUNTIME}"
        )
    return found


def digest(data: bytes) -> str:
    """Return the SHA-384 of a file as browsers write it."""
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()


def write_page(folder: Path, scripts: dict[str, bytes]) -> None:
    """Write the page beside the graphs.

    Args:
        scripts: files of `LIBRARY` to put beside it; if there are none, the page loads them from the CDN.
    """
    for path in WEB.iterdir():
        shutil.copy(path, folder)
    shutil.copy(FONT, folder)
    shutil.copy(FONT.with_name("OFL.txt"), folder)
    if scripts:
        (folder / "library").mkdir()
        for name, data in scripts.items():
            (folder / "library" / name).write_bytes(data)
    else:
        page = (folder / "index.html").read_text(encoding="utf-8")
        assert page.count(OWN_HOST) == 1, "web/index.html has another Content-Security-Policy"
        page = page.replace(OWN_HOST, f"{OWN_HOST} {HOSTS}")
        (folder / "index.html").write_text(page, encoding="utf-8")
    write_json(folder / "settings.json", settings(folder, bool(scripts)))


def settings(folder: Path, local: bool) -> dict:
    """Return what the page reads: where its scripts are, how many bytes it loads, which examples it can show."""
    pictures = PACKAGE.parent / "data" / "examples"  # in a checkout; a wheel has none
    if pictures.is_dir():
        shutil.copytree(pictures, folder / "examples")
    loaded = sum(path.stat().st_size for path in (folder / "model").rglob("*") if path.is_file())
    return {
        "bytes": loaded + sum(script.size for script in LIBRARY.values()),
        "examples": sorted(path.name for path in folder.glob("examples/*.png")),
        "library": {
            name: {
                "url": f"library/{name}" if local else f"{CDN}/npm/{script.package}/dist/{name}",
                "integrity": script.integrity,
            }
            for name, script in LIBRARY.items()
        },
    }
