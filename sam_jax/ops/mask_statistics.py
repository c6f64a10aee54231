"""Box and stability of masks at full size, measured on the device tile by tile."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sam_jax.ops.resize import mask_resize_matrix


class MaskUpsampler(NamedTuple):
    """Resizes low-resolution masks to full size, `rows @ mask @ columns.T`, in tiles; arrays.

    Tiles are square; rows and columns are padded with zeros to a multiple of the tile's side.
    """

    rows: Float[Any, "height side"]
    """Interpolation along the height."""
    columns: Float[Any, "width side"]
    """Interpolation along the width."""
    row_tiles: Int[Any, "i 2"]
    """For each row of tiles, the range of the mask's rows that it depends on; empty for padding."""
    column_tiles: Int[Any, "j 2"]
    """For each column of tiles, the range of the mask's columns that it depends on."""
    size: Int[Any, "2"]
    """(h, w) of the image."""


def make_upsampler(
    mask_size: int,
    image_size: int,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    padded_size: int,
    tile: int,
) -> MaskUpsampler:
    """Computes the upsampler for an image's size, on the host.

    Args:
        mask_size: side of the low-resolution mask (256).
        image_size: side of the model's padded input (1024).
        input_size: (h, w) of the resized image in it.
        original_size: (h, w) of the image.
        padded_size: size to which both sides are padded, a multiple of `tile`.
        tile: side of the tiles.
    """
    rows, columns = (
        mask_resize_matrix(
            mask_size, image_size, input_size=i, original_size=o, padded_size=padded_size
        )
        for i, o in zip(input_size, original_size, strict=True)
    )
    row_tiles, column_tiles = _ranges(rows, tile), _ranges(columns, tile)
    size = np.array(original_size, np.int32)
    return MaskUpsampler(rows, columns, row_tiles, column_tiles, size)


def _ranges(matrix: Float[np.ndarray, "size side"], tile: int) -> Int[np.ndarray, "tiles 2"]:
    taken = (matrix != 0).reshape(-1, tile, matrix.shape[1]).any(1)
    first, last = taken.argmax(1), taken.shape[1] - taken[:, ::-1].argmax(1)
    return np.where(taken.any(1)[:, None], np.stack([first, last], axis=1), 0).astype(np.int32)


class MaskStatistics(NamedTuple):
    """Statistics of one mask at full size, all int32. Stability is `intersection / union`."""

    box: Array
    """x0, y0, x1, y1, including the last pixels; zeros if the mask is empty."""
    intersection: Array
    """Number of pixels above the higher threshold."""
    union: Array
    """Number of pixels above the lower threshold."""


