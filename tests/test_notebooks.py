"""Runs the notebooks of `examples/` from a clean state."""

import base64
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKLY = 'jax.config.update("jax_disable_most_optimizations", True)\n'
THOROUGHLY = QUICKLY.replace("True", "False")
# For each notebook, the number of its images, and replacements that make it small, or that turn
# off optimizations where compiling takes longer than running.
NOTEBOOKS = {
    "predictor": (6, {}),
    "automatic_masks": (5, {"SIDE = 16": "SIDE = 4"}),
    "research_loop": (
        3,
        {
            "in range(30)": "in range(2)",
            "0.9, 6)": "0.9, 2)",
            '"jax_num_cpu_devices", 4': '"jax_num_cpu_devices", 2',
            "target = (logits": f"{QUICKLY}target = (logits",
            "@jax.jit\ndef saliency": f"{THOROUGHLY}@jax.jit\ndef saliency",
            "def best_score": f"{QUICKLY}def best_score",
            "mesh = jax.make_mesh": f"{THOROUGHLY}mesh = jax.make_mesh",
        },
    ),
    "finetune": (3, {"STEPS, TRAIN, TEST = 30, 8, 3": "STEPS, TRAIN, TEST = 8, 2, 1"}),
}


@pytest.mark.usefixtures("mobile_sam_file")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_path):
    shutil.copy(EXAMPLES / "cells.py", tmp_path)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    images, small = NOTEBOOKS[name]
    assert count_images(notebook) == images, "it is stored without its images"
    for full, less in small.items():
        (cell,) = (cell for cell in notebook.cells if full in cell.source)
        cell.source = cell.source.replace(full, less)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert count_images(notebook) == images
    warned = [o["text"] for o in outputs(notebook) if o.get("name") == "stderr"]
    assert not warned


@pytest.mark.parametrize("name", ["predictor", "research_loop"])
def test_readme_shows_the_notebooks_first_image(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    first = next(
        o.data["image/jpeg"] for o in outputs(notebook) if "image/jpeg" in o.get("data", {})
    )
    assert base64.b64decode(first) == (EXAMPLES / f"{name}.jpg").read_bytes()


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def count_images(notebook):
    kinds = {"image/png", "image/jpeg"}
    return sum(bool(kinds & set(output.get("data", {}))) for output in outputs(notebook))
