"""Mask logits of many shapes."""

import numpy as np
import scipy.ndimage


def blobs(shape, seed=0, smooth=5.0):
    """Smooth logits, some above zero and some below."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return (20 * scipy.ndimage.gaussian_filter(noise, smooth) * smooth).astype(np.float32)


LOGITS = {
    "blobs": blobs((256, 256)),
    "all": np.full((256, 256), 5, np.float32),
    "none": np.full((256, 256), -5, np.float32),
    "between the thresholds": np.full((256, 256), 0.5, np.float32),
    "a speck": np.where(np.arange(65536).reshape(256, 256) == 65536 // 3, 4, -4).astype(np.float32),
    "a corner": np.where(np.add.outer(np.arange(256), np.arange(256)) > 480, 4.0, -4.0).astype(
        np.float32
    ),
}
