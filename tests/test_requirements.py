"""Packages whose internal or unstable parts sam_jax uses are capped to a minor version."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
INTERNAL = {
    "jax": r"jax\.(extend|experimental|_src)",
    "orbax-checkpoint": r"orbax\.checkpoint import v1",
    "huggingface_hub": r"huggingface_hub\.(file_download|utils) import",
    "grain": r"absl\.flags",
    "flax": r"flax\.(core|nnx\.\w+ import)|flax import (core|traverse_util)",
    "safetensors": r"safetensors\._",
    "pycocotools": r"pycocotools\._mask",
    "ray": r"\bray\.(data\.)?_",
}


@pytest.mark.parametrize("name", INTERNAL)
def test_caps(name):
    source = "".join(path.read_text() for path in (ROOT / "sam_jax").rglob("*.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    asked = [r for r in map(Requirement, texts) if r.name == name and r.specifier]
    assert asked
    major, minor = map(int, version(name).split(".")[:2])
    next_minor = f"{major}.{minor + 1}.0"
    uses = re.search(INTERNAL[name], source) is not None
    assert [not r.specifier.contains(next_minor) for r in asked] == [uses] * len(asked)
    assert all(r.specifier.contains(version(name)) for r in asked)
