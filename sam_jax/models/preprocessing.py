"""From an image to the model's input in JAX: what `SamProcessor` does, with a gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from sam_jax.arrays import as_array
from sam_jax.config import SamConfig, check_config
from sam_jax.models.checks import to_device


def preprocess(
    images: Num[Array, "*batch h w 3"], config: SamConfig
) -> Float[Array, "*batch size size 3"]:
    """Images resized, normalized and padded for `Sam.encode_image`, as `SamProcessor` does it.

    `SamProcessor` works on whole numbers from 0 to 255, and rounds after it resizes rows and
    columns. This function does not round, so that it has a gradient: before normalization its
    pixels differ by up to 1. Where nothing is resized they are equal.

    Args:
        images: RGB from 0 to 255, of any numeric dtype, all of one size.
        config: the model's.

    Returns:
        float32; padded with zeros at the bottom and at the right.

    Raises:
        TypeError: if `images` are not an array of real numbers, or the configuration is something
            else.
        ValueError: for another shape.
    """
    check_config(config)
    given = as_array(images, "images")
    if not jnp.isdtype(given.dtype, ("real floating", "integral")):
        raise TypeError(f"images are {given.dtype}, expected numbers from 0 to 255")
    images = to_device(given, jnp.float32)
    if images.ndim < 3 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}, expected (..., height, width, 3)")
    *batch, height, width, _ = images.shape
    size = fit((height, width), config.image_size, config)
    if size != (height, width):
        # Linear, and antialiased as PIL's filter is: both widen it where they shrink an image.
        images = jax.image.resize(images, (*batch, *size, 3), "linear")
    if config.normalization == "min_max":
        axes = (-3, -2, -1)
        mean = images.min(axes, keepdims=True)
        std = jnp.maximum(images.max(axes, keepdims=True) - mean, 1)
    else:
        shape = (1,) * len(batch) + (1, 1, 3)
        mean, std = (jnp.float32(x).reshape(shape) for x in (config.pixel_mean, config.pixel_std))
    missing = [(0, config.image_size - side) for side in size]
    return jnp.pad((images - mean) / std, [(0, 0)] * len(batch) + [*missing, (0, 0)])


def fit(original_size: tuple[int, int], side: int, config: SamConfig) -> tuple[int, int]:
    """(h, w) of an image of that (h, w) within a square of `side`, which it may fill."""
    if config.resize == "square":
        return side, side
    height, width = original_size
    scale = side / max(height, width)
    # At least a pixel, so that a hair-thin image does not vanish.
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
