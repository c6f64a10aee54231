"""`examples/finetune.py` as a module, its arguments for a short run, and a small model to tune."""

import sys
from pathlib import Path

import pytest
import tyro
from reference import SHALLOW, meta_sam, ours

from sam_jax import save_pretrained

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import finetune

STEPS = 14


def arguments(cells, model, output, *options):
    """Command-line arguments. If an option is given twice, the second one counts."""
    found = ["--annotations", cells / "train.json", "--images", cells / "images"]
    found += ["--output", output, "--model", model, "--steps", STEPS, "--batch-size", 2]
    found += ["--max-objects", 2, "--num-rounds", 2, "--eval-every", 4, "--learning-rate", 1e-3]
    return [str(argument) for argument in (*found, *options)]


def config_of(*args):
    return tyro.cli(finetune.Config, args=arguments(*args))


# A fixture; a test module imports it.


@pytest.fixture(scope="module", name="model")
def model_fixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(ours(meta_sam(SHALLOW), SHALLOW), path)
    return path
