import numpy as np
import pytest
from coco_examples import (
    CELL,
    RECTANGLES,
    SIDE,
    SIZE,
    H,
    W,
    assert_same_batch,
    rectangle,
    squares,
    take,
    transformed,
)
from reference import SMALL

from sam_jax.config import with_preprocessing
from sam_jax.ops.rle import rle_decode
from sam_jax.processing import SamProcessor
from sam_jax.training.datasets import (
    CocoInstances,
)
from sam_jax.training.loader import make_loader
from sam_jax.training.transform import ExampleTransform


def test_a_transformed_example(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    result = transformed(example)
    assert {name: x.shape for name, x in result.items()} == {
        "pixel_values": (SIZE, SIZE, 3),
        "masks": (4, SIDE, SIDE),
        "boxes": (4, 4),
        "valid": (4,),
        "dropped": (),
    }
    expected = SamProcessor(SMALL).preprocess(example["image"])
    np.testing.assert_array_equal(result["pixel_values"], expected)
    assert result["valid"].tolist() == [1, 1, 1, 0]
    scale = SIZE / W
    np.testing.assert_allclose(
        result["boxes"][:3], np.array(RECTANGLES) * scale - [0, 0, 1, 1], atol=1
    )
    for mask, (x0, y0, x1, y1) in zip(result["masks"], RECTANGLES, strict=False):
        ys, xs = np.nonzero(mask)
        cell = SIZE / SIDE / scale
        found = xs.min() * cell, ys.min() * cell, (xs.max() + 1) * cell, (ys.max() + 1) * cell
        np.testing.assert_allclose(found, (x0, y0, x1, y1), atol=2.2)
    assert not result["masks"][3].any()


def test_a_stretched_example(coco):
    """MedSAM's preprocessing scales the axes of image, masks and boxes separately."""
    example = CocoInstances(coco / "coco.json", coco)[0]
    config = with_preprocessing(SMALL, "medsam")
    result = ExampleTransform(config, 3, target_size=SIDE)(example, np.random.default_rng(0))
    expected = SamProcessor(config).preprocess(example["image"])
    np.testing.assert_array_equal(result["pixel_values"], expected)
    scale = SIZE / np.array([W, H, W, H])
    np.testing.assert_allclose(result["boxes"], np.array(RECTANGLES) * scale - [0, 0, 1, 1], atol=1)
    for mask, box in zip(result["masks"], RECTANGLES, strict=True):
        ys, xs = np.nonzero(mask)
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * SIZE / SIDE
        np.testing.assert_allclose(found, np.array(box) * scale, atol=2)  # a cell of the grid


def test_more_objects_than_max_objects(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    chosen = {transformed(example, seed, max_objects=1)["boxes"][0, 0] for seed in range(20)}
    assert len(chosen) == 3


def test_only_chosen_objects_are_decoded(coco, monkeypatch):
    example = CocoInstances(coco / "coco.json", coco)[0]
    every = {**example, "masks": np.asarray(example["masks"])}
    decoded = []
    spy = lambda rle: decoded.append(rle) or rle_decode(rle)  # noqa: E731
    monkeypatch.setattr("sam_jax.training.datasets.rle_decode", spy)
    for seed in range(3):
        assert_same_batch(
            transformed(example, seed, max_objects=1), transformed(every, seed, max_objects=1)
        )
    assert len(decoded) == 3
    np.testing.assert_array_equal(list(example["masks"]), every["masks"])
    np.testing.assert_array_equal(example["masks"][1:], every["masks"][1:])


def test_objects_too_small_for_the_grid_are_dropped(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    example["masks"] = np.array(example["masks"])
    example["masks"][1] = rectangle(3, 3, 4, 4)
    assert transformed(example)["valid"].tolist() == [1, 1, 0, 0]
    assert transformed(example, target_size=SIZE)["valid"].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("target_size", [SIDE, SIZE])
@pytest.mark.parametrize("options", [{"flip": 1.0}, {"scale_range": (0.3, 2.0)}], ids=str)
def test_augmented_masks_lie_on_their_objects(options, target_size):
    """The object is white: the image shows where the mask has to be."""
    mask = rectangle(20, 10, 52, 40, (60, 90))  # not symmetric: its mirror image lies elsewhere
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    example = {"image": image, "masks": mask[None]}
    gray = SamProcessor(SMALL).normalize(np.full((1, 1, 3), 128, np.uint8))[0, 0]
    seen = set()
    for seed in range(25):
        result = transformed(example, seed, target_size=target_size, **options)
        if not result["valid"][0]:
            continue
        cell = SIZE // target_size
        shown = (result["pixel_values"] >= gray).all(-1)
        shown = shown.reshape(target_size, cell, target_size, cell).mean((1, 3)) >= 0.5
        both, either = (shown & result["masks"][0]).sum(), (shown | result["masks"][0]).sum()
        assert both / either > 0.85
        seen.add(int(result["boxes"][0, 0]))
    assert len(seen) == 1 if "flip" in options else len(seen) > 10


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_objects": 0}, "max_objects is 0, expected a whole number of at least 1"),
        ({"max_objects": 2.0}, "max_objects is 2.0, expected a whole number"),
        ({"target_size": 0}, "target_size is 0, expected a whole number of at least 1"),
        ({"target_size": SIDE + 1}, f"target_size is {SIDE + 1}, expected a divisor of"),
        ({"flip": 1.5}, "flip is 1.5, expected 0 to 1"),
        ({"flip": None}, "flip is None, expected a number"),
        ({"scale_range": (0, 1)}, r"scale_range is \(0, 1\), expected two numbers above 0"),
        ({"scale_range": (2.0, 1.0)}, r"scale_range is \(2.0, 1.0\), expected two numbers"),
        ({"scale_range": (1,)}, r"scale_range is \(1,\), expected two numbers"),
        ({"scale_range": (10, 200)}, r"scale_range is \(10, 200\), .* at most 10"),
        ({"scale_range": 2}, "scale_range is 2, expected two numbers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleTransform(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"image": np.zeros((H, W, 3), np.uint8)}, "the example has 'image', but not 'masks'"),
        ({}, "the example has nothing, but not 'image' and 'masks'"),
    ],
)
def test_incomplete_examples(example, message):
    with pytest.raises(KeyError, match=message):
        transformed(example)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (np.zeros((2, H, W), np.uint8), TypeError, "the masks are uint8, expected bool"),
        (
            np.zeros((2, H, W + 1), bool),
            ValueError,
            r"shape \(2, 55, 71\), expected .* \[n, 55, 70\]",
        ),
        (np.zeros((H, W), bool), ValueError, r"shape \(55, 70\), expected .* \[n, 55, 70\]"),
        ([[[True]]], TypeError, "the masks are a list, expected an array, bool"),
    ],
)
def test_masks_that_do_not_match_the_image(masks, error, message):
    with pytest.raises(error, match=message):
        transformed({"image": np.zeros((H, W, 3), np.uint8), "masks": masks})


