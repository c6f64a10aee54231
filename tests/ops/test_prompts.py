import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.prompts import PADDING, count_bucket, join_prompts, pad_axis

pytestmark = pytest.mark.optimized

POINTS = np.arange(12.0).reshape(2, 3, 2)
LABELS = np.array([[1, 0, 1], [0, -10, -10]])
BOXES = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]])


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_points_and_boxes_are_joined(asarray):
    points, labels = join_prompts(asarray(POINTS), asarray(LABELS), asarray(BOXES))
    assert type(points) is type(asarray(POINTS))
    assert points.dtype == np.float32
    assert labels.tolist() == [[1, 0, 1, 2, 3], [0, -10, -10, 2, 3]]
    assert points[0].tolist() == [[0, 1], [2, 3], [4, 5], [1, 2], [3, 4]]


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_points_alone_get_a_padding_point(asarray):
    points, labels = join_prompts(asarray(POINTS), asarray(LABELS), None)
    assert labels.tolist() == [[1, 0, 1, -1], [0, -10, -10, -1]]
    assert points[:, -1].tolist() == [[0, 0], [0, 0]]


def test_points_without_labels_are_foreground():
    _, labels = join_prompts(POINTS, None, None)
    assert labels.tolist() == [[1, 1, 1, -1]] * 2


@pytest.mark.usefixtures("unchecked")
def test_nothing_to_join():
    with pytest.raises(ValueError, match="neither points nor boxes"):
        join_prompts(None, None, None)
    with pytest.raises(TypeError, match="prompts are a list, expected an array"):
        join_prompts([[1, 2]], [1], None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("points", "labels", "boxes", "message"),
    [
        (POINTS, LABELS[:, :2], None, r"shapes \(2, 3, 2\), \(2, 2\) and None, expected one label"),
        (None, LABELS, BOXES, "expected one label for each point"),
        (POINTS[..., :1], None, None, r"expected points \(\.\.\., n, 2\)"),
        (POINTS, LABELS, BOXES[..., :3], r"expected boxes \(\.\.\., 4\)"),
        (POINTS, LABELS, BOXES[:1], "expected one box for the points of each prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_shapes(points, labels, boxes, message):
    with pytest.raises(ValueError, match=message):
        join_prompts(points, labels, boxes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((POINTS, LABELS + 0.7, None), "labels are float64, expected integers"),
        ((POINTS.astype(str), LABELS, None), "points are <U.*, expected numbers"),
        ((None, None, BOXES + 1j), "boxes are complex128, expected numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompts_are_numbers(prompts, message):
    with pytest.raises(TypeError, match=message):
        join_prompts(*prompts)


def test_boxes_alone():
    points, labels = join_prompts(None, None, BOXES)
    assert labels.tolist() == [[2, 3]] * 2
    assert points[1].tolist() == [[5, 6], [7, 8]]


def test_padding():
    padded = pad_axis(LABELS, 5, 1, PADDING)
    assert padded.tolist() == [[1, 0, 1, -10, -10], [0, -10, -10, -10, -10]]
    assert pad_axis(LABELS, 3, 1, PADDING) is LABELS


def test_buckets():
    assert [count_bucket(n) for n in (0, 1, 2, 3, 4, 5, 8, 9, 1000)] == [
        1, 1, 2, 4, 4, 8, 8, 16, 1024,
    ]  # fmt: skip
