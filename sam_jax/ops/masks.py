"""Masks to numbers: boxes, areas, stability; run lengths; small holes and islands."""

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import scipy.ndimage
from jaxtyping import Array, Bool, Float, Int

from sam_jax.ops.resize import mask_resize_matrix


class FullSize(NamedTuple):
    """How low-resolution masks become full size: `rows @ mask @ columns.T`, in tiles; arrays.

    Tiles are square, and rows and columns padded with zeros to a multiple of their side. For each
    tile there is the range of the mask's rows, or columns, that it takes, an empty one for padding.
    """

    rows: Float[Any, "height side"]
    columns: Float[Any, "width side"]
    row_tiles: Int[Any, "i 2"]
    column_tiles: Int[Any, "j 2"]
    size: Int[Any, "2"]


def full_size(
    mask_size: int,
    image_size: int,
    input_size: tuple[int, int],
    original_size: tuple[int, int],
    padded_size: int,
    tile: int,
) -> FullSize:
    """The way to a picture's size, on the host.

    Args:
        mask_size: side of the low-resolution mask (256).
        image_size: side of the model's padded input (1024).
        input_size: (h, w) of the picture in it.
        original_size: (h, w) of the picture.
        padded_size: what both sides are padded to, a multiple of `tile`.
        tile: side of the tiles.
    """
    rows, columns = (
        mask_resize_matrix(mask_size, image_size, i, o, padded_size)
        for i, o in zip(input_size, original_size, strict=True)
    )
    tiles = (_ranges(matrix, tile) for matrix in (rows, columns))
    return FullSize(rows, columns, *tiles, np.array(original_size, np.int32))


