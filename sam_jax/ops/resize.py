"""Bilinear resizing as matrices: `out = A @ image @ B.T`.

Linear interpolation without antialiasing and with half-pixel centers
(`torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`) is linear and separable,
so a chain of resizes and crops along one axis is one small matrix. The matrices are ordinary
arguments of a compiled function, zero-padded to a few sizes, so that one program serves every
image size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear_resize_matrix(in_size: int, out_size: int) -> Float[np.ndarray, "out_size in_size"]:
    """The matrix that resizes one axis linearly; float64."""
    low, high, fraction = _neighbors(in_size, out_size)
    matrix = np.zeros((out_size, in_size))
    rows = np.arange(out_size)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def _neighbors(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output, the two inputs that it lies between, and its distance from the first."""
    # As in PyTorch: scale and position are float32; the position is rounded once (by a fused
    # multiply-add). Exact positions would shift edges of masks by 1e-4 of a pixel.
    scale = np.float32(in_size) / np.float32(out_size)
    position = (np.arange(out_size) + 0.5) * np.float64(scale) - 0.5
    position = np.maximum(position.astype(np.float32), 0)
    low = np.minimum(position.astype(np.int64), in_size - 1)
    high = np.minimum(low + 1, in_size - 1)
    return low, high, position.astype(np.float64) - low


def mask_resize_matrix(
    mask_size: int, image_size: int, *, input_size: int, original_size: int, padded_size: int
) -> Float[np.ndarray, "padded_size mask_size"]:
    """One axis of Meta's `postprocess_masks`: mask -> padded square -> crop -> original image.

    Args:
        mask_size: side of the low-resolution mask (256).
        image_size: side of the model's padded input (1024).
        input_size: size of the resized image in it along this axis.
        original_size: size of the original image along this axis.
        padded_size: number of rows of the result.

    Returns:
        float32; `original_size` rows, then rows of zeros.
    """
    to_image = linear_resize_matrix(mask_size, image_size)[:input_size]
    # Interpolate rows, which is much less work than a product of matrices.
    low, high, fraction = _neighbors(input_size, original_size)
    matrix = np.zeros((padded_size, mask_size), np.float32)
    fraction = fraction[:, None]
    matrix[:original_size] = (1 - fraction) * to_image[low] + fraction * to_image[high]
    return matrix


def area_resize_matrix(
    mask_size: int, image_size: int, input_size: int, original_size: int
) -> Float[np.ndarray, "mask_size original_size"]:
    """One axis of the opposite direction: image -> padded square -> low-resolution mask, by area.

    Each pixel of the low-resolution mask is the mean of the image's pixels that it covers; pixels
    outside the image are zero. Arguments as for `mask_resize_matrix`; float64.
    """
    edges = np.arange(mask_size + 1) * (image_size / mask_size) * (original_size / input_size)
    edges = np.minimum(edges, original_size)
    # The part of each image pixel that lies before each edge of the mask's pixels.
    before = np.clip(edges[:, None] - np.arange(original_size), 0, 1)
    covered = np.diff(before, axis=0)
    return covered / np.maximum(covered.sum(1, keepdims=True), 1e-12)


def size_bucket(size: int) -> int:
    """The smallest of 256, 384, 512, 768, 1024, 1536, ... that is at least `size`."""
    power = 256
    while power < size:
        if 3 * power // 2 >= size:
            return 3 * power // 2
        power *= 2
    return power


def resize_masks(
    masks: Float[Array, "*batch h w"],
    rows: Float[Array, "height h"],
    columns: Float[Array, "width w"],
) -> Float[Array, "*batch height width"]:
    """`rows @ mask @ columns.T` for each mask, in full float32.

    The result is thresholded, so lower precision (TF32 or bfloat16) would move edges.
    """
    return jnp.einsum(
        "yh,...hw,xw->...yx",
        rows,
        masks.astype(jnp.float32),
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )
