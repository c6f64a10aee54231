"""The image that a `SamPredictor` keeps, inputs that it refuses, and arrays of other libraries."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from predictors import (
    BOX,
    LABELS,
    POINTS,
    SIDE,
    SIZE,
    assert_same,
    model,
    predictor_fixture,  # noqa: F401
    random_image,
    reference_fixture,  # noqa: F401
    reference_predictor,
    torch_model,
)
from reference import SHALLOW, ours

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.errors import NonFiniteError
from sam_jax.image import load_image
from sam_jax.ops.prompts import join_prompts
from sam_jax.predictor import SamPredictor
from sam_jax.visualize import overlay

MIGRATING = Path(__file__).parents[1] / "docs" / "migrating.md"


# --- state --------------------------------------------------------------------------------------


def test_embeddings_can_be_saved_and_set(predictor, tmp_path):
    expected = predictor.predict(POINTS, LABELS)
    embedding = predictor.get_image_embedding()
    assert embedding.shape == (1, 32, 12, 12)
    np.save(tmp_path / "embedding.npy", embedding)

    again = SamPredictor(model())
    again.set_image_embedding(np.load(tmp_path / "embedding.npy"), predictor.original_size)
    assert again.is_image_set
    assert (again.original_size, again.input_size) == (SIZE, (60, 96))
    for part, array in zip(again.predict(POINTS, LABELS), expected, strict=True):
        assert np.array_equal(part, array)
    assert np.array_equal(again.get_image_embedding(), embedding)


@pytest.mark.slow
def test_an_embedding_of_a_bfloat16_model_can_be_saved(tmp_path, compilations):
    """NumPy lacks bfloat16, so the file would hold raw bytes without a dtype."""
    predictor = SamPredictor(ours(torch_model(), SHALLOW, dtype=jnp.bfloat16))
    predictor.set_image(random_image())
    embedding = predictor.get_image_embedding()
    np.save(tmp_path / "embedding.npy", embedding)
    loaded = np.load(tmp_path / "embedding.npy")
    assert loaded.dtype == np.float32
    before = predictor.predict(POINTS, LABELS)
    compilations.clear()
    predictor.set_image_embedding(loaded, predictor.original_size)
    assert np.array_equal(predictor.get_image_embedding(), embedding)
    for after, expected in zip(predictor.predict(POINTS, LABELS), before, strict=True):
        assert np.array_equal(after, expected)
    assert compilations == []


def test_an_embedding_of_the_reference_can_be_set(reference):
    predictor = SamPredictor(model())
    predictor.set_image_embedding(reference.get_image_embedding(), reference.original_size)
    assert_same(predictor.predict(POINTS, LABELS), reference.predict(POINTS, LABELS))


def test_migration_of_set_torch_image():
    """Runs the code of the row in docs/migrating.md."""
    reference, predictor, size = reference_predictor(), SamPredictor(model()), SIZE
    pixels = reference.transform.apply_image(random_image())
    reference.set_torch_image(torch.tensor(pixels).permute(2, 0, 1)[None], size)
    (row,) = re.findall(r"^\| `predictor\.set_torch_image.*", MIGRATING.read_text(), re.MULTILINE)
    code = row.split("|")[2].split("`")[3]
    names = {"predictor": predictor, "sam": model(), "processor": predictor.processor}
    exec(code, {**names, "pixels": pixels, "size": size})
    assert_same(predictor.predict(POINTS, LABELS), reference.predict(POINTS, LABELS))


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((32, 12, 12), SIZE, r"shape \(32, 12, 12\), expected \(1, 32, 12, 12\)"),
        ((1, 12, 12, 32), SIZE, r"shape \(1, 12, 12, 32\), expected \(1, 32, 12, 12\)"),
        ((1, 32, 12, 12), (0, 5), r"original_size are \[\[0.0, 5.0\]\], expected one positive"),
        ((1, 32, 12, 12), (4, 5, 3), r"original_size are \[\[4.0, 5.0, 3.0\]\]"),
    ],
)
def test_bad_embeddings(predictor, shape, size, message):
    with pytest.raises(ValueError, match=message):
        predictor.set_image_embedding(np.zeros(shape, np.float32), size)
    assert predictor.original_size == SIZE  # the previous image stays


def test_without_an_image():
    predictor = SamPredictor(model())
    for _ in range(2):  # before any is set, and after it is reset
        assert not predictor.is_image_set
        for call in (
            lambda: predictor.predict(POINTS, LABELS),
            lambda: predictor.predict(box=BOX),
            lambda: predictor.predict_batch(boxes=[BOX]),
            predictor.get_image_embedding,
            lambda: predictor.input_size,
        ):
            with pytest.raises(RuntimeError, match="no image is set; call set_image"):
                call()
        predictor.set_image(random_image())
        assert predictor.is_image_set
        predictor.reset_image()


def test_models_and_images_do_not_share_state():
    """Two models of the same shape share compiled programs, which must not keep any state."""
    predictors = [(SamPredictor(model(seed)), reference_predictor(seed)) for seed in (0, 1)]
    results = []
    for image in (random_image(), random_image(seed=1)):
        for ours_, theirs in predictors:
            ours_.set_image(image)
            theirs.set_image(image)
        # Only now, so each predictor must have kept its own image and parameters.
        for ours_, theirs in predictors:
            found = ours_.predict(POINTS, LABELS, return_logits=True)
            assert_same(found, theirs.predict(POINTS, LABELS, return_logits=True), logits=True)
            results.append(found[2])
    for i in range(4):
        for j in range(i):
            assert np.abs(results[i] - results[j]).max() > 0.01


def test_one_model_with_two_images(predictor):
    other = SamPredictor(model())
    other.set_image(random_image(50, 60, seed=1))
    first = predictor.predict(POINTS, LABELS)
    second = other.predict(POINTS / 2, LABELS)
    assert first[0].shape[1:] == SIZE
    assert second[0].shape[1:] == (50, 60)
    other.set_image(random_image())  # replaces the previous image
    for part, expected in zip(other.predict(POINTS, LABELS), first, strict=True):
        assert np.array_equal(part, expected)


def test_bad_images_keep_the_previous_image(predictor):
    expected = predictor.predict(POINTS, LABELS)
    with pytest.raises(TypeError, match="float64"):
        predictor.set_image(random_image() / 255)
    with pytest.raises(ValueError, match="image_format is 'GBR', expected 'RGB' or 'BGR'"):
        predictor.set_image(random_image(), "GBR")
    for part, array in zip(predictor.predict(POINTS, LABELS), expected, strict=True):
        assert np.array_equal(part, array)


def test_image_format_applies_only_to_arrays(predictor, tmp_path):
    image = Image.fromarray(random_image())
    image.save(tmp_path / "image.png")
    for given in (image, tmp_path / "image.png"):
        predictor.set_image(given, "BGR")
        swapped = predictor.get_image_embedding()
        predictor.set_image(given)
        assert np.array_equal(swapped, predictor.get_image_embedding())


def test_later_changes_of_the_model_have_no_effect():
    sam = ours(torch_model(), SHALLOW)
    predictor = SamPredictor(sam)
    predictor.set_image(random_image())
    expected = predictor.predict(POINTS, LABELS)
    tokens = sam.mask_decoder.mask_tokens
    tokens[...] = tokens[...] + 1
    for part, array in zip(predictor.predict(POINTS, LABELS), expected, strict=True):
        assert np.array_equal(part, array)
    changed = SamPredictor(sam)
    changed.set_image(random_image())
    assert np.abs(changed.predict(POINTS, LABELS)[2] - expected[2]).max() > 0.01


# --- bad prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": POINTS}, "point_coords are given without point_labels"),
        ({"point_labels": LABELS}, "point_labels are given without point_coords"),
        (
            {"point_coords": POINTS, "point_labels": [1]},
            r"are 3 points, but their labels have shape \(1,\); expected one label for each point",
        ),
        (
            {"point_coords": POINTS, "point_labels": [1, 4, 0]},
            r"point_coords have labels \[4.0\]; known are 1 \(foreground\)",
        ),
        (
            {"point_coords": POINTS[0], "point_labels": [1, 0]},
            r"point_coords have shape \(2,\), expected \(n, 2\)",
        ),
        ({"point_coords": [[1, np.nan]], "point_labels": [1]}, "point_coords have .* not finite"),
        ({"box": [9, 2, 3, 8]}, r"boxes have \[9.0, 2.0, 3.0, 8.0\], expected .* x0 <= x1"),
        ({"box": [1, 8, 3, 2]}, r"expected .* y0 <= y1"),
        ({"box": [1, 2, 3]}, r"box has shape \(3,\), expected \(4,\)"),
        ({"box": [BOX, BOX]}, r"box has shape \(2, 4\), .*predict_batch takes several boxes"),
        ({"box": [1, 2, 3, np.inf]}, "boxes have .* not finite"),
        (
            {"mask_input": np.zeros((1, *SIZE))},
            r"mask_input has shape \(1, 71, 113\), expected \(1, 48, 48\): low-resolution logits",
        ),
        ({"point_coords": [[1e39, 1]], "point_labels": [1]}, "not finite or too large"),
        ({"point_coords": [[1j, 2]], "point_labels": [1]}, "point_coords are .*, expected numbers"),
        ({"mask_input": np.full((1, 48, 48), np.nan)}, "mask_input has logits .* not finite"),
        ({"mask_input": np.zeros((48, 48))}, r"shape \(48, 48\), expected \(1, 48, 48\)"),
        ({"mask_input": np.zeros((3, 48, 48))}, r"shape \(3, 48, 48\), expected \(1, 48, 48\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_prompts(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["return_logits", "hq_token_only"])
def test_text_is_not_a_bool(predictor, name):
    with pytest.raises(TypeError, match=f"{name} is 'False', expected a bool"):
        predictor.predict(box=BOX, **{name: "False"})


def test_damaged_weights_are_named():
    damaged = nnx.clone(model())
    damaged.mask_decoder.iou_token[...] *= np.nan
    predictor = SamPredictor(damaged)
    predictor.set_image(random_image(*SIZE))
    with pytest.raises(NonFiniteError, match="IoUs that are NaN or infinite: its weights are dam"):
        predictor.predict(box=BOX)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"point_coords": [POINTS] * 2, "point_labels": [LABELS] * 2, "boxes": [BOX] * 3},
            "'point_coords': 2, 'point_labels': 2, 'boxes': 3",
        ),
        ({"point_coords": [POINTS] * 2, "point_labels": [LABELS]}, "numbers of prompts differ"),
        ({"boxes": [BOX], "mask_input": np.zeros((2, 1, 48, 48))}, "'boxes': 1, 'mask_input': 2"),
        ({"boxes": np.zeros((0, 4))}, "there are no prompts: boxes are empty"),
        ({"point_coords": [], "point_labels": []}, "no prompts: point_coords, point_labels are"),
        ({"boxes": BOX}, r"boxes have shape \(4,\), expected \(n, 4\)"),
        ({"boxes": [BOX, BOX[[2, 1, 0, 3]]]}, r"boxes have \[90.0, 8.5, 12.0, 66.0\]"),
        ({"point_coords": POINTS, "point_labels": LABELS}, r"shape \(2,\), expected \(n, 2\)"),
        ({"mask_input": np.zeros((2, 48, 48))}, r"mask_input has shape .*expected \(1, 48, 48\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_batches(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict_batch(**prompt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        *[
            (
                {"mask_input": mask},
                rf"\({mask.dtype}\) looks like a binary mask.*to_logits",
            )
            for mask in (
                np.ones((1, SIDE, SIDE), bool),
                np.zeros((1, SIDE, SIDE), np.uint8),
                np.eye(SIDE, dtype=np.float32)[None],
                255.0 * np.eye(SIDE)[None],
            )
        ],
        ({"mask_input": np.ones(SIZE, bool)}, r"shape \(71, 113\).*mask_to_logits"),
        ({"mask_input": np.ones((3, SIDE, SIDE))}, r"logits\[scores.argmax\(\)\]"),
        *[
            ({"point_coords": POINTS, "point_labels": [1, 0, label]}, message)
            for label, message in ((2, "a box's corners, give"), (3, "corners"), (7, "own"))
        ],
        ({"point_coords": [60, 30], "point_labels": [1]}, r"one point is \[\[x, y\]\]"),
        ({"point_coords": [POINTS], "point_labels": [LABELS]}, "for several prompts use predict_b"),
        ({"point_coords": [["60", "30"]], "point_labels": [1]}, "convert strings"),
        ({"point_coords": [[60, None]], "point_labels": [1]}, "None is not a number"),
        ({"point_coords": [[10**400, 3]], "point_labels": [1]}, "expected numbers"),
        ({"box": [60, 30, 20, 10]}, "if they are x, y, width, height"),
    ],
    ids=str,
)
def test_prompts_that_look_like_something_else(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"point_coords": [[[450, 600]], [[60, 30], [-30, 2]]], "point_labels": [[1], [1, 0]]},
            r"point_coords have \(450, 600\) and 1 more, outside; .*width 113 and height 71",
        ),
        ({"boxes": [[1, 2, 120, 8]]}, r"boxes have \(120, 8\), outside"),
        ({"point_coords": [[[30, 100]]], "point_labels": [[1]]}, "are they y, x?"),
        ({"point_coords": [[[0.4, 0.5]]], "point_labels": [[1]]}, "are they fractions?"),
        ({"boxes": [[0.1, 0.2, 0.4, 0.5]]}, "are they fractions?"),
        ({"point_coords": [[[9, 9]]], "point_labels": [[-1]]}, "label -1, which is not a point"),
        # Outside only by rounding, or because of padding.
        ({"boxes": [[-0.6, 0, 113.4, 71.9]]}, None),
        ({"point_coords": [[[1, 1], [0, 0]]], "point_labels": [[1, -1]]}, None),
        ({"point_coords": [[[1, 1], [900, 900]]], "point_labels": [[1, -10]]}, None),
    ],
    ids=str,
)
def test_implausible_coordinates_warn_once(predictor, prompt, message):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        predictor.predict_batch(**prompt)
    assert len(told) == (message is not None)
    if message is not None:
        assert re.search(message, str(told[0].message))


def test_implausible_model_coordinates_warn(predictor):
    with pytest.warns(UserWarning, match=r"\(112, 9\), outside; .*model's input .*width 96"):
        predictor.predict_torch([[[112, 9]]], [[1]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "pickle"],
)
def test_predictors_and_generators_can_be_copied(predictor, copy_of):
    """Copies keep the image that is set."""
    predictor.set_image(random_image())
    again = copy_of(predictor)
    results = again.predict(POINTS, LABELS), predictor.predict(POINTS, LABELS)
    for found, expected in zip(*results, strict=True):
        assert np.array_equal(found, expected)
    everything = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 1}
    mesh = Mesh(np.array(jax.devices()[:1]), ("mine",))
    generator = SamAutomaticMaskGenerator(predictor.model, **everything, mesh=mesh)
    again = copy_of(generator)
    assert (again.mesh == mesh) == (copy_of is copy.deepcopy)
    records = zip(again.generate(random_image()), generator.generate(random_image()), strict=True)
    for found, expected in records:
        assert np.array_equal(found.pop("segmentation"), expected.pop("segmentation"))
        assert found == expected


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_arrays_of_other_libraries(predictor):
    """All functions accept them like numpy's arrays."""
    image, model = torch.tensor(random_image()), predictor.model
    predictor.set_image(random_image())
    expected = predictor.predict(POINTS, LABELS, BOX)
    predictor.set_image(image)
    coords = torch.tensor(POINTS, requires_grad=True)
    labels, box = list(torch.tensor(LABELS)), torch.tensor(BOX)
    for found, wanted in zip(predictor.predict(coords, labels, box), expected, strict=True):
        assert np.array_equal(found, wanted)
    logits = torch.tensor(expected[2][:1])
    predictor.predict(coords, labels, mask_input=logits)
    predictor.set_image_embedding(torch.tensor(predictor.get_image_embedding()), image.shape[:2])
    assert np.array_equal(predictor.predict(POINTS, LABELS, BOX)[1], expected[1])

    inputs = predictor.processor(image, input_points=coords[None, None], input_labels=[[labels]])
    outputs = model(**inputs)
    batch = next(iter(torch.utils.data.DataLoader([dict(inputs)], batch_size=None)))
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    found = model(**batch)
    assert np.array_equal(found.iou_scores, outputs.iou_scores)
    masks = predictor.processor.post_process_masks(
        torch.tensor(np.array(found.pred_masks)), batch["original_sizes"], [[60, 96]]
    )
    assert masks[0].shape == (1, 3, *SIZE)
    points, labels = join_prompts(batch["input_points"], batch["input_labels"], None)
    embeddings = model.encode_image(batch["pixel_values"])
    model.decode(
        torch.tensor(np.array(embeddings)).to(torch.bfloat16),
        torch.tensor(points),
        torch.tensor(labels),
        target_embedding=torch.zeros(1, 1, 1, SHALLOW.prompt_embed_dim),
        attention_similarity=torch.zeros(1, 1, 1, 1, SHALLOW.image_embedding_size**2),
    )
    SamAutomaticMaskGenerator(model, points_per_side=1).generate(image)
    assert np.array_equal(load_image(image), random_image())
    overlay(image, torch.tensor(masks[0][0]))

    class OnlyDLPack:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    processor = predictor.processor
    for kind in (torch.Tensor.clone, OnlyDLPack):
        assert np.array_equal(processor.preprocess(kind(image)), inputs.pixel_values[0])
        assert processor.input_size(kind(torch.tensor([60, 96]))) == (60, 96)
        size = kind(torch.tensor(SIZE))
        found = processor.scale_coords(kind(coords.detach()), size)
        assert np.array_equal(found, processor.scale_coords(POINTS, SIZE))
        overlay(kind(image), kind(torch.tensor(masks[0][0])))
        predictor.predict_batch(kind(coords.detach()[None]), kind(torch.tensor(LABELS)[None]))
    for wrong, message in (
        (torch.zeros((2, 3, 40, 50), dtype=torch.uint8), "list.*channels last"),
        (torch.zeros((3, 40, 50), dtype=torch.uint8), "channels first"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.set_image(wrong)
    with pytest.raises(
        ValueError, match=r"pixel_values have shape .*channels first: use np.moveaxis"
    ):
        model(torch.zeros(2, 3, 96, 96))
