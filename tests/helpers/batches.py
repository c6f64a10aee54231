"""Batches to train on, the settings of a small step, and its keys."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import SMALL, normal

from sam_jax.training.simulate import noisy_box, sample_point
from sam_jax.training.step import TrainConfig

SIZE, SIDE = SMALL.image_size, SMALL.mask_size
CONFIG = TrainConfig(num_rounds=1)
KEYS = jax.random.split(jax.random.key(0), 4)


def masks(shape, seed):
    """Random masks made of blocks."""
    coarse = np.random.default_rng(seed).normal(size=(*shape[:-2], 4, 4))
    return jnp.asarray(
        np.kron(coarse, np.ones((shape[-2] // 4, shape[-1] // 4))) > 0.3, jnp.float32
    )


@jax.jit
def first_prompts(key, inside, box):
    """A point in an object, a noisy box around it, and whether the box is an object's first prompt.

    They are drawn as `interactive_losses` does with the first of its three keys.
    """
    choice, point_key, box_key = jax.random.split(key, 3)
    point, _ = sample_point(point_key, inside, SIZE)
    return point, noisy_box(box_key, box, SIZE), jax.random.bernoulli(choice, 0.5)


def batch_of(count, objects=3, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, SIZE / 2, (count, objects, 2))
    valid = np.ones((count, objects), np.float32)
    valid[0, -1] = 0
    return {
        "pixel_values": np.asarray(normal((count, SIZE, SIZE, 3), seed)),
        "masks": np.asarray(masks((count, objects, SIDE, SIDE), seed)) > 0,
        "boxes": np.concatenate([low, low + SIZE / 3], -1).astype(np.float32),
        "valid": valid,
    }
