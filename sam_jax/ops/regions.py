"""Converts masks to polygons, and removes small holes and islands."""

from typing import cast

import numpy as np
from jaxtyping import Bool, Int

from sam_jax.errors import check_mask, check_number
from sam_jax.ops.boxes import mask_to_box


def mask_to_polygons(mask: Bool[np.ndarray, "h w"]) -> list[list[int]]:
    """The outlines of a mask as COCO polygons, which pycocotools converts to the same mask.

    Returns:
        For each part (pixels connected by their sides), the corners [x0, y0, x1, y1, ...] of its
        outline along the edges of pixels: a mask of one pixel has [0, 0, 1, 0, 1, 1, 0, 1]. COCO
        does not support holes, so a vertical cut connects them with the outline. An empty list for
        an empty mask.
    """
    left, top, right, bottom = mask_to_box(mask)
    mask = mask[top : bottom + 1, left : right + 1]
    corners, vertical = _corners(mask)
    points, following = corners.tolist(), [-1] * len(corners)
    outlines, holes = [], []
    for start in range(len(points)):
        if following[start] >= 0:
            continue
        i = last = start
        while following[i] < 0:
            following[i], last = i ^ 1, i ^ 1
            following[last] = i = vertical[last]
        # A ring's first corner is its upper left one.
        x, y = points[start]
        (outlines if mask[y, x] else holes).append((start, last))

    cuts: dict[int, list[tuple[int, int, int]]] = {}
    keys = corners @ [1, mask.shape[1] + 1]
    for start, last in holes:  # cut up to the first edge, of the outline or of another hole
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
    """The corners of outlines, (x, y) row by row, and the other end of each one's vertical edge.

    The ends of a horizontal edge are corners 2 i and 2 i + 1. If two pixels touch at a corner, each
    pixel has its own.
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


def remove_small_regions(
    mask: Bool[np.ndarray, "h w"], min_area: float
) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """Fills holes, then removes islands, of fewer than `min_area` pixels.

    Regions are also connected by corners. If all islands are small, the largest one is kept.

    Returns:
        The mask, and whether it was changed.

    Raises:
        ValueError: if the mask is not bool (h, w), or `min_area` is not a number.
    """
    check_mask(mask)
    check_number("min_area", min_area)
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
    import scipy.ndimage  # takes a quarter of a second, which few callers need

    # Without an output array it returns both, which its signature does not say.
    found = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    labels, count = cast(tuple[np.ndarray, int], found)
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]
