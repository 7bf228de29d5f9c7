"""Run the notebook from its first cell to its last, with tiny settings and without a network."""

import os
import shutil
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.models import ROOT

NOTEBOOK = ROOT / "notebooks" / "minivlm_colab.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook") / "minivlm"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".pytest_cache", "tests", "test.parquet")
    shutil.copytree(ROOT, folder, ignore=ignored)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [settings] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = 'EPOCHS, MAX_ROWS, PUSH_TO = 1, 16, ""'
    kernel = folder.parent / "kernels" / "python3"  # this Python, wherever Jupyter would look first
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python 3", "language": "python"}'
    )
    environment = {"JUPYTER_PATH": str(folder.parent), "HF_MODULES_CACHE": str(folder.parent / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute(
        env=os.environ | environment
    )
    return notebook, folder


def outputs(notebook):
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


def test_every_cell_runs(executed):
    notebook, folder = executed
    assert (folder / "runs" / "colab" / "final" / "model.safetensors").is_file()
    text = outputs(notebook)
    assert "[Train Epoch 1] step: 2, loss:" in text and "PUSH_TO is empty" in text
    assert text.count("What is this? Answer with the name. |") == 2
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(shown) == 4  # three pictures and the curve


def test_the_notebook_speaks_both_languages_and_holds_no_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert any("\u4e00" <= character <= "\u9fff" for character in cell.source), cell.source
        else:
            assert not cell.outputs and cell.execution_count is None
