from concurrent.futures import Future

import numpy as np

from sam_jax.automatic.records import Crop, MaskRecord, Survivors, xywh

IMAGE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
CROP = Crop((20, 30), (4, 5, 14, 17), np.array([[0.5, 0.25], [1, 0]]), IMAGE, None, [])


def test_pixels_and_points_of_a_crop():
    """Boxes are x0, y0, x1, y1, sizes (h, w), and points (x, y) in the crop."""
    assert CROP.size == (12, 10)
    np.testing.assert_array_equal(CROP.pixels, IMAGE[5:17, 4:14])
    np.testing.assert_array_equal(CROP.points, [[5, 3], [10, 0]])


def test_points_are_in_the_images_coordinates():
    survivors = Survivors(
        point=np.array([1, 0]),
        mask_index=np.array([2, 1]),
        iou=np.float32([0.5, 0.75]),
        stability=np.float32([1, 0.25]),
        box=np.array([[0, 0, 1, 1], [6, 7, 9, 11]]),
    )
    record = MaskRecord.of(CROP, survivors, 1, rle=Future())
    assert record.point == [4 + 5, 5 + 3]
    assert (record.predicted_iou, record.stability_score) == (0.75, 0.25)
    assert xywh(record.box) == [6, 7, 3, 4]
