import numpy as np
import pytest

from sam_jax.automatic.device import Measured
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop, MaskRecord
from sam_jax.automatic.selection import Candidates, select
from sam_jax.errors import NonFiniteError
from sam_jax.ops.mask_statistics import MaskStatistics

A, NEAR_A, B = (80, 30, 110, 60), (81, 30, 110, 60), (70, 70, 90, 90)


def crop(box=(0, 0, 200, 100), found=()):
    return Crop((100, 200), box, np.zeros((2, 2)), None, None, list(found))


def measured(boxes, iou, stability=None):
    """Measurements of two points with three masks each, and of padding."""
    iou, shape = np.float32(iou).reshape(2, 3), (2, 3)
    union = np.full(shape, 1000)
    inter = union if stability is None else np.round(1000 * np.reshape(stability, shape))
    statistics = MaskStatistics(np.array(boxes).reshape(2, 3, 4), inter.astype(int), union)
    return Measured(padded(iou), MaskStatistics(*map(padded, statistics)))


def selected(crop, measured, **options):
    options = MaskGenerationOptions(**options)
    return select(crop, Candidates.of(crop, np.arange(2), measured, options), options)


def padded(array):
    return np.concatenate([array, np.full_like(array[:1], 7)])


def chosen(survivors):
    return list(zip(survivors.point.tolist(), survivors.mask_index.tolist(), strict=True))


def test_thresholds():
    """A predicted IoU must be larger than its threshold; a stability may equal it."""
    boxes = [(k, 0, k, 90) for k in range(0, 180, 30)]
    iou, stability = [0.88, 0.89, 0.9, 0.9, 0.95, 0.2], [1, 0.95, 0.949, 0.96, 1, 1]
    found = selected(crop(), measured(boxes, iou, stability))
    assert chosen(found) == [(1, 1), (1, 0), (0, 1)]  # by predicted IoU
    np.testing.assert_allclose(found.stability, [1, 0.96, 0.95], rtol=1e-6)
    np.testing.assert_array_equal(found.box, [boxes[4], boxes[3], boxes[1]])
    everything = {"pred_iou_thresh": 0, "stability_score_thresh": 0}
    assert len(selected(crop(), measured(boxes, iou, stability), **everything).point) == 6


def test_duplicates():
    boxes, iou = [A, NEAR_A, B, B, A, NEAR_A], [0.9, 0.95, 0.9, 0.91, 0.92, 0.93]
    found = selected(crop(), measured(boxes, iou))
    assert chosen(found) == [(0, 1), (1, 0)]
    both = selected(crop(), measured(boxes, iou), box_nms_thresh=1.0)
    assert len(both.point) == 6


def test_masks_of_an_earlier_crop_win():
    """Boxes are those of the image; masks that a crop's edge cuts are left out."""
    earlier = MaskRecord({}, np.array(A), 0.89, 1.0, [0, 0], (0, 0, 50, 50))
    box = (40, 0, 150, 100)
    shifted = np.array([A, NEAR_A, B, B, A, (45, 40, 60, 60)]) - [40, 0, 40, 0]
    found = selected(crop(box, [earlier]), measured(shifted, [0.99] * 6), crop_n_layers=1)
    assert chosen(found) == [(0, 2)]
    np.testing.assert_array_equal(found.box, [B])
    found = selected(crop(box), measured(shifted, [0.99] * 6), crop_n_layers=1)
    assert chosen(found) == [(0, 0), (0, 2)]


def test_predicted_ious_that_are_not_finite():
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        selected(crop(), measured([A] * 6, [0.9] * 5 + [np.nan]))
