"""Points, boxes and masks as prompts: their coordinates, nesting and errors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from processors import (
    SIZES,
    hf_fixture,  # noqa: F401
    processor_fixture,  # noqa: F401
    random_image,
    small_fixture,  # noqa: F401
    transforms_fixture,  # noqa: F401
)
from reference import mask_iou

from sam_jax.config import vit_b
from sam_jax.processing import SamProcessor

# --- points and boxes ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:input_.* outside", "ignore:.*label -1")
@pytest.mark.parametrize("size", [*SIZES, (333, 1023), (1365, 767)], ids=str)
def test_coordinates_match_meta_and_hf(processor, transforms, hf, size):
    rng = np.random.default_rng(0)
    coords = rng.uniform(-5, 1500, (7, 2))
    boxes = np.sort(rng.uniform(0, 1500, (3, 2, 2)), axis=1).reshape(3, 4)
    inputs = processor(random_image(*size), input_points=[coords], input_boxes=[boxes[:1]])
    resize = transforms.ResizeLongestSide(1024)
    expected = resize.apply_coords(coords, size).astype(np.float32)
    assert np.array_equal(inputs["input_points"][0, 0], expected)
    assert np.array_equal(
        expected, hf._normalize_coordinates(1024, coords, size).astype(np.float32)
    )
    inputs = processor(random_image(*size), input_boxes=[boxes])
    expected = resize.apply_boxes(boxes, size).astype(np.float32)
    assert np.array_equal(inputs["input_boxes"][0], expected)
    theirs = hf._normalize_coordinates(1024, boxes, size, is_bounding_box=True)
    assert np.array_equal(expected, theirs.astype(np.float32))


POINT, POINTS, BOX = [450, 100], [[450, 100], [20.5, 3]], [10, 20, 300.25, 200]


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts",
    [
        {"input_points": [[POINT]]},
        {"input_points": [POINTS]},
        {"input_points": [[POINTS, POINTS[::-1], POINTS]]},
        {"input_points": [POINTS], "input_labels": [[1, 0]]},
        {"input_points": [POINTS], "input_labels": [[[1, 0]]]},
        {"input_points": [[POINTS]], "input_labels": [[1, 0]]},
        {"input_points": [[[POINT], [POINT]]], "input_labels": [[[1], [0]]]},
        {"input_points": [[POINTS, POINTS]], "input_labels": [[[1, 0], [-1, -10]]]},
        {"input_boxes": [[BOX]]},
        {"input_boxes": [[BOX, BOX, [0, 0, 1, 1]]]},
        {"input_points": [[POINT]], "input_labels": [[1]], "input_boxes": [[BOX]]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:input_.* outside", "ignore:.*label -1")
@pytest.mark.parametrize("count", [1, 2])
def test_nesting_matches_hf(processor, hf, prompts, count):
    """Equals the reference with return_tensors="pt", for one image and for two."""
    images = [Image.fromarray(random_image(*size)) for size in [(300, 451), (200, 100)][:count]]
    prompts = {name: value * count for name, value in prompts.items()}
    expected = hf(images, return_tensors="pt", **prompts)
    found = processor(images, **prompts)
    dtypes = {"input_points": np.float32, "input_labels": np.int32, "input_boxes": np.float32}
    for name, dtype in dtypes.items():
        if name in expected:
            theirs = expected[name].numpy()
            assert found[name].dtype == dtype
            assert found[name].shape == theirs.shape
            assert np.array_equal(found[name], theirs.astype(dtype))
    if "input_points" in prompts and "input_labels" not in prompts:
        assert np.array_equal(found["input_labels"], np.ones(found["input_points"].shape[:3]))


def test_arrays_tuples_and_tensors_nest_as_lists(small):
    image = random_image(30, 40)
    points, labels, boxes = [[[[1, 2], [3, 4]]]], [[[1, 0]]], [[[1, 2, 3, 4]]]
    expected = small(image, input_points=points, input_labels=labels, input_boxes=boxes)
    for convert in (np.array, torch.tensor, jnp.array, lambda x: (tuple(map(tuple, x[0])),)):
        found = small(
            image,
            input_points=convert(points),
            input_labels=convert(labels),
            input_boxes=convert(boxes),
        )
        for name, value in expected.items():
            assert np.array_equal(found[name], value)
    found = small(image, input_points=[np.array(points[0][0])], input_labels=[np.array([1, 0])])
    assert np.array_equal(found["input_points"], expected["input_points"])
    assert np.array_equal(found["input_labels"], expected["input_labels"])


def test_ragged_points_of_two_images(processor, hf):
    """The only ragged case that the reference supports; it pads coordinates with -10."""
    images = [Image.fromarray(random_image(300, 451)), Image.fromarray(random_image(64, 64))]
    points, labels = [POINTS, [[30, 40]]], [[1, 0], [1]]
    expected = hf(
        images,
        input_points=points,
        input_labels=[[1, 0], [1]],
        point_pad_value=-10,
        return_tensors="pt",
    )
    found = processor(images, input_points=points, input_labels=labels)
    assert found["input_labels"].tolist() == expected["input_labels"].tolist()
    assert found["input_labels"].tolist() == [[[1, 0]], [[1, -10]]]
    real = found["input_labels"] != -10
    theirs = expected["input_points"].numpy()[real]
    assert np.array_equal(found["input_points"][real], theirs.astype(np.float32))
    assert not found["input_points"][~real].any()


def test_ragged_points_and_prompts(small):
    images = [random_image(96, 96), random_image(48, 48), random_image(96, 96)]
    inputs = small(
        images,
        input_points=[[[[1, 2], [3, 4]], [[5, 6]]], [[7, 8]], [[], [[1, 1], [2, 2], [3, 3]]]],
        input_labels=[[[1, 0], [0]], [1], [[], [0, 0, 1]]],
    )
    assert inputs["input_points"].shape == (3, 2, 3, 2)
    assert inputs["input_labels"].tolist() == [
        [[1, 0, -10], [0, -10, -10]],
        [[1, -10, -10], [-10, -10, -10]],
        [[-10, -10, -10], [0, 0, 1]],
    ]
    assert inputs["input_points"][0, 0].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert inputs["input_points"][1, 0].tolist() == [[14, 16], [0, 0], [0, 0]]
    assert not inputs["input_points"][1, 1].any()
    no_labels = small(images[:1], input_points=[[[[1, 2], [3, 4]], [[5, 6]]]])
    assert no_labels["input_labels"].tolist() == [[[1, 1], [1, -10]]]


@pytest.mark.filterwarnings("ignore:input_.* outside", "ignore:.*label -1")
def test_ragged_points_with_boxes(small):
    """Images without a prompt, and prompts without points."""
    images = [random_image(96, 96), random_image(96, 96)]
    inputs = small(
        images, input_points=[[[[1, 2]]], []], input_labels=[[[0]], []], input_boxes=[[BOX], []]
    )
    assert inputs["input_labels"].tolist() == [[[0]], [[-10]]]
    assert inputs["input_boxes"].tolist() == [[BOX], [[0] * 4]]
    inputs = small(images[0], input_points=[[[], []]], input_boxes=[[BOX, BOX]])
    assert inputs["input_points"].shape == (1, 2, 0, 2)
    inputs = small(images[0], input_points=[[[], [[3, 4]]]], input_boxes=[[BOX, BOX]])
    assert inputs["input_labels"].tolist() == [[[-10], [1]]]


def test_ragged_boxes(small):
    images = [random_image(96, 96), random_image(48, 48), random_image(96, 96)]
    boxes = small(images, input_boxes=[[[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4]], []])
    assert boxes["input_boxes"].tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        [[2, 4, 6, 8], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]


@pytest.mark.filterwarnings("ignore:input_.* outside", "ignore:.*label -1")
def test_edge_points_and_empty_boxes_are_accepted(small):
    prompts = {"input_points": [[[96, 96], [-3, 200]]], "input_boxes": [[[5] * 4]]}
    inputs = small(random_image(96, 96), **prompts)
    assert inputs["input_points"].tolist() == [[[[96, 96], [-3, 200]]]]
    assert inputs["input_boxes"].tolist() == [[[5, 5, 5, 5]]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_labels": [[1]]}, "input_labels are given without input_points"),
        (
            {"input_labels": [[1]], "input_boxes": [[BOX]]},
            "input_labels are given without input_points",
        ),
        *[
            (
                {"input_points": [[POINT]], "input_labels": [[label]]},
                rf"input_points\[0\]\[0\] have labels \[{float(label)}\]; known are 1 .*-10",
            )
            for label in (4, -3, 0.5, -11)
        ],
        (
            {"input_points": [POINTS], "input_labels": [[1]]},
            r"\[0\]\[0\] are 2 points, but their labels have shape \(1,\).*one label for each",
        ),
        (
            {"input_points": [[POINTS]], "input_labels": [[[[1, 0]]]]},
            r"are 2 points, but their labels have shape \(1, 2\)",
        ),
        (
            {"input_points": [[POINTS, POINTS]], "input_labels": [[1, 1]]},
            r"input_points\[0\] are 2 prompts, but input_labels\[0\] are for 1",
        ),
        (
            {"input_points": [[POINT]], "input_labels": [[1], [1]]},
            r"input_labels are for 2 images, but there are 1; expected them nested \[image\]",
        ),
        ({"input_points": [[[float("nan"), 3]]]}, r"not finite or too large: \[nan, 3.0\]$"),
        ({"input_points": [[[float("inf"), 3]]]}, r"input_points\[0\]\[0\] have .* not finite"),
        ({"input_points": [[POINT]], "input_labels": [[None]]}, r"labels of .* \[None\]"),
        (
            {"input_points": POINT},
            r"are for 2 images, but there are 1; .*\[prompt\]\[point\]\[xy\]",
        ),
        ({"input_points": 5}, "input_points are for no images, but there are 1"),
        ({"input_points": [POINT]}, r"have shape \(2,\), expected \(n, 2\): x and y"),
        ({"input_points": [[[[[1, 2]]]]]}, r"have shape \(1, 1, 2\), expected \(n, 2\)"),
        ({"input_points": [[[1, 2, 3]]]}, r"have shape \(1, 3\), expected \(n, 2\)"),
        ({"input_points": [[[1, 2], [3]]]}, r"are \[\[1, 2\], \[3\]\], expected numbers"),
        ({"input_points": [[["a", 2]]]}, r"are \[\['a', 2\]\], expected numbers"),
        ({"input_points": [[POINT], [POINT]]}, "input_points are for 2 images, but there are 1"),
        ({"input_boxes": [[BOX], [BOX]]}, "input_boxes are for 2 images, but there are 1"),
        (
            {"input_boxes": [[BOX, [30, 5, 10, 9]]]},
            r"\[0\] have \[30.0, 5.0, 10.0, 9.0\], expected x0, y0, x1, y1 with x0 <= x1",
        ),
        ({"input_boxes": [[[3, 9, 10, 5]]]}, "expected .*y0 <= y1"),
        ({"input_boxes": [BOX]}, r"input_boxes\[0\] have shape \(4,\), expected \(n, 4\)"),
        ({"input_boxes": BOX}, r"input_boxes are for 4 images.*nested \[image\]\[box\]\[4\]"),
        ({"input_boxes": [[[BOX]]]}, r"have shape \(1, 1, 4\), expected \(n, 4\)"),
        ({"input_boxes": [[[1, 2, 3]]]}, r"have shape \(1, 3\), expected \(n, 4\)"),
        ({"input_boxes": [[BOX, [1, 2]]]}, r"input_boxes\[0\] are .*, expected numbers in lists"),
        ({"input_boxes": [[[1, 2, 3, float("nan")]]]}, r"input_boxes\[0\] have .* not finite"),
        ({"input_boxes": [[]]}, "input_boxes are empty; leave them out"),
        (
            {"input_points": [[POINTS, POINTS]], "input_boxes": [[BOX]]},
            r"input_points\[0\] are 2 prompts, but there are 1 boxes in input_boxes\[0\]",
        ),
    ],
    ids=str,
)
def test_bad_prompts(small, prompts, message):
    with pytest.raises(ValueError, match=message):
        small(random_image(300, 451), **prompts)


def test_mismatched_prompts_of_one_of_two_images(small):
    """Padding to the largest number must not hide the mismatch."""
    with pytest.raises(ValueError, match=r"input_points\[0\] are 2 prompts, but there are 1 boxes"):
        small(
            [random_image(30, 40)] * 2,
            input_points=[[[[1, 1]], [[2, 2]]], [[1, 1]]],
            input_boxes=[[[1, 1, 2, 2]], [[1, 1, 2, 2], [3, 3, 4, 4]]],
        )


def test_none_is_an_image_without_prompts(small):
    images = [random_image(96, 96), random_image(96, 96)]
    for none in (None, []):
        inputs = small(images, input_points=[[[[1, 2]]], none], input_boxes=[[[1, 2, 3, 4]], none])
        assert inputs["input_labels"].tolist() == [[[1]], [[-10]]]
        assert inputs["input_boxes"].tolist() == [[[1, 2, 3, 4]], [[0] * 4]]
    with pytest.raises(ValueError, match="input_points are None for all images; leave them out"):
        small(images, input_points=[None, None])


# --- masks as prompts -----------------------------------------------------------------------------


def disk(height, width):
    y, x = np.mgrid[:height, :width]
    return ((y / height - 0.6) ** 2 + (x / width - 0.7) ** 2) < 0.07


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "resize", "image_size"),
    [
        *(((700, 1500), "longest_side", size) for size in (1024, 256)),
        ((451, 300), "longest_side", 1024),
        ((60, 90), "longest_side", 256),
        ((300, 451), "square", 1024),
        ((451, 300), "square", 256),
    ],
    ids=str,
)
def test_a_mask_becomes_logits_and_back(size, resize, image_size):
    config = dataclasses.replace(vit_b(), resize=resize, image_size=image_size)
    processor, mask = SamProcessor(config), disk(*size)
    logits = processor.mask_to_logits(mask)
    assert logits.shape == (1, config.mask_size, config.mask_size)
    assert logits.dtype == np.float32
    assert (logits.min(), logits.max()) == (-20, 20)
    (back,) = processor.post_process_masks([logits[None]], [size], [processor.input_size(size)])
    # Smaller masks have more edge pixels relative to their area.
    assert mask_iou(back[0, 0], mask) > (0.98 if image_size == 1024 else 0.95)
    for same in (mask.astype(np.uint8), 255 * mask.astype(np.uint8), mask.astype(np.float32)):
        assert np.array_equal(processor.mask_to_logits(same), logits)
        assert np.array_equal(processor.mask_to_logits(torch.tensor(same)), logits)
    both = processor.mask_to_logits([mask, ~mask])
    assert both.shape == (2, *logits.shape)
    assert np.array_equal(both[0], logits)


@pytest.mark.parametrize(("size", "cell"), [((256, 256), 4), ((120, 256), 4), ((512, 248), 8)])
def test_mask_prompts_are_averaged(size, cell):
    processor = SamProcessor(dataclasses.replace(vit_b(), image_size=256))
    mask = np.random.default_rng(0).random(size) < 0.5
    h, w = (side // cell for side in size)
    covered = mask.reshape(h, cell, w, cell).mean((1, 3))
    expected = np.full((1, 64, 64), -20.0)
    expected[0, :h, :w] = 20 * (2 * covered - 1)
    np.testing.assert_allclose(processor.mask_to_logits(mask), expected, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([[0, 1, 2]]), "mask has the values .*for a map of labels give map == label"),
        (np.array([[-3.5, 8.2]]), "for logits give logits > 0"),
        (np.zeros(4), r"shape \(4,\), expected \(h, w\)"),
        (np.zeros((60, 90, 1)), r"looks like \(h, w, channels\).*use mask\[..., 0\]"),
        (np.zeros((60, 90, 3), np.uint8), r"looks like \(h, w, channels\)"),
        ([[1, 2], [3]], "expected numbers in lists of equal lengths"),
    ],
)
def test_bad_masks(small, mask, message):
    with pytest.raises(ValueError, match=message):
        small.mask_to_logits(mask)