def test_images_are_preprocessed_as_in_the_predictor(coco):
    """Even an image with transparency, of which only the colors are resized."""
    example = dict(squares(3 * CELL))
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (*example["image"].shape[:2], 4), np.uint8)
    found = transformed({**example, "image": rgba})["pixel_values"]
    np.testing.assert_array_equal(found, SamProcessor(SMALL).preprocess(rgba))
    with pytest.raises(TypeError, match="float64"):
        transformed({**example, "image": rgba[..., :3] / 255})


def test_objects_that_are_too_small_are_counted():
    example = squares(3 * CELL, CELL, CELL // 2, 1)
    for options, used, dropped in (({}, 2, 2), ({"target_size": SIZE}, 3, 1)):
        result = transformed(example, **options)
        assert (result["valid"].sum(), result["dropped"]) == (used, dropped)
    # Objects outside a crop do not count as too small.
    found = [transformed(squares(3 * CELL), seed, scale_range=(3, 3)) for seed in range(20)]
    assert {float(result["valid"].sum()) for result in found} == {0, 1}
    assert all(result["dropped"] == 0 for result in found)
    assert transformed(squares())["dropped"] == 0
    batch = take(
        make_loader([example], ExampleTransform(SMALL, 4, target_size=SIDE), batch_size=2, seed=0),
        1,
    )[0]
    assert batch["dropped"].tolist() == [2, 2]