def mask_statistics(
    mask: Float[Array, "side side"],
    full: MaskUpsampler,
    threshold: Float[Array, ""],
    offset: Float[Array, ""],
) -> MaskStatistics:
    """Box and stability of the mask at full size, without keeping all of it in memory.

    Only tiles that may contain an edge of the mask are computed. Interpolated values lie between
    the values that they interpolate, so the low-resolution logits show which tiles are empty or
    full.

    Args:
        mask: low-resolution logits.
        full: from `make_upsampler`.
        threshold: pixels with a larger logit belong to the mask.
        offset: difference of the two thresholds of stability from `threshold`.
    """
    # Slightly beyond the thresholds, since interpolation is rounded.
    margin = jnp.abs(offset) + 1e-3
    reach = mask > threshold - margin
    row_range = _tiles_reached(full.row_tiles, reach.any(1))
    column_range = _tiles_reached(full.column_tiles, reach.any(0))
    spans = jnp.concatenate([full.row_tiles, full.column_tiles])
    # For images of at least 512 pixels, a tile depends on at most half of its side, plus 3.
    window = min(_tile_of(full) // 2 + 8, len(mask))

    def measure(window):
        return lambda: _measure_tiles(
            mask, full, row_range, column_range, threshold, offset, margin, window
        )

    fits = (spans[:, 1] - spans[:, 0]).max() <= window
    return jax.lax.cond(fits, measure(window), measure(len(mask)))


def _tile_of(full: MaskUpsampler) -> int:
    return len(full.rows) // len(full.row_tiles)


def _tiles_reached(
    tiles: Int[Array, "tiles 2"], reach: Bool[Array, " side"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The range of tiles that depend on something in `reach`."""
    before = jnp.pad(jnp.cumsum(reach, dtype=jnp.int32), (1, 0))  # number in reach before each
    taken = before[tiles[:, 1]] > before[tiles[:, 0]]
    index = jnp.arange(len(taken), dtype=jnp.int32)
    last = jnp.where(taken, index, -1).max() + 1
    return jnp.where(taken, index, last).min(), last


def _measure_tiles(
    mask, full, row_range, column_range, threshold, offset, margin, window
) -> MaskStatistics:
    """Measures tiles, each from `window` rows and columns of the mask."""
    slice_ = jax.lax.dynamic_slice
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    side = _tile_of(full)
    pixel = jnp.arange(side, dtype=jnp.int32)
    zero = jnp.int32(0)  # a slice's starts must have one dtype, and a plain 0 may be int64
    far = jnp.iinfo(jnp.int32).max
    nothing = MaskStatistics(jnp.array([far, far, -1, -1], jnp.int32), zero, zero)

    def join(found, more):
        low, high = jnp.minimum(found.box, more.box), jnp.maximum(found.box, more.box)
        return MaskStatistics(
            jnp.concatenate([low[:2], high[2:]]),
            found.intersection + more.intersection,
            found.union + more.union,
        )

    def window_of(tile):
        """The start of a tile's window, and which of its entries the tile depends on."""
        start = jnp.minimum(tile[0], len(mask) - window)
        index = start + jnp.arange(window, dtype=jnp.int32)
        return start, (index >= tile[0]) & (index < tile[1])

    def tile_without_edges(i, j, is_full):
        first = side * jnp.stack([j, i])
        last = jnp.minimum(first + side, full.size[::-1]) - 1
        pixels = (last - first + 1).prod(dtype=jnp.int32)
        filled = MaskStatistics(jnp.concatenate([first, last]), pixels, pixels)
        return jax.tree.map(functools.partial(jnp.where, is_full), filled, nothing)

    def tile_with_edges(i, j, some_rows, start):
        some_columns = slice_(full.columns, (j * side, start), (side, window))
        logits = dot(slice_(some_rows, (zero, start), (side, window)), some_columns.T)
        ys, xs = i * side + pixel, j * side + pixel
        inside = (ys < full.size[0])[:, None] & (xs < full.size[1])[None]
        on = inside & (logits > threshold)
        places = (on.any(0), xs), (on.any(1), ys)
        low = jnp.stack([jnp.where(any_on, at, far).min() for any_on, at in places])
        high = jnp.stack([jnp.where(any_on, at, -1).max() for any_on, at in places])
        above = inside & (logits > threshold + offset)
        below = inside & (logits > threshold - offset)
        return MaskStatistics(
            jnp.concatenate([low, high]), above.sum(dtype=jnp.int32), below.sum(dtype=jnp.int32)
        )

    def row_of_tiles(i, found):
        start, taken = window_of(full.row_tiles[i])
        source = slice_(mask, (start, zero), (window, len(mask)))
        some_rows = dot(slice_(full.rows, (i * side, start), (side, window)), source)
        lowest = jnp.where(taken[:, None], source, jnp.inf).min(0)
        highest = jnp.where(taken[:, None], source, -jnp.inf).max(0)

        def one_tile(j, found):
            start, taken = window_of(full.column_tiles[j])
            low = jnp.where(taken, slice_(lowest, (start,), (window,)), jnp.inf).min()
            high = jnp.where(taken, slice_(highest, (start,), (window,)), -jnp.inf).max()
            is_full, is_empty = low > threshold + margin, high <= threshold - margin
            tile = jax.lax.cond(
                is_full | is_empty,
                lambda: tile_without_edges(i, j, is_full),
                lambda: tile_with_edges(i, j, some_rows, start),
            )
            return join(found, tile)

        first, last = column_range
        return jax.lax.fori_loop(first, last, one_tile, found)

    first, last = row_range
    found = jax.lax.fori_loop(first, last, row_of_tiles, nothing)
    return found._replace(box=jnp.where(found.box[2] < 0, 0, found.box))
