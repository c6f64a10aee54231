import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SMALL, assert_close, normal

from sam_jax import SamProcessor, preprocess

CONFIGS = {
    "sam": SMALL,
    "medsam": dataclasses.replace(SMALL, resize="square", normalization="min_max"),
}


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(300, 200), (31, 70), (96, 50), (96, 96), (1, 400)], ids=str)
def test_matches_the_processor(config, shape):
    pixels = image(*shape)
    expected = SamProcessor(config).preprocess(np.asarray(pixels))
    found = jax.jit(preprocess, static_argnums=1)(pixels, config)
    assert found.dtype == expected.dtype
    # The processor rounds twice, by up to 0.5, which may also change the range that it divides by.
    levels = 3 / 255 if config.normalization == "min_max" else 1 / min(config.pixel_std)
    resized = SamProcessor(config).input_size(shape) != shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=levels if resized else 1e-6)


def test_gradient():
    """Preprocessing is linear, so the gradient predicts changes of any size."""
    weights = normal((96, 96, 3))

    def total(pixels):
        return (weights * preprocess(pixels, SMALL)).sum()

    pixels, change = image(20, 130).astype(jnp.float32), normal((20, 130, 3), scale=100)
    slope = jax.grad(total)(pixels)
    assert_close((slope * change).sum(), total(pixels + change) - total(pixels), 1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_batch(config):
    images = jnp.stack([image(30, 40), image(30, 40, seed=1) // 2])
    together = preprocess(images, config)
    for one, expected in zip(images, together, strict=True):
        np.testing.assert_allclose(preprocess(one, config), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_not_an_image():
    with pytest.raises(ValueError, match=r"images have shape \(3, 20, 30\), expected"):
        preprocess(np.zeros((3, 20, 30)), SMALL)
    with pytest.raises(TypeError, match="images"):
        preprocess("photo.jpg", SMALL)
    with pytest.raises(TypeError, match="images are complex64, expected numbers from 0 to 255"):
        preprocess(np.zeros((20, 30, 3), np.complex64), SMALL)
    with pytest.raises(TypeError, match="config is a str, expected a SamConfig"):
        preprocess(np.zeros((20, 30, 3)), "mobile_sam")
