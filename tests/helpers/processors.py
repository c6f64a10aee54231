"""Processors of images and prompts, sam_jax's and the references', and images for them."""

import numpy as np
import pytest
import torch_reference
import transformers
from PIL import Image
from reference import SMALL
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from sam_jax.config import vit_b
from sam_jax.processing import SamProcessor

SIZES = [(300, 451), (451, 300), (96, 96), (1024, 1024), (700, 1500), (5, 9), (60, 1), (1, 60)]


def random_image(height, width, seed=0):
    """Random, with smooth parts and edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.3, noise, smooth)


# Fixtures; a test module imports them.


@pytest.fixture(scope="module", name="processor")
def processor_fixture():
    return SamProcessor(vit_b())


@pytest.fixture(scope="module", name="small")
def small_fixture():
    return SamProcessor(SMALL)


@pytest.fixture(scope="module", name="transforms")
def transforms_fixture():
    torch_reference.import_reference("segment_anything")
    import segment_anything.utils.transforms as module

    return module


@pytest.fixture(scope="module", name="hf")
def hf_fixture():
    return transformers.SamProcessor(SamImageProcessorPil())
