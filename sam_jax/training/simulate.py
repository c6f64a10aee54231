"""Simulates a user's prompts, given an object's true mask (paper, appendix A).

Pure functions for one object, without batch axes: `jax.vmap` adds them. Random numbers depend only
on the key. Coordinates are pixels of the model's input, with (0, 0) at the center of the first one,
whatever the resolution of the mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sam_jax.ops.prompts import BACKGROUND, FOREGROUND, PADDING

Key = Array
_BOX_NOISE, _BOX_NOISE_MAX = 0.1, 20.0  # standard deviation relative to the side; limit in pixels


def sample_point(
    key: Key, region: Bool[Array, "h w"], image_size: int
) -> tuple[Float[Array, "2"], Bool[Array, ""]]:
    """A point drawn uniformly from the pixels of a region, and whether the region has pixels.

    Args:
        key: a `jax.random` key.
        region: a mask of the whole model input, at any resolution.
        image_size: side of the model's input; the point is the pixel's center in it.
    """
    height, width = region.shape
    counts = jnp.cumsum(region.reshape(-1))
    total = counts[-1]
    chosen = jax.random.randint(key, (), 0, jnp.maximum(total, 1))
    y, x = jnp.divmod(jnp.searchsorted(counts, chosen + 1), width)
    scale = jnp.array([image_size / width, image_size / height], jnp.float32)
    return (jnp.stack([x, y]).astype(jnp.float32) + 0.5) * scale - 0.5, total > 0


def noisy_box(key: Key, box: Float[Array, "4"], image_size: int) -> Float[Array, "4"]:
    """A box with noise: a normal deviation of a tenth of the side, at most 20 pixels.

    The result is within the model's input and has x0 <= x1 and y0 <= y1.
    """
    sides = jnp.tile(box[2:] - box[:2], 2)
    noise = jax.random.normal(key, (4,), jnp.float32) * _BOX_NOISE * sides
    box = jnp.clip(box + jnp.clip(noise, -_BOX_NOISE_MAX, _BOX_NOISE_MAX), 0, image_size - 1)
    return jnp.concatenate([jnp.minimum(box[:2], box[2:]), jnp.maximum(box[:2], box[2:])])


def next_click(
    key: Key,
    predicted: Bool[Array, "h w"],
    target: Bool[Array, "h w"],
    image_size: int,
) -> tuple[Float[Array, "2"], Int[Array, ""]]:
    """A user's next click and its label.

    The click is at a random wrong pixel: foreground if the prediction missed it, background if it
    was wrongly included. If nothing is wrong, the label is that of padding.
    """
    point, found = sample_point(key, predicted != target, image_size)
    height, width = target.shape
    scale = jnp.array([width / image_size, height / image_size], jnp.float32)
    x, y = ((point + 0.5) * scale).astype(int)
    label = jnp.where(target[y, x], FOREGROUND, BACKGROUND)
    return point, jnp.where(found, label, PADDING)
