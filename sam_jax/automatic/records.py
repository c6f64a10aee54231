"""Crops of an image, and the masks found in them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sam_jax.ops.mask_statistics import MaskUpsampler
from sam_jax.ops.rle import rle_area, rle_compress, rle_decode, rle_encode
from sam_jax.types import OutputMode


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

    def as_dict(self, output_mode: OutputMode) -> dict[str, Any]:
        """What `SamAutomaticMaskGenerator.generate` returns of it."""
        forms: dict[str, Callable[[dict], Any]] = {
            "binary_mask": rle_decode,
            "uncompressed_rle": lambda rle: rle,
            "coco_rle": rle_compress,
        }
        return {
            "segmentation": forms[output_mode](self.rle),
            "area": rle_area(self.rle),
            "bbox": xywh(self.box),
            "predicted_iou": self.predicted_iou,
            "point_coords": [self.point],
            "stability_score": self.stability_score,
            "crop_box": xywh(self.crop_box),
        }


class Survivors(NamedTuple):
    """The masks that passed the filters."""

    point: np.ndarray  # index in the crop's grid
    mask_index: np.ndarray  # which of the point's masks
    iou: np.ndarray
    stability: np.ndarray
    box: np.ndarray  # in pixels of the image


def full_size_rle(
    crop: Crop,
    full: MaskUpsampler,
    box: np.ndarray,
    logits: Float[np.ndarray, "side side"],
    threshold: float,
) -> dict[str, Any]:
    """Run lengths of a mask of a crop, at the size of the image."""
    x0, y0, x1, y1 = box
    left, top, _, _ = crop.box
    # Outside its box the mask is empty.
    rows, columns = full.rows[y0 - top : y1 - top + 1], full.columns[x0 - left : x1 - left + 1]
    height, width = crop.image_size
    # Column by column in memory, like run lengths.
    mask = np.zeros((width, height), bool).T
    mask[y0 : y1 + 1, x0 : x1 + 1] = rows @ logits @ columns.T > threshold
    return rle_encode(mask)


def xywh(box: Any) -> list[int]:
    """Converts a box from x0, y0, x1, y1 to x, y, width, height, as in Meta's records."""
    x0, y0, x1, y1 = map(int, box)
    return [x0, y0, x1 - x0, y1 - y0]
