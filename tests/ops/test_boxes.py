import numpy as np
import pytest
import torch
import torch_reference
from logits import blobs

from sam_jax.ops.boxes import (
    box_iou,
    build_point_grid,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_box,
    non_maximum_suppression,
)

amg = torch_reference.import_reference("segment_anything").utils.amg
batched_nms = torch_reference.import_reference(
    "segment_anything"
).automatic_mask_generator.batched_nms


def random_boxes(count, seed=0, size=100):
    corners = np.random.default_rng(seed).integers(0, size, (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_point_grid(n):
    np.testing.assert_array_equal(build_point_grid(n), amg.build_point_grid(n))


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (100, 100), (3000, 4000), (37, 500)])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("overlap", [0.0, 512 / 1500, 0.7])
def test_crop_boxes(size, layers, overlap):
    boxes, which = generate_crop_boxes(size, layers, overlap)
    expected = amg.generate_crop_boxes(size, layers, overlap)
    # If crops overlap a lot, the reference's last crops may be empty; sam_jax leaves these out.
    kept = [i for i, (x0, y0, x1, y1) in enumerate(expected[0]) if x0 < x1 and y0 < y1]
    assert [list(box) for box in boxes] == [expected[0][i] for i in kept]
    assert which == [expected[1][i] for i in kept]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (5, 5)])
def test_crops_of_tiny_images_are_not_empty(size):
    boxes, layers = generate_crop_boxes(size, 3, 512 / 1500)
    assert len(boxes) == len(layers) > 1
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= size[1]
        assert 0 <= y0 < y1 <= size[0]


@pytest.mark.parametrize("crop", [(0, 0, 400, 300), (100, 50, 300, 250), (0, 100, 200, 300)])
def test_near_the_edge_of_a_crop(crop):
    x0, y0 = crop[:2]
    boxes = random_boxes(500, size=120) + np.array([0, 0, 80, 80])
    expected = amg.is_box_near_crop_edge(torch.tensor(boxes), list(crop), [0, 0, 400, 300])
    found = is_box_near_crop_edge(boxes + np.array([x0, y0, x0, y0]), crop, (300, 400))
    np.testing.assert_array_equal(found, expected)
    assert found.any() == (crop != (0, 0, 400, 300))


def test_iou():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30]])
    np.testing.assert_allclose(box_iou(boxes[0], boxes), [1, 0.5, 25 / 175, 0])
    assert np.isnan(box_iou(np.zeros(4), np.zeros((1, 4)))).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_non_maximum_suppression(threshold, ties):
    boxes = random_boxes(400)
    scores = np.random.default_rng(1).uniform(size=400).astype(np.float32)
    if ties:
        scores = scores.round(1)
    kept = non_maximum_suppression(boxes, scores, iou_threshold=threshold)
    expected = batched_nms(
        torch.tensor(boxes).float(), torch.tensor(scores), torch.zeros(400), threshold
    )
    np.testing.assert_array_equal(kept, expected)
    # The definition: boxes are kept in order of score unless they overlap a better kept one.
    assert (np.diff(scores[kept]) <= 0).all()
    for i in range(len(boxes)):
        earlier = [k for k in kept if (-scores[k], k) < (-scores[i], i)]
        overlaps = (box_iou(boxes[i], boxes[earlier]).astype(float) > threshold).any()
        assert overlaps == (i not in kept)


@pytest.mark.parametrize(("threshold", "kept"), [(0.8, [0]), (0.6, [0]), (0.5, [0, 1])])
def test_iou_equal_to_the_threshold(threshold, kept):
    """Like torchvision, compares a float32 IoU with a double: an IoU rounded up is larger."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, round(10 * threshold)]])
    assert box_iou(boxes[0], boxes)[1] == np.float32(threshold)
    found = non_maximum_suppression(boxes, np.array([1, 0.5]), iou_threshold=threshold)
    assert found.tolist() == kept


def test_equal_boxes_and_scores_keep_the_first():
    boxes = np.tile(np.array([[1, 2, 30, 40]]), (5, 1))
    assert non_maximum_suppression(boxes, np.ones(5, np.float32), iou_threshold=0.7).tolist() == [0]


@pytest.mark.usefixtures("unchecked")
def test_each_box_has_a_score():
    with pytest.raises(ValueError, match=r"there are 1 scores, but boxes of shape \(2, 4\)"):
        non_maximum_suppression(np.zeros((2, 4)), np.zeros(1), iou_threshold=0.5)
    with pytest.raises(ValueError, match=r"the mask is bool \(2, 3, 4\), expected bool \(h, w\)"):
        mask_to_box(np.zeros((2, 3, 4), bool))


def test_nothing_and_empty_boxes():
    kept = non_maximum_suppression(np.zeros((0, 4)), np.zeros(0, np.float32), iou_threshold=0.7)
    assert kept.tolist() == []
    kept = non_maximum_suppression(np.zeros((3, 4)), np.zeros(3, np.float32), iou_threshold=0.7)
    assert kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_box(seed):
    mask = blobs((37, 53), seed, 2) > 4
    expected = amg.batched_mask_to_box(torch.tensor(mask)[None])[0]
    np.testing.assert_array_equal(mask_to_box(mask), expected)
    assert mask_to_box(mask & False).tolist() == [0, 0, 0, 0]
    full = np.zeros((8, 9), bool)
    full[:5, :6] = True
    assert mask_to_box(full).tolist() == [0, 0, 5, 4]