def _ranges(matrix: Float[np.ndarray, "size side"], tile: int) -> Int[np.ndarray, "tiles 2"]:
    taken = (matrix != 0).reshape(-1, tile, matrix.shape[1]).any(1)
    first, last = taken.argmax(1), taken.shape[1] - taken[:, ::-1].argmax(1)
    return np.where(taken.any(1)[:, None], np.stack([first, last], axis=1), 0).astype(np.int32)


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
    full: FullSize,
    threshold: Float[Array, ""],
    offset: Float[Array, ""],
) -> MaskStatistics:
    """Box and stability of the mask at full size, where it is never there as a whole.

    Args:
        mask: low-resolution logits.
        full: of `full_size`.
        threshold: a pixel above it belongs to the mask.
        offset: what the two thresholds of stability differ from it by.

    Only tiles that the mask may have an edge in are computed. Interpolation lies between the
    numbers that it interpolates, so that the low-resolution logits tell which are empty or full.
    """
    # A little beyond the thresholds, since interpolation is rounded.
    margin = jnp.abs(offset) + 1e-3
    reach = mask > threshold - margin
    row_range = _tiles_reached(full.row_tiles, reach.any(1))
    column_range = _tiles_reached(full.column_tiles, reach.any(0))
    spans = jnp.concatenate([full.row_tiles, full.column_tiles])
    # A tile of a picture of at least 512 pixels takes at most half of its side, and 3 more.
    window = min(_tile_of(full) // 2 + 8, len(mask))

    def measure(window):
        return lambda: _measure_tiles(
            mask, full, row_range, column_range, threshold, offset, margin, window
        )

    fits = (spans[:, 1] - spans[:, 0]).max() <= window
    return jax.lax.cond(fits, measure(window), measure(len(mask)))


def _tile_of(full: FullSize) -> int:
    return len(full.rows) // len(full.row_tiles)


def _tiles_reached(
    tiles: Int[Array, "tiles 2"], reach: Bool[Array, " side"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first tile that takes something of what is reached, and the one after the last."""
    before = jnp.pad(jnp.cumsum(reach, dtype=jnp.int32), (1, 0))  # how many are reached before each
    taken = before[tiles[:, 1]] > before[tiles[:, 0]]
    index = jnp.arange(len(taken), dtype=jnp.int32)
    last = jnp.where(taken, index, -1).max() + 1
    return jnp.where(taken, index, last).min(), last


def _measure_tiles(
    mask, full, row_range, column_range, threshold, offset, margin, window
) -> MaskStatistics:
    """Takes `window` rows and columns of the mask for each tile, from the first that it needs."""
    slice_ = jax.lax.dynamic_slice
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    side = _tile_of(full)
    pixel = jnp.arange(side, dtype=jnp.int32)
    zero = jnp.int32(0)  # a slice's starts are of one dtype, and a plain 0 may be an int64
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
        """Where a tile's window starts, and which of its entries the tile takes."""
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

        return jax.lax.fori_loop(*column_range, one_tile, found)

    found = jax.lax.fori_loop(*row_range, row_of_tiles, nothing)
    return found._replace(box=jnp.where(found.box[2] < 0, 0, found.box))


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
    """The mask of uncompressed run lengths; raises what `check_rle` does."""
    check_rle(rle)
    (height, width), counts = rle["size"], rle["counts"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def check_rle(rle: dict) -> None:
    """Raises ValueError for uncompressed run lengths that are not those of a mask of their size."""
    (height, width), counts = rle["size"], rle["counts"]
    if not all(isinstance(count, numbers.Integral) for count in counts):
        raise ValueError("its run lengths do not fill the mask: expected whole numbers")
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise ValueError(
            f"its run lengths do not fill the mask: their sum is {sum(counts)} and the smallest "
            f"{min(counts, default=0)}, expected {height} x {width} and none below 0"
        )


def rle_compress(rle: dict) -> dict:
    """Run lengths as pycocotools' string, which JSON takes: `{"size": [h, w], "counts": str}`."""
    compressed = pycocotools.mask.frPyObjects(rle, *rle["size"])
    return {"size": rle["size"], "counts": compressed["counts"].decode()}


def rle_uncompress(rle: dict) -> dict:
    """The inverse of `rle_compress`, for strings from anywhere.

    pycocotools would read past the end of one that says too little.

    Raises:
        ValueError: if the string is none of COCO's, or ends within a number.
    """
    text = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    (ends,) = np.nonzero(digits & 32 == 0)  # where it is set, more of the number follows
    starts = np.append(0, ends + 1)
    lengths, left = np.diff(starts), len(digits) - starts[-1]
    if ((digits < 0) | (digits >= 64)).any() or lengths.max(initial=left) > 12:
        raise ValueError(f"{text[:20]!r} is no string of COCO's run lengths")
    if left:
        raise ValueError(f"{text[-20:]!r} ends within a number of COCO's run lengths")
    place = np.arange(len(digits)) - np.repeat(starts[:-1], lengths)
    total = np.append(0, np.cumsum((digits & 31) << (5 * place)))
    counts = np.diff(total[starts]) - np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth on, what is written is the difference from the number before the last.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return {"size": rle["size"], "counts": counts.tolist()}


def mask_to_polygons(mask: Bool[np.ndarray, "h w"]) -> list[list[int]]:
    """The outlines of a mask as COCO's polygons, of which pycocotools makes the same mask again.

    Returns:
        For each part (pixels connected by their sides) the corners [x0, y0, x1, y1, ...] of its
        outline, which runs along the edges of pixels: a mask of one pixel has [0, 0, 1, 0, 1, 1,
        0, 1]. COCO has no holes, so the outline goes there and back on a vertical cut. An empty
        list for an empty mask.
    """
    left, top, right, bottom = mask_to_box(mask)
    mask = mask[top : bottom + 1, left : right + 1]
    corners, vertical = _corners(mask)
    points, following = corners.tolist(), [-1] * len(corners)
    outlines, holes = [], []
    for start in range(len(points)):
        if following[start] >= 0:
            continue
        i = start
        while following[i] < 0:
            following[i], last = i ^ 1, i ^ 1
            following[last] = i = vertical[last]
        # The first corner of a ring is its upper left one.
        x, y = points[start]
        (outlines if mask[y, x] else holes).append((start, last))

    cuts: dict[int, list[tuple[int, int, int]]] = {}
    keys = corners @ [1, mask.shape[1] + 1]
    for start, last in holes:  # up to the first edge, which is of the outline or of another hole
        x, y = points[start]
        y -= int(np.argmin(np.append(mask[:y, x][::-1], False)))
        edge = np.searchsorted(keys, x + y * (mask.shape[1] + 1), side="right") - 1
        cuts.setdefault(int(edge), []).append((x, start, last))
    for i, of_edge in cuts.items():
        if following[i] != i ^ 1:  # the outline goes to the left here
            i ^= 1
        end, y = following[i], points[i][1]
        for x, start, last in sorted(of_edge, reverse=points[i][0] > points[end][0]):
            there, around, back = range(len(points), len(points) + 3)
            points += [[x, y], points[start], [x, y]]
            following[i], following[last] = there, around
            following += [start, back, end]
            i = back

    polygons = []
    for start, _ in outlines:
        polygon, i = points[start][:], following[start]
        while i != start:
            polygon += points[i]
            i = following[i]
        polygons.append((np.reshape(polygon, (-1, 2)) + np.array([left, top])).ravel().tolist())
    return polygons


def _corners(mask: Bool[np.ndarray, "h w"]) -> tuple[Int[np.ndarray, "n 2"], list[int]]:
    """Where outlines of the mask turn: (x, y) row by row, and the other end of each vertical edge.

    The ends of a horizontal edge are 2 i and 2 i + 1. Where two pixels touch at a corner there are
    two corners, one for each pixel.
    """
    padded = np.pad(mask, 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    to_left, to_right = upper_left != lower_left, upper_right != lower_right
    turns = np.nonzero(to_left != to_right)
    touches = np.nonzero(to_left & to_right & (upper_left != upper_right))
    y, x = np.concatenate([turns, touches, touches], axis=1)
    is_lower_right, no = lower_right[touches], np.zeros(len(touches[0]), bool)
    rightward = np.concatenate([to_right[turns], no, ~no])
    downward = np.concatenate([(lower_left != lower_right)[turns], ~is_lower_right, is_lower_right])
    order = np.lexsort((rightward, x, y))
    x, y, downward = x[order], y[order], downward[order]
    upper, lower = np.lexsort((downward, y, x)).reshape(-1, 2).T
    vertical = np.empty_like(order)
    vertical[upper], vertical[lower] = lower, upper
    return np.stack([x, y], axis=1), vertical.tolist()


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
