"""Crops of an image, and the masks found in them."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.ops.boxes import mask_to_box, non_maximum_suppression
from sam_jax.ops.regions import remove_small_regions
from sam_jax.ops.rle import rle_decode, rle_encode


@dataclass(frozen=True)
class Crop:
    """A crop of an image, and the masks found in the image so far."""

    image_size: tuple[int, int]  # (h, w) of the image
    box: tuple[int, int, int, int]  # in it: x0, y0, x1, y1
    grid: np.ndarray  # points [n, 2], x and y from 0 to 1
    image: np.ndarray | None
    embedding: np.ndarray | None  # [g, g, c], instead of the image
    found: "list[MaskRecord]"  # the same list for all crops of an image

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0

    @property
    def pixels(self) -> np.ndarray:
        """The image within the box, uint8 [h, w, 3]."""
        assert self.image is not None
        x0, y0, x1, y1 = self.box
        return np.ascontiguousarray(self.image[y0:y1, x0:x1])

    @property
    def points(self) -> np.ndarray:
        """Points [n, 2] in pixels of the crop."""
        return self.grid * np.array(self.size[::-1])


@dataclass(frozen=True)
class MaskRecord:
    """A mask of the result."""

    rle: Any  # uncompressed run lengths, or their `Future`
    box: np.ndarray
    predicted_iou: float
    stability_score: float
    point: list[float]
    crop_box: tuple[int, int, int, int]

    @classmethod
    def of(cls, crop: Crop, chosen: "Survivors", k: int, rle: Future) -> "MaskRecord":
        """The record of the k-th survivor."""
        return cls(
            rle=rle,
            box=chosen.box[k],
            predicted_iou=float(chosen.iou[k]),
            stability_score=float(chosen.stability[k]),
            point=(crop.points[chosen.point[k]] + np.array(crop.box[:2])).tolist(),
            crop_box=crop.box,
        )


class Survivors(NamedTuple):
    """The masks that passed the filters."""

    point: np.ndarray  # index in the crop's grid
    mask_index: np.ndarray  # which of the point's masks
    iou: np.ndarray
    stability: np.ndarray
    box: np.ndarray  # in pixels of the image


def without_small_regions(
    found: list[MaskRecord], options: MaskGenerationOptions
) -> list[MaskRecord]:
    """Fills holes, removes islands, and drops changed masks that duplicate others."""
    masks, scores = [], []
    for one in found:
        mask, changed = remove_small_regions(rle_decode(one.rle), options.min_mask_region_area)
        if changed:
            one = replace(one, rle=rle_encode(mask), box=mask_to_box(mask))
        masks.append(one)
        scores.append(float(not changed))
    threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
    boxes = np.array([mask.box for mask in masks])
    kept = non_maximum_suppression(boxes, np.array(scores), iou_threshold=threshold)
    return [masks[i] for i in kept]


def xywh(box: Any) -> list[int]:
    """Converts a box from x0, y0, x1, y1 to x, y, width, height, as in Meta's records."""
    x0, y0, x1, y1 = map(int, box)
    return [x0, y0, x1 - x0, y1 - y0]
