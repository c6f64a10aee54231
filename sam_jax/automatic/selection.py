"""Selects the masks of the result: thresholds, edges of crops, and duplicates."""

from dataclasses import replace

import numpy as np

from sam_jax.automatic.device import Measured
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop, MaskRecord, Survivors
from sam_jax.ops.boxes import is_box_near_crop_edge, mask_to_box, non_maximum_suppression
from sam_jax.ops.regions import remove_small_regions
from sam_jax.ops.rle import rle_decode, rle_encode
from sam_jax.predictor import check_scores


def select(crop: Crop, measured: Measured, options: MaskGenerationOptions) -> Survivors:
    """The masks of a crop that are kept, in the order of the result."""
    count = len(crop.grid)
    iou, box, intersection, union = (
        np.asarray(array[:count]).reshape(-1, *array.shape[2:])
        for array in (measured.iou, *measured.statistics)
    )
    check_scores(iou)
    with np.errstate(invalid="ignore"):
        stability = intersection.astype(np.float32) / union.astype(np.float32)
    x0, y0, _, _ = crop.box
    box = box + np.array([x0, y0, x0, y0])
    keep = ~is_box_near_crop_edge(box, crop.box, crop.image_size)
    if options.pred_iou_thresh > 0:
        keep &= iou > np.float32(options.pred_iou_thresh)
    if options.stability_score_thresh > 0:
        keep &= stability >= np.float32(options.stability_score_thresh)
    (index,) = np.nonzero(keep)
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
    point, mask_index = np.divmod(index, measured.iou.shape[1])
    return Survivors(point, mask_index, iou[index], np.nan_to_num(stability[index]), box[index])


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
