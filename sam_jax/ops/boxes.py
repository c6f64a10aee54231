"""Point grids, crop boxes and non-maximum suppression of everything mode.

These are a few thousand numbers per image, computed with numpy on the host: deterministic, and
without compilation. Boxes are x0, y0, x1, y1 in pixels; those of masks include their last pixel.
"""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from sam_jax.errors import check_mask, check_whole

# Distance in pixels to the edge of a crop below which a box counts as cut off.
_EDGE_TOLERANCE = 20.0


def build_point_grid(n_per_side: int) -> Float[np.ndarray, "n 2"]:
    """The centers (x, y) of n x n equal cells of the unit square, row by row."""
    check_whole("n_per_side", n_per_side, 1)
    centers = np.linspace(1 / (2 * n_per_side), 1 - 1 / (2 * n_per_side), n_per_side)
    x, y = np.meshgrid(centers, centers)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def generate_crop_boxes(
    image_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """The whole image, then for each layer i = 1, ..., n the boxes of 2^i x 2^i crops.

    Args:
        image_size: (h, w) in pixels.
        n_layers: number of crop layers.
        overlap_ratio: overlap of the first layer's crops, as a fraction of the image's shorter
            side; crops of later layers overlap less, in proportion.

    Returns:
        The boxes x0, y0, x1, y1 (x1, y1 excluded), and their layers. Empty crops, which occur in
        images that are a few pixels wide, are left out.
    """
    height, width = image_size
    boxes, layers = [(0, 0, width, height)], [0]
    for layer in range(1, n_layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / n))
        crop_width, crop_height = (
            math.ceil((overlap * (n - 1) + side) / n) for side in (width, height)
        )
        # Column by column, as in the reference.
        for i, j in itertools.product(range(n), range(n)):
            x0, y0 = (crop_width - overlap) * i, (crop_height - overlap) * j
            x1, y1 = min(x0 + crop_width, width), min(y0 + crop_height, height)
            if x0 < x1 and y0 < y1:
                boxes.append((x0, y0, x1, y1))
                layers.append(layer)
    return boxes, layers


def is_box_near_crop_edge(
    boxes: Num[np.ndarray, "*n 4"],
    crop_box: tuple[int, int, int, int],
    image_size: tuple[int, int],
) -> Bool[np.ndarray, "*n"]:
    """Whether boxes are within 20 pixels of an edge of the crop that is not the image's edge.

    Args:
        boxes: x0, y0, x1, y1 in pixels of the image.
        crop_box: the crop's box.
        image_size: (h, w) of the image.
    """
    height, width = image_size
    near_crop = abs(boxes - np.array(crop_box)) <= _EDGE_TOLERANCE
    near_image = abs(boxes - np.array([0, 0, width, height])) <= _EDGE_TOLERANCE
    return np.any(near_crop & ~near_image, axis=-1)


def box_area(boxes: Num[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n"]:
    """The areas of boxes, width times height, float32."""
    sides = np.asarray(boxes[..., 2:] - boxes[..., :2], np.float32)
    return sides[..., 0] * sides[..., 1]


def box_iou(
    boxes: Num[np.ndarray, "*#n 4"], others: Num[np.ndarray, "*#n 4"]
) -> Float[np.ndarray, "*n"]:
    """Intersection over union of boxes, or one box, with others, float32; NaN if both are empty."""
    boxes = np.atleast_2d(boxes)
    corner0 = np.maximum(boxes[..., :2], others[..., :2])
    corner1 = np.minimum(boxes[..., 2:], others[..., 2:])
    sides = np.maximum(corner1 - corner0, 0).astype(np.float32)
    intersection = sides[..., 0] * sides[..., 1]
    with np.errstate(invalid="ignore"):
        return intersection / (box_area(boxes) + box_area(others) - intersection)


def non_maximum_suppression(
    boxes: Num[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], *, iou_threshold: float
) -> Int[np.ndarray, " kept"]:
    """The indices of boxes that are kept, best first; each drops worse boxes that overlap it.

    The result is that of `torchvision.ops.nms` on a CPU: of boxes with equal scores the first one
    wins, and a box is dropped if its IoU with a better one is larger than the threshold.

    Raises ValueError unless there is one score for each box.
    """
    if boxes.shape != (len(scores), 4):
        raise ValueError(f"there are {len(scores)} scores, but boxes of shape {boxes.shape}")
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        # Torchvision's IoUs are float32, its threshold is a double.
        ious = box_iou(boxes[best], boxes[order]).astype(np.float64)
        order = order[~(ious > iou_threshold)]
    return np.array(kept, np.int64)


def mask_to_box(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "4"]:
    """x0, y0, x1, y1, the last pixels included; zeros for an empty mask.

    Raises ValueError if the mask is not bool (h, w).
    """
    check_mask(mask)
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(xs):
        return np.zeros(4, np.int64)
    return np.array([xs[0], ys[0], xs[-1], ys[-1]])
