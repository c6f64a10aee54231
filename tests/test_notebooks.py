"""The notebooks of `examples/`, run from clean."""

import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


# What makes them small.
SMALL = {"finetune": ("STEPS, TRAIN, TEST = 30, 8, 3", "STEPS, TRAIN, TEST = 12, 3, 2")}


@pytest.mark.usefixtures("mobile_sam_file")
@pytest.mark.parametrize("name", SMALL)
def test_notebook(name, tmp_path):
    shutil.copy(EXAMPLES / "cells.py", tmp_path)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert all(cell.outputs for cell in notebook.cells[-1:]), "it is stored without its pictures"
    full, small = SMALL[name]
    (cell,) = (cell for cell in notebook.cells if full in cell.source)
    cell.source = cell.source.replace(full, small)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
