import numpy as np
import pytest
from prompts import SMALL_HF
from reference import (
    hf_sam,
    normal,
    ours,
    to_torch,
)


@pytest.fixture(scope="module")
def hf():
    return hf_sam(SMALL_HF)


@pytest.fixture(scope="module")
def model(hf):
    return ours(hf, SMALL_HF)


@pytest.fixture(scope="module")
def pixels():
    return np.asarray(normal((2, 96, 96, 3)))


@pytest.fixture(scope="module")
def embeddings(hf, pixels):
    return hf.get_image_embeddings(to_torch(pixels))
