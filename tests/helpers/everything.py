"""Images, and options that keep every mask."""

import functools
from unittest import mock

import numpy as np
import pycocotools.mask
import torch_reference
from PIL import Image
from reference import SHALLOW, mask_iou, meta_sam, ours

from sam_jax import SamAutomaticMaskGenerator, SamPredictor
from sam_jax.automatic.device import chunk_sizes

amg = torch_reference.import_reference("segment_anything")

ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99}
GRID = np.random.default_rng(3).uniform(0, 1, (20, 2))


def random_image(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


# With random weights, every mask passes, and there are many: large, small and empty ones.
@functools.cache
def small():
    sam = meta_sam(SHALLOW)
    return sam, ours(sam, SHALLOW)


def segmentation(record):
    """A record's mask as an array, whatever its format."""
    rle = record["segmentation"]
    if isinstance(rle, np.ndarray):
        return rle
    if isinstance(rle["counts"], list):
        return amg.utils.amg.rle_to_mask(rle)
    return pycocotools.mask.decode(rle).astype(bool)


def assert_same_records(actual, expected, exact=False):
    """Checks that records have the same masks in the same order."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.keys() == e.keys()
        for name in ("point_coords", "crop_box"):
            assert a[name] == e[name]
        assert a["area"] == segmentation(a).sum()
        assert abs(a["area"] - e["area"]) <= (0 if exact else 1e-3 * e["area"])
        assert np.abs(np.array(a["bbox"]) - e["bbox"]).max() <= (0 if exact else 1)
        if exact:
            np.testing.assert_array_equal(segmentation(a), segmentation(e))
        assert type(a["area"]) is int
        assert all(type(n) is int for n in (*a["bbox"], *a["crop_box"]))
        assert all(type(n) is float for n in a["point_coords"][0])
        for name in ("predicted_iou", "stability_score"):
            assert type(a[name]) is float
            assert abs(a[name] - np.nan_to_num(e[name])) <= 1e-3
    masks = zip(map(segmentation, actual), map(segmentation, expected), strict=True)
    ious = [float(mask_iou(a, e)) for a, e in masks]
    assert min(ious, default=1) >= 0.99
    assert np.mean(np.array([1.0, *ious]) >= 0.999) >= 0.99


def generator(**options):
    return SamAutomaticMaskGenerator(small()[1], **{**ALL, "points_per_side": 6, **options})


def as_on_a_gpu(**options):
    """A generator with the chunk sizes of a GPU."""
    on_a_gpu = lambda points_per_batch, _platform: chunk_sizes(points_per_batch, "gpu")  # noqa: E731
    with mock.patch("sam_jax.automatic.generator.chunk_sizes", on_a_gpu):
        return generator(**options)


def found_in_an_image():
    """Results of a click and of everything mode."""
    image, predictor = random_image(70, 110), SamPredictor(small()[1])
    predictor.set_image(image)
    outputs = predictor.predict([[30, 40]], [1], return_logits=True)
    # Decodes some points one by one, some together.
    some = as_on_a_gpu(points_per_side=3, points_per_batch=4, output_mode="coco_rle")
    return [str(array.dtype) for array in outputs], outputs[1].tolist(), some.generate(image)
