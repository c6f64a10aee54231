"""Compares predictions of `SamPredictor` with Meta's, and counts compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from predictors import (
    BOX,
    LABELS,
    POINTS,
    SIDE,
    SIZE,
    TOLERANCE,
    assert_same,
    low_res_logits,
    model,
    predictor_fixture,  # noqa: F401
    random_image,
    reference_fixture,  # noqa: F401
    reference_predictor,
    torch_model,
)
from reference import SHALLOW, assert_close, mask_iou, meta_sam, ours

from sam_jax.config import with_preprocessing
from sam_jax.ops.prompts import count_bucket
from sam_jax.ops.resize import size_bucket
from sam_jax.predictor import SamPredictor

PROMPTS = {
    "point": {"point_coords": POINTS[:1], "point_labels": LABELS[:1]},
    "points": {"point_coords": POINTS, "point_labels": LABELS},
    "background": {"point_coords": POINTS[:1], "point_labels": np.array([0])},
    "box": {"box": BOX},
    "points_and_box": {"point_coords": POINTS[1:], "point_labels": LABELS[1:], "box": BOX},
    "mask": {"mask_input": low_res_logits()},
    "point_and_mask": {
        "point_coords": POINTS[:1],
        "point_labels": LABELS[:1],
        "mask_input": low_res_logits(),
    },
    "box_and_mask": {"box": BOX, "mask_input": low_res_logits()},
    "all": {
        "point_coords": POINTS[1:],
        "point_labels": LABELS[1:],
        "box": BOX,
        "mask_input": low_res_logits(),
    },
    "nothing": {},
    "no_points": {"point_coords": np.zeros((0, 2)), "point_labels": np.zeros(0, int)},
    "off_the_picture": {"point_coords": np.array([[-20.0, 300.0]]), "point_labels": LABELS[:1]},
}


# --- compilations -------------------------------------------------------------------------------


def test_number_of_compilations(compilations):
    """Many image sizes and numbers of points need only a few programs."""
    rng = np.random.default_rng(0)
    sizes = [tuple(int(n) for n in rng.integers(20, 500, 2)) for _ in range(10)]
    counts = 1, 2, 3, 7, 8, 10
    # No other test has a model of this size, so none of its programs is compiled yet.
    config = dataclasses.replace(SHALLOW, image_size=80)
    sam, images = ours(meta_sam(config), config), [random_image(*size) for size in sizes]
    compilations.clear()
    predictor = SamPredictor(sam)
    for image in images:
        predictor.set_image(image)
    assert len(compilations) == 1  # the encoder
    for size, image in zip(sizes, images, strict=True):
        predictor.set_image(image)
        for count in counts:
            coords = rng.uniform(0, 1, (count, 2)) * size[::-1]
            masks, _, _ = predictor.predict(coords, np.ones(count, int))
            assert masks.shape == (3, *size)

    # Plus 1, since every list without a box ends with a point labeled -1.
    lengths = {count_bucket(count + 1) for count in counts}
    shapes = {tuple(map(size_bucket, size)) for size in sizes}
    assert len(compilations) == 1 + len(lengths) + len(shapes)
    assert len(lengths) == 4
    assert len(shapes) < len(set(sizes)) == 10


@pytest.mark.slow
def test_number_of_compilations_of_other_methods(compilations):
    """After the first call, nothing compiles for another image or prompt of the same buckets."""

    def everything(size, count, points):
        predictor = SamPredictor(sam)
        predictor.set_image(random_image(*size), "BGR")
        predictor.set_image_embedding(predictor.get_image_embedding(), size)
        for logits in (False, True):
            predictor.predict_batch(
                np.ones((count, points, 2)),
                np.ones((count, points), int),
                boxes=np.ones((count, 4)),
                mask_input=low_res_logits(count)[:, None],
                return_logits=logits,
            )
            predictor.predict(box=[1, 2, 3, 4], return_logits=logits)
            predictor.predict(return_logits=logits)
        masks = predictor.processor.post_process_masks(
            jax.device_put(low_res[:, :count]), [size] * 2, [predictor.input_size] * 2
        )
        assert masks[1].shape == (count, 3, *size)

    sam, low_res = model(), np.zeros((2, 4, 3, SIDE, SIDE), np.float32)
    everything((100, 120), 4, 2)
    compilations.clear()
    everything((250, 33), 3, 1)
    assert compilations == []


# --- against the reference ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "multimask"),
    [*((name, True) for name in PROMPTS), ("point", False), ("box", False), ("all", False)],
)
@pytest.mark.filterwarnings("ignore:.* outside")
def test_predict(predictor, reference, prompt, multimask):
    for logits in (False, True):
        options = {"multimask_output": multimask, "return_logits": logits}
        expected = reference.predict(**PROMPTS[prompt], **options)
        assert_same(predictor.predict(**PROMPTS[prompt], **options), expected, logits)


def test_a_stretched_image():
    """MedSAM's preprocessing, against Meta's predictor given preprocessed pixels."""
    config = with_preprocessing(SHALLOW, "medsam")
    predictor = SamPredictor(ours(torch_model(), config))
    image = random_image()
    predictor.set_image(image)
    assert predictor.input_size == (96, 96)
    small = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR))
    pixels = (small - small.min()) / (small.max() - small.min())
    reference = reference_predictor()
    mean, std = reference.model.pixel_mean, reference.model.pixel_std
    reference.model.pixel_mean, reference.model.pixel_std = 0 * mean, 0 * std + 1
    try:
        reference.set_torch_image(torch.tensor(pixels).float().permute(2, 0, 1)[None], SIZE)
    finally:
        reference.model.pixel_mean, reference.model.pixel_std = mean, std
    points = torch.tensor(POINTS / [SIZE[1], SIZE[0]] * 96, dtype=torch.float32)[None]
    expected = reference.predict_torch(points, torch.tensor(LABELS)[None], return_logits=True)
    actual = predictor.predict(POINTS, LABELS, return_logits=True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e[0], TOLERANCE)


def test_lists_work_like_arrays(predictor):
    points, labels = POINTS[1:], LABELS[1:]
    expected = predictor.predict(points, labels, BOX)
    for box in (BOX.tolist(), tuple(BOX), BOX[None]):
        for found, array in zip(
            predictor.predict(points.tolist(), labels.tolist(), box), expected, strict=True
        ):
            assert np.array_equal(found, array)


# Wide, tall, square, of the model's size, larger, a pixel wide.
@pytest.mark.parametrize(
    "size", [(40, 61), (61, 40), (50, 50), (96, 96), (333, 257), (60, 1), (1, 60)], ids=str
)
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_set_image(size, image_format):
    image = random_image(*size)
    reference, predictor = reference_predictor(), SamPredictor(model())
    reference.set_image(image, image_format)
    predictor.set_image(image, image_format)
    assert_close(predictor.get_image_embedding(), reference.get_image_embedding(), TOLERANCE)
    assert predictor.original_size == reference.original_size
    assert predictor.input_size == reference.input_size
    coords = np.array([[size[1] / 3, size[0] / 2], [size[1] - 1, 0]])
    expected = reference.predict(coords, np.array([1, 0]), return_logits=True)
    assert_same(predictor.predict(coords, [1, 0], return_logits=True), expected, logits=True)


def test_results_have_names(predictor):
    for result in (predictor.predict(POINTS, LABELS), predictor.predict_batch([POINTS], [LABELS])):
        masks, scores, logits = result
        assert masks is result.masks
        assert scores is result.scores
        assert logits is result.logits
        assert masks.shape[:-2] == scores.shape == logits.shape[:-2]


def test_results_are_writable(predictor):
    for result in predictor.predict(POINTS, LABELS):
        assert result.flags.writeable
        assert result.base is None or result.base.size == result.size  # holds no padding


def test_jax_arrays_compile_no_other_programs(predictor, compilations):
    points, labels = np.tile(POINTS[:, None], (1, 3, 1)), np.tile(LABELS[:, None], (1, 3))
    expected = predictor.predict_batch(points, labels)
    given = jnp.asarray(points), jnp.asarray(labels)
    compilations.clear()
    for actual, exact in zip(predictor.predict_batch(*given), expected, strict=True):
        assert np.array_equal(actual, exact)
    assert compilations == []


def test_bgr_is_rgb_reversed():
    predictor = SamPredictor(model())
    predictor.set_image(random_image()[..., ::-1], "BGR")
    expected = SamPredictor(model())
    expected.set_image(random_image())
    assert np.array_equal(predictor.get_image_embedding(), expected.get_image_embedding())


def test_mask_of_an_earlier_prediction_refines(predictor, reference):
    results = []
    for each in (predictor, reference):
        _, scores, low_res = each.predict(POINTS[:1], LABELS[:1])
        best = low_res[np.argmax(scores)][None]
        results.append(each.predict(POINTS, LABELS, mask_input=best))
    assert_same(*results)


# --- many prompts at once -----------------------------------------------------------------------


def batch_prompts(count, kind, seed=3):
    rng = np.random.default_rng(seed)
    height, width = SIZE
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1)
    everything = {
        "point_coords": rng.uniform(0, 1, (count, 2, 2)) * (width, height),
        "point_labels": rng.integers(0, 2, (count, 2)),
        "boxes": (corners * (width, height)).reshape(count, 4),
        "mask_input": low_res_logits(count)[:, None],
    }
    names = {
        "points": ["point_coords", "point_labels"],
        "boxes": ["boxes"],
        "points_and_boxes": ["point_coords", "point_labels", "boxes"],
        "all": ["point_coords", "point_labels", "boxes", "mask_input"],
    }[kind]
    return {name: everything[name] for name in names}


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("points", 1),
        ("points", 3),
        ("points", 5),
        ("points", 9),
        ("points_and_boxes", 3),
        ("boxes", 3),
        ("all", 3),
    ],
)
def test_predict_batch(predictor, reference, kind, count):
    prompts = batch_prompts(count, kind)
    found = predictor.predict_batch(**prompts)

    scaled = {name: torch.tensor(value) for name, value in prompts.items()}
    scaled = {"point_coords": None, "point_labels": None} | scaled
    if "point_coords" in prompts:
        coords = reference.transform.apply_coords_torch(scaled["point_coords"], SIZE)
        scaled["point_coords"] = coords
    if "boxes" in prompts:
        scaled["boxes"] = reference.transform.apply_boxes_torch(scaled["boxes"], SIZE)
    expected = reference.predict_torch(**scaled)
    assert_same(found, expected)
    # The same, with coordinates in pixels of the model's input.
    arrays = {k: None if v is None else v.numpy() for k, v in scaled.items()}
    assert_same(predictor.predict_torch(**arrays), expected)

    for i in range(count):
        alone = {k.removesuffix("es") if k == "boxes" else k: v[i] for k, v in prompts.items()}
        masks, scores, low_res = predictor.predict(**alone)
        assert mask_iou(found[0][i], masks).min() >= 0.9999
        assert_close(found[1][i], scores)
        assert_close(found[2][i], low_res)


def test_one_mask_for_several_prompts(predictor, reference):
    prompts = batch_prompts(3, "all")
    boxes, mask = prompts["boxes"], prompts["mask_input"][:1]
    found = predictor.predict_batch(boxes=boxes, mask_input=mask)
    scaled = reference.transform.apply_boxes_torch(torch.tensor(boxes), SIZE)
    assert_same(found, reference.predict_torch(None, None, scaled, torch.tensor(mask)))


def test_ragged_points(predictor, reference):
    coords = [POINTS[:1], POINTS, np.zeros((0, 2)), POINTS[1:]]
    labels = [[1], [1, 0, 1], [], [0, 1]]
    found = predictor.predict_batch(coords, labels)
    assert found[0].shape == (4, 3, *SIZE)
    for i in range(4):
        expected = reference.predict(coords[i], np.array(labels[i]))
        assert_same([part[i] for part in found], expected)


def test_ragged_points_with_boxes_and_logits(predictor):
    coords, labels = [POINTS[:1], POINTS[1:], POINTS[:0]], [[1], [0, 1], []]
    boxes = [BOX, BOX / 2, BOX / 3]
    found = predictor.predict_batch(coords, labels, boxes=boxes, return_logits=True)
    for i in range(3):
        alone = predictor.predict(coords[i], labels[i], boxes[i], return_logits=True)
        for part, expected in zip(found, alone, strict=True):
            assert_close(part[i], expected)


def test_padding_points_change_nothing(predictor):
    padded = np.concatenate([POINTS[:1], [[5.0, 5.0]] * 2])
    found = predictor.predict(padded, [1, -10, -10])
    for part, expected in zip(found, predictor.predict(POINTS[:1], [1]), strict=True):
        assert_close(part.astype(np.float32), expected.astype(np.float32))
