"""Folders of small images, and options with which all their masks pass."""

from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.rle import rle_encode

SIZES = {"wide": (60, 110), "tall": (130, 70), "small": (20, 25)}


ALL_PASS = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0"]


OPTIONS = [*ALL_PASS, "--points-per-side", "4"]


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def record_of(mask):
    """A record of `SamAutomaticMaskGenerator`."""
    x0, y0, x1, y1 = mask_to_box(mask).tolist()
    height, width = mask.shape
    record = {"segmentation": rle_encode(mask), "area": int(mask.sum())}
    record |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "point_coords": [[0.0, 0.0]]}
    record |= {"crop_box": [0, 0, width, height], "predicted_iou": 1.0, "stability_score": 1.0}
    return record
