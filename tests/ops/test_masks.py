import jax
import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
import torch_reference
from reference import tensor

from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.mask_statistics import make_upsampler, mask_statistics
from sam_jax.ops.regions import mask_to_polygons, remove_small_regions
from sam_jax.ops.rle import rle_area, rle_compress, rle_decode, rle_encode, rle_uncompress

pytestmark = pytest.mark.optimised

amg = torch_reference.import_reference("segment_anything").utils.amg


def blobs(shape, seed=0, smooth=5.0):
    """Smooth logits, some above zero and some below."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return (20 * scipy.ndimage.gaussian_filter(noise, smooth) * smooth).astype(np.float32)


LOGITS = {
    "blobs": blobs((256, 256)),
    "all": np.full((256, 256), 5, np.float32),
    "none": np.full((256, 256), -5, np.float32),
    "between the thresholds": np.full((256, 256), 0.5, np.float32),
    "a speck": np.where(np.arange(65536).reshape(256, 256) == 65536 // 3, 4, -4).astype(np.float32),
    "a corner": np.where(np.add.outer(np.arange(256), np.arange(256)) > 480, 4.0, -4.0).astype(
        np.float32
    ),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("size", [(500, 333), (64, 256), (700, 1024), (7, 90), (1200, 900)])
@pytest.mark.parametrize("limits", [(0.0, 1.0), (0.5, 0.25), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("tile", [64, 256])
def test_statistics(logits, size, limits, tile):
    threshold, offset = limits
    scale = 1024 / max(size)
    input_size = [int(n * scale + 0.5) for n in size]
    found = jax.jit(mask_statistics)(
        jnp.asarray(logits),
        jax.device_put(make_upsampler(256, 1024, tuple(input_size), size, 2048, tile)),
        jnp.float32(threshold),
        jnp.float32(offset),
    )
    full = F.interpolate(tensor(logits)[None, None], (1024, 1024), mode="bilinear")
    full = full[..., : input_size[0], : input_size[1]]
    full = F.interpolate(full, size, mode="bilinear")[0]
    stability = amg.calculate_stability_score(full, threshold, offset)[0].item()
    assert found.box.tolist() == amg.batched_mask_to_box(full > threshold)[0].tolist()
    # A pixel whose logit is a threshold but for rounding may fall on either side.
    at_edges = 3 + 2e-5 * full.numel()
    for counted, level in ((found.intersection, offset), (found.union, -offset)):
        assert abs(int(counted) - (full > threshold + level).sum().item()) <= at_edges
    if found.union:
        assert abs(int(found.intersection) / int(found.union) - stability) <= 1e-3
    else:
        assert np.isnan(stability)


# pycocotools' decoder is not up to numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("seed", range(3))
def test_run_lengths(seed):
    some = blobs((37, 53), seed, 2) > 0
    for mask in (some, ~some, some & False, some | True, some.T, some[:1], some[:, :1]):
        rle = rle_encode(mask)
        (expected,) = amg.mask_to_rle_pytorch(torch.tensor(np.ascontiguousarray(mask))[None])
        assert rle == expected
        assert all(type(n) is int for n in (*rle["counts"], *rle["size"]))
        np.testing.assert_array_equal(rle_decode(rle), mask)
        assert rle_area(rle) == mask.sum()
        assert rle_uncompress(rle_compress(rle)) == rle
        compressed = pycocotools.mask.frPyObjects(rle, *rle["size"])
        np.testing.assert_array_equal(pycocotools.mask.decode(compressed), mask)


@pytest.mark.parametrize("seed", range(3))
def test_box(seed):
    mask = blobs((37, 53), seed, 2) > 4
    expected = amg.batched_mask_to_box(torch.tensor(mask)[None])[0]
    np.testing.assert_array_equal(mask_to_box(mask), expected)
    assert mask_to_box(mask & False).tolist() == [0, 0, 0, 0]
    full = np.zeros((8, 9), bool)
    full[:5, :6] = True
    assert mask_to_box(full).tolist() == [0, 0, 5, 4]


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
    # Whatever reads COCO expects lists of numbers, three points or more.
    assert all(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in polygons)
    assert all(type(number) is int for polygon in polygons for number in polygon)
    assert len(polygons) == (scipy.ndimage.label(mask)[1] if parts is None else parts)
    if polygons:
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *mask.shape))
        np.testing.assert_array_equal(pycocotools.mask.decode(rle), mask)


def test_a_cut_to_a_hole_lies_in_the_mask():
    """So that a program that draws outlines draws it nowhere else, and only up and down."""
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
    found, changed = remove_small_regions(mask, 9)  # too small, but the largest
    assert changed
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("value", [True, False])
def test_no_regions(value):
    mask = np.full((5, 6), value)
    found, changed = remove_small_regions(mask, 10)
    np.testing.assert_array_equal(found, mask)
    assert not changed


@pytest.mark.parametrize("counts", ["\x00", "é", "o" * 40, b"\xff"])
def test_strings_that_are_no_run_lengths(counts):
    with pytest.raises(ValueError, match="is no string of COCO's run lengths"):
        rle_uncompress({"size": [5, 7], "counts": counts})


@pytest.mark.parametrize("counts", ["o", "1o", b"0Po"])
def test_a_string_that_ends_within_a_number(counts):
    with pytest.raises(ValueError, match="o' ends within a number of COCO's run lengths"):
        rle_uncompress({"size": [5, 7], "counts": counts})


@pytest.mark.parametrize("counts", [[], [9], [30, 6], [40, -5]])
def test_run_lengths_that_do_not_fill_the_mask(counts):
    message = rf"their sum is {sum(counts)} and the smallest .*, expected 5 x 7 and none below 0"
    with pytest.raises(ValueError, match=message):
        rle_decode({"size": [5, 7], "counts": counts})
