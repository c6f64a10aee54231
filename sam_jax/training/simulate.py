"""Prompts as a user would give them, from an object's true mask (paper, appendix A).

Pure functions of one object, without batch axes: `jax.vmap` adds them. What is random depends on
the key alone. Coordinates are pixels of the model's input, of which the first one's centre is
(0, 0), whatever the resolution of the mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sam_jax.ops.prompts import BACKGROUND, FOREGROUND, PADDING

Key = Array
_BOX_NOISE, _BOX_NOISE_MAX = 0.1, 20.0  # sd as a share of the side; largest, in pixels


def sample_point(
    key: Key, region: Bool[Array, "h w"], image_size: int
) -> tuple[Float[Array, "2"], Bool[Array, ""]]:
    """A point of a region, each pixel as likely, and whether the region has any.

    Args:
        key: of `jax.random`.
        region: of the whole model input, at any resolution.
        image_size: side of the model's input; the point is the centre of the pixel in it.
    """
    height, width = region.shape
    counts = jnp.cumsum(region.reshape(-1))
    total = counts[-1]
    chosen = jax.random.randint(key, (), 0, jnp.maximum(total, 1))
    y, x = jnp.divmod(jnp.searchsorted(counts, chosen + 1), width)
    scale = jnp.array([image_size / width, image_size / height], jnp.float32)
    return (jnp.stack([x, y]).astype(jnp.float32) + 0.5) * scale - 0.5, total > 0


def noisy_box(key: Key, box: Float[Array, "4"], image_size: int) -> Float[Array, "4"]:
    """A box as loosely drawn: normal noise of a tenth of the side, 20 pixels at the most.

    It stays within the model's input, and the right way round.
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
    """Where a user would click next, and with which label.

    Anywhere the prediction is wrong: foreground on what it missed, background on what it should
    not have. If nothing is wrong, the label is that of padding.
    """
    point, found = sample_point(key, predicted != target, image_size)
    height, width = target.shape
    scale = jnp.array([width / image_size, height / image_size], jnp.float32)
    x, y = ((point + 0.5) * scale).astype(int)
    label = jnp.where(target[y, x], FOREGROUND, BACKGROUND)
    return point, jnp.where(found, label, PADDING)
