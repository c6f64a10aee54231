"""Selects the masks of the result: thresholds, edges of crops, and duplicates."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sam_jax.automatic.device import Measured
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop, MaskRecord, Survivors
from sam_jax.ops.boxes import is_box_near_crop_edge, mask_to_box, non_maximum_suppression
from sam_jax.ops.regions import remove_small_regions
from sam_jax.ops.rle import rle_decode, rle_encode
from sam_jax.predictor import check_scores


class Candidates(NamedTuple):
    """The measured masks of a crop."""

    point: Int[np.ndarray, " n"]  # indices in the crop's grid
    iou: Float[np.ndarray, "n m"]
    stability: Float[np.ndarray, "n m"]
    box: Int[np.ndarray, "n m 4"]  # in pixels of the image
    passed: Bool[np.ndarray, "n m"]  # the thresholds, and not cut by the crop's edge

    @classmethod
    def of(
        cls,
        crop: Crop,
        point: Int[np.ndarray, " n"],
        measured: Measured,
        options: MaskGenerationOptions,
    ) -> "Candidates":
        """The masks of some of a crop's points, from what was measured of each, and of padding.

        Raises:
            NonFiniteError: if a predicted IoU is NaN or infinite.
        """
        iou, box, intersection, union = (
            np.asarray(array[: len(point)]) for array in (measured.iou, *measured.statistics)
        )
        check_scores(iou)
        with np.errstate(invalid="ignore"):
            stability = intersection.astype(np.float32) / union.astype(np.float32)
        x0, y0, _, _ = crop.box
        box = box + np.array([x0, y0, x0, y0])
        passed = ~is_box_near_crop_edge(box, crop.box, crop.image_size)
        if options.pred_iou_thresh > 0:
            passed &= iou > np.float32(options.pred_iou_thresh)
        if options.stability_score_thresh > 0:
            passed &= stability >= np.float32(options.stability_score_thresh)
        return cls(point, iou, stability, box, passed)


def join(parts: list[Candidates]) -> Candidates:
    """The masks of all parts, in the order of the grid's points."""
    joined = Candidates(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.argsort(joined.point)
    return Candidates(*(array[order] for array in joined))


def select(crop: Crop, candidates: Candidates, options: MaskGenerationOptions) -> Survivors:
    """The masks of a crop that are kept, in the order of the result."""
    (index,) = np.nonzero(candidates.passed.ravel())
    iou, stability = candidates.iou.ravel(), candidates.stability.ravel()
    box = candidates.box.reshape(-1, 4)
    kept = non_maximum_suppression(box[index], iou[index], iou_threshold=options.box_nms_thresh)
    index = index[kept]
    if options.crop_n_layers:
        # Masks of earlier crops come first, then this crop's in their order.
        boxes = np.concatenate([np.array([m.box for m in crop.found]).reshape(-1, 4), box[index]])
        kept = non_maximum_suppression(
            boxes,
            -np.arange(len(boxes), dtype=np.float32),
            iou_threshold=options.crop_nms_thresh,
        )
        index = index[kept[kept >= len(crop.found)] - len(crop.found)]
    row, mask_index = np.divmod(index, candidates.iou.shape[1])
    return Survivors(
        candidates.point[row], mask_index, iou[index], np.nan_to_num(stability[index]), box[index]
    )


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
