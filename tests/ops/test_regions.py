import numpy as np
import pycocotools.mask
import pytest
import scipy.ndimage
import torch_reference
from logits import blobs

from sam_jax.ops.regions import mask_to_polygons, remove_small_regions

amg = torch_reference.import_reference("segment_anything").utils.amg


def ring(side, *, hole):
    mask = np.ones((side, side), bool)
    mask[hole:-hole, hole:-hole] = False
    return mask


def noise(seed, shape, smooth):
    noise = np.random.default_rng(seed).normal(size=shape)
    return scipy.ndimage.gaussian_filter(noise, smooth) > 0


POLYGONS = {
    "a pixel": (np.eye(1, dtype=bool), 1),
    "the last pixel": (np.array([[0, 0, 0], [0, 0, 1]], bool), 1),
    "two that touch at a corner": (np.eye(2, dtype=bool), 2),
    "a line": (np.eye(40, 60, 7, dtype=bool)[:, ::-1] | (np.arange(60) == 30), None),
    "two parts": (np.arange(60)[None] % 30 < np.full((40, 1), 20), 2),
    "a hole": (ring(41, hole=9), 1),
    "holes over each other": (~np.pad(np.tile(np.pad(np.ones((3, 5), bool), 2), (4, 3)), 3), 1),
    "a part in a hole": (ring(41, hole=5) | np.pad(ring(21, hole=3), 10), 2),
    "all": (np.ones((5, 7), bool), 1),
    "small noise": (noise(0, (9, 8), 0), None),
    "noise": (noise(1, (70, 90), 0), None),
    "smooth": (noise(2, (200, 300), 4), None),
    "nothing": (np.zeros((3, 4), bool), 0),
}


@pytest.mark.parametrize(("mask", "parts"), POLYGONS.values(), ids=POLYGONS)
def test_polygons(mask, parts):
    polygons = mask_to_polygons(mask)
    # Programs that read COCO expect lists of numbers with at least three points.
    assert all(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in polygons)
    assert all(type(number) is int for polygon in polygons for number in polygon)
    assert len(polygons) == (scipy.ndimage.label(mask)[1] if parts is None else parts)
    if polygons:
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *mask.shape))
        np.testing.assert_array_equal(pycocotools.mask.decode(rle), mask)


def test_a_cut_to_a_hole_lies_in_the_mask():
    """Outlines drawn by other programs then stay in the mask; the cut itself is vertical."""
    mask = noise(3, (90, 120), 3)
    for polygon in mask_to_polygons(mask):
        points = np.reshape(polygon, (-1, 2))
        for (x, y), (next_x, next_y) in zip(points, np.roll(points, -1, axis=0), strict=True):
            assert x == next_x or y == next_y
            if x == next_x:
                top, bottom = sorted((y, next_y))
                sides = np.pad(mask, ((0, 0), (1, 1)))[top:bottom, x : x + 2]
                assert sides.any(1).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("area", [1, 5, 30, 100, 10_000])
def test_small_regions(seed, area):
    mask = blobs((60, 70), seed, 1.5) > 1
    expected, holes = amg.remove_small_regions(mask, area, "holes")
    expected, islands = amg.remove_small_regions(expected, area, "islands")
    found, changed = remove_small_regions(mask, area)
    np.testing.assert_array_equal(found, expected)
    assert changed == (holes or islands)
    assert changed == (area > 1)


def test_small_regions_touch_by_corners():
    mask = np.eye(8, dtype=bool)
    assert remove_small_regions(mask, 8)[1] is False
    found, changed = remove_small_regions(mask, 9)  # too small, but kept as the largest
    assert changed
    np.testing.assert_array_equal(found, mask)


@pytest.mark.usefixtures("unchecked")
def test_only_masks_have_regions():
    for function in (mask_to_polygons, lambda mask: remove_small_regions(mask, 5)):
        with pytest.raises(ValueError, match=r"the mask is uint8 \(3, 3\), expected bool \(h, w\)"):
            function(np.eye(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="min_area is nan, expected a number"):
        remove_small_regions(np.eye(3) > 0, float("nan"))


@pytest.mark.parametrize("value", [True, False])
def test_no_regions(value):
    mask = np.full((5, 6), value)
    found, changed = remove_small_regions(mask, 10)
    np.testing.assert_array_equal(found, mask)
    assert not changed
