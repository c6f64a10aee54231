"""Masks to numbers: boxes, areas, stability; run lengths; small holes and islands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import scipy.ndimage
from jaxtyping import Array, Bool, Float, Int

# Full-size logits exist in tiles of this many pixels (rows, columns), one at a time.
_TILE = (64, 256)


class MaskStatistics(NamedTuple):
    """Of one mask at full size; all int32.

    `box` is x0, y0, x1, y1 with its last pixels included, zeros if the mask is empty. Stability is
    `intersection / union`: pixels above a higher and above a lower threshold.
    """

    box: Array
    intersection: Array
    union: Array


def mask_statistics(
    mask: Float[Array, "side side"],
    rows: Float[Array, "height side"],
    columns: Float[Array, "width side"],
    size: Int[Array, "2"],
    threshold: Float[Array, ""],
    offset: Float[Array, ""],
) -> MaskStatistics:
    """Box and stability of the mask `rows @ mask @ columns.T`, which is never there as a whole.

    Args:
        mask: low-resolution logits.
        rows: of `mask_resize_matrix`, padded with zeros to a multiple of 64 rows.
        columns: likewise, to a multiple of 256.
        size: (h, w), how much of rows and columns is no padding.
        threshold: a pixel above it belongs to the mask.
        offset: what the two thresholds of stability differ from it by.

    Only tiles in which the mask can be are computed. Interpolation lies between the numbers that it
    interpolates, so that the low-resolution logits tell where that is.
    """
    lower = threshold - jnp.abs(offset)
    # A little lower still, since interpolation is rounded.
    reach = mask > lower - 1e-3
    first_row, last_row = _tiles_reached(rows, reach.any(1), _TILE[0])
    first_column, last_column = _tiles_reached(columns, reach.any(0), _TILE[1])
    y, x = jnp.arange(_TILE[0]), jnp.arange(_TILE[1])
    highest = jax.lax.Precision.HIGHEST

    def one_tile(i, j, some_rows, found):
        some_columns = jax.lax.dynamic_slice_in_dim(columns, j * _TILE[1], _TILE[1])
        logits = jnp.dot(some_rows, some_columns.T, precision=highest)
        ys, xs = i * _TILE[0] + y, j * _TILE[1] + x
        inside = (ys < size[0])[:, None] & (xs < size[1])
        on = inside & (logits > threshold)
        in_rows, in_columns = on.any(1), on.any(0)
        box, intersection, union = found
        far = jnp.iinfo(jnp.int32).max
        low = [jnp.where(on, at, far).min() for on, at in ((in_columns, xs), (in_rows, ys))]
        high = [jnp.where(on, at, -1).max() for on, at in ((in_columns, xs), (in_rows, ys))]
        box = jnp.concatenate(
            [jnp.minimum(box[:2], jnp.stack(low)), jnp.maximum(box[2:], jnp.stack(high))]
        )
        intersection += (inside & (logits > threshold + offset)).sum(dtype=jnp.int32)
        union += (inside & (logits > threshold - offset)).sum(dtype=jnp.int32)
        return MaskStatistics(box, intersection, union)

    def row_of_tiles(i, found):
        some_rows = jax.lax.dynamic_slice_in_dim(rows, i * _TILE[0], _TILE[0])
        some_rows = jnp.dot(some_rows, mask, precision=highest)
        return jax.lax.fori_loop(
            first_column, last_column, lambda j, found: one_tile(i, j, some_rows, found), found
        )

    nothing = jnp.array([jnp.iinfo(jnp.int32).max] * 2 + [-1] * 2, jnp.int32)
    found = MaskStatistics(nothing, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    found = jax.lax.fori_loop(first_row, last_row, row_of_tiles, found)
    return found._replace(box=jnp.where(found.box[2] < 0, 0, found.box))


def _tiles_reached(
    matrix: Float[Array, "size side"], reach: Bool[Array, " side"], tile: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first tile that takes something from what is reached, and the one after the last."""
    taken = (matrix @ reach.astype(matrix.dtype)).reshape(-1, tile).max(1) > 0
    index = jnp.arange(len(taken))
    last = jnp.where(taken, index, -1).max() + 1
    return jnp.where(taken, index, last).min(), last


def rle_encode(mask: Bool[np.ndarray, "h w"]) -> dict:
    """Uncompressed COCO run lengths: column by column, zeros first.

    `{"size": [h, w], "counts": [...]}`, all Python's own integers.
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


def rle_decode(rle: dict) -> Bool[np.ndarray, "h w"]:
    """The mask of uncompressed run lengths."""
    height, width = rle["size"]
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(values, rle["counts"]).reshape(width, height).T


def rle_compress(rle: dict) -> dict:
    """Run lengths as pycocotools' string, which JSON takes: `{"size": [h, w], "counts": str}`."""
    compressed = pycocotools.mask.frPyObjects(rle, *rle["size"])
    return {"size": rle["size"], "counts": compressed["counts"].decode()}


def rle_area(rle: dict) -> int:
    """The number of pixels in the mask."""
    return sum(rle["counts"][1::2])


def mask_to_box(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "4"]:
    """x0, y0, x1, y1, the last pixels included; zeros for an empty mask."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(xs):
        return np.zeros(4, np.int64)
    return np.array([xs[0], ys[0], xs[-1], ys[-1]])


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: float
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills holes, then drops islands of fewer than `min_area` pixels.

    Regions are connected also by corners. If all islands are small the largest is kept.

    Returns:
        The mask, and whether it was changed.
    """
    labels, sizes = _regions(~mask)
    small = np.flatnonzero(sizes < min_area) + 1
    changed = len(small) > 0
    if changed:
        mask = mask | np.isin(labels, small)
    labels, sizes = _regions(mask)
    large = np.flatnonzero(sizes >= min_area) + 1
    if len(large) < len(sizes):
        changed = True
        mask = np.isin(labels, large if len(large) else [np.argmax(sizes) + 1])
    return mask, changed


def _regions(mask: Bool[np.ndarray, "h w"]) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1, 2, ... of the regions of the mask, and their sizes."""
    labels, count = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]
