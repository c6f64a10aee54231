"""The option `hierarchical`: from a coarse grid to a fine one, without points that repeat others.

Most points of a regular grid find only masks that their neighbors find, too.
"""

import numpy as np
from jaxtyping import Float, Int

from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop
from sam_jax.automatic.selection import Candidates
from sam_jax.ops.boxes import box_iou

_BATCH = 4096
_NEIGHBORS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def grid_levels(
    grid: Float[np.ndarray, "n 2"], options: MaskGenerationOptions
) -> list[Int[np.ndarray, " _"]]:
    """The indices of a grid's points, in the order in which they are measured.

    All at once, or, if the options say so, those of every second row and column first, then the
    centers between four of them, then all others, which lie between four of both.
    """
    every = np.arange(len(grid))
    if not options.hierarchical:
        return [every]
    row, column = np.divmod(every, round(len(grid) ** 0.5))
    level = np.where(row % 2 == column % 2, row % 2, 2)
    return [np.flatnonzero(level == k) for k in range(3)]


def points_to_measure(
    points: Int[np.ndarray, " n"],
    crop: Crop,
    known: list[Candidates],
    options: MaskGenerationOptions,
) -> Int[np.ndarray, " _"]:
    """The points but those whose measured neighbors all have the same masks around them.

    Such a point has two measured neighbors at least, and each has a mask that passed. Masks are the
    same if one would be a duplicate of the other, by the IoU of their boxes.

    Args:
        points: indices in the crop's square grid.
        crop: the crop.
        known: the masks of points that were measured already.
        options: `box_nms_thresh` says which masks are duplicates.
    """
    if not known or not len(points):
        return points
    grid, masks = len(crop.grid), known[0].iou.shape[1]
    measured = np.zeros(grid, bool)
    passed, boxes = np.zeros((grid, masks), bool), np.zeros((grid, masks, 4), np.int64)
    for part in known:
        measured[part.point], passed[part.point], boxes[part.point] = True, part.passed, part.box
    at = crop.points + crop.box[:2]
    # A few points at a time, which bounds the memory for all pairs of their neighbors' masks.
    batches = np.array_split(points, -(-len(points) // _BATCH))
    repeated = [_repeat(b, at, measured, passed, boxes, options.box_nms_thresh) for b in batches]
    return points[~np.concatenate(repeated)]


def _repeat(points, at, measured, passed, boxes, iou_threshold):
    """Whether all measured neighbors of each point have the same masks around it."""
    side = round(len(at) ** 0.5)
    row, column = (
        np.add.outer(index, offsets)
        for index, offsets in zip(np.divmod(points, side), np.transpose(_NEIGHBORS), strict=True)
    )
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    near = np.where(inside, row * side + column, 0)
    measured = inside & measured[near]  # [n, neighbor]
    passed = passed[near] & measured[..., None]  # [n, neighbor, mask]
    boxes = boxes[near]

    at = at[points][:, None, None]
    around = ((boxes[..., :2] <= at) & (at <= boxes[..., 2:])).all(-1)
    # Whether another neighbor has the mask, too: [n, neighbor, mask, other neighbor].
    iou = box_iou(boxes[:, :, :, None, None], boxes[:, None, None])
    shared = ((iou > iou_threshold) & passed[:, None, None]).any(-1)
    by_all = (shared | ~measured[:, None, None]).all(-1)
    same = ((around & by_all) | ~passed).all((1, 2))
    each_has_one = (passed.any(-1) | ~measured).all(-1)
    return same & each_has_one & (measured.sum(-1) >= 2)
