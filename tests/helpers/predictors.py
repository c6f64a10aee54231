"""A predictor and Meta's, with the same weights and the same image, and prompts for both."""

import functools

import numpy as np
import pytest
import torch_reference
from PIL import Image
from reference import SHALLOW, assert_close, mask_iou, meta_sam, ours

from sam_jax.predictor import SamPredictor

TOLERANCE = 1e-4
SIDE = SHALLOW.mask_size
SIZE = (71, 113)  # scaled to (60, 96): the ratios of the axes differ by rounding

POINTS = np.array([[60.0, 30.5], [10.0, 50.0], [111.0, 2.25]])
LABELS = np.array([1, 0, 1])
BOX = np.array([12.0, 8.5, 90.0, 66.0])


def random_image(height=SIZE[0], width=SIZE[1], seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


@functools.cache
def torch_model(seed=0):
    return meta_sam(SHALLOW, seed)


@functools.cache
def model(seed=0):
    return ours(torch_model(seed), SHALLOW)


def reference_predictor(seed=0):
    return torch_reference.import_reference("segment_anything").SamPredictor(torch_model(seed))


def assert_same(found, expected, logits=False):
    """Masks, scores and low-resolution logits as the reference's, which may be tensors."""
    for name, ours_, theirs in zip(("masks", "scores", "low_res"), found, expected, strict=True):
        theirs = np.asarray(theirs)
        assert isinstance(ours_, np.ndarray)
        assert ours_.shape == theirs.shape
        assert ours_.dtype == theirs.dtype
        if name == "masks" and not logits:
            assert ours_.dtype == bool
            assert mask_iou(ours_, theirs).min() >= 0.9999
        else:
            assert_close(ours_, theirs, TOLERANCE)


def low_res_logits(count=1, seed=5):
    return np.random.default_rng(seed).normal(0, 8, (count, SIDE, SIDE)).astype(np.float32)


# Fixtures; a test module imports them.


@pytest.fixture(scope="module", name="reference")
def reference_fixture():
    predictor = reference_predictor()
    predictor.set_image(random_image())
    return predictor


@pytest.fixture(name="predictor")
def predictor_fixture(reference):
    predictor = SamPredictor(model())
    predictor.set_image(random_image())
    return predictor
