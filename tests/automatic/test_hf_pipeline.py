import dataclasses
import inspect

import numpy as np
import pytest
from everything import random_image
from image_files import write_deep
from PIL import ExifTags, Image
from reference import SHALLOW, hf_sam, mask_iou, ours
from torch_reference import hf_mask_generation
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import sam_jax
from sam_jax.automatic.hf_pipeline import pipeline

pytestmark = pytest.mark.slow

HF = dataclasses.replace(
    SHALLOW, mask_decoder=dataclasses.replace(SHALLOW.mask_decoder, layer_norm_eps=1e-6)
)
# With these thresholds, all masks of random weights pass.
ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_crop": 5}


@pytest.fixture(scope="module")
def model():
    return ours(hf_sam(HF), HF)


@pytest.fixture(scope="module")
def reference():
    size = {"height": 96, "width": 96}
    processor = SamImageProcessorPil(size={"longest_edge": 96}, pad_size=size)
    return hf_mask_generation(hf_sam(HF), processor)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crops_nms_thresh": 0.95},
        {"mask_threshold": 0.02, "crops_nms_thresh": 0.99},
    ],
    ids=str,
)
def test_results_match_hugging_face(model, reference, options):
    image = Image.fromarray(random_image(80, 120))
    options = {**ALL, **options, "output_rle_mask": True, "output_bboxes_mask": True}
    expected = reference(image, **options)
    actual = pipeline("mask-generation", model)(image, **options)
    assert actual.keys() == expected.keys()
    assert len(actual["masks"]) == len(expected["masks"]) > 0
    for mask, other in zip(actual["masks"], expected["masks"], strict=True):
        assert mask.dtype == bool
        assert mask_iou(mask, other) >= 0.999
    np.testing.assert_allclose(actual["scores"], expected["scores"], atol=1e-4)
    np.testing.assert_array_equal(actual["bounding_boxes"], expected["bounding_boxes"])
    for rle, other in zip(actual["rle_mask"], expected["rle_mask"], strict=True):
        assert rle["size"] == list(other["size"])
        assert type(rle["counts"]) is list


def test_exif_orientation_is_applied(model, reference):
    image = Image.fromarray(random_image(80, 120))
    image.getexif()[ExifTags.Base.Orientation] = 6
    expected = reference(image, **ALL)
    generate = pipeline(model=model, **ALL)
    for actual in (generate(image=image), *generate([image])):
        assert actual["masks"][0].shape == expected["masks"][0].shape == (120, 80)
        np.testing.assert_allclose(actual["scores"], expected["scores"], atol=1e-4)


def test_opened_files_of_more_than_8_bits_are_refused(model, tmp_path):
    with (
        Image.open(write_deep(tmp_path / "deep.png", "png_color")) as image,
        pytest.raises(TypeError, match="more than 8 bits per channel"),
    ):
        pipeline(model=model)(image)


def test_lists_and_defaults(model, tmp_path):
    images = [random_image(40, 60), random_image(50, 30)]
    generate = pipeline(model=model, **ALL)
    results = generate(images)
    assert [r["masks"][0].shape for r in results] == [(40, 60), (50, 30)]
    for result, image in zip(results, images, strict=True):
        alone = generate(image)
        assert alone.keys() == {"masks", "scores"}
        np.testing.assert_array_equal(result["scores"], alone["scores"])
    fewer = generate(images[0], points_per_crop=1, points_per_batch=None)
    assert 0 < len(fewer["masks"]) <= 3


def test_nothing_survives(model):
    result = pipeline(model=model, **{**ALL, "pred_iou_thresh": 1.0})(
        random_image(40, 60), output_bboxes_mask=True, output_rle_mask=True
    )
    assert result["masks"] == result["rle_mask"] == []
    assert result["scores"].shape == (0,)
    assert result["bounding_boxes"].shape == (0, 4)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="task is 'depth-estimation', expected 'mask-generation'"):
        pipeline("depth-estimation")
    with pytest.raises(TypeError, match=r"unknown options points_per_side; known: points_per_batc"):
        pipeline(model=model, points_per_side=3)
    with pytest.raises(TypeError, match=r"unknown options device; known"):
        pipeline(model=model)(random_image(4, 5), device=0)
    with pytest.raises(ValueError, match="unknown model 'vit_x'"):
        pipeline(model="vit_x")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_threshold": "0"}, "mask_threshold is '0', expected a number"),
        ({"mask_threshold": None}, "mask_threshold is None, expected a number"),
        ({"points_per_crop": 0}, "points_per_crop is 0, expected a whole number of at least 1"),
        ({"points_per_crop": None}, "points_per_crop is None, expected a whole number of at least"),
        ({"points_per_crop": "3", "points_per_batch": None}, "points_per_crop is '3', expected a"),
        ({"crops_nms_thresh": None}, "crops_nms_thresh is None, expected a number"),
        ({"crops_n_layers": -1}, "crops_n_layers is -1, expected a whole number of at least 0"),
        (
            {"points_per_crop": 1, "crops_n_layers": 1, "crop_n_points_downscale_factor": 2},
            "points_per_crop 1 over crop_n_points_downscale_factor 2 leaves no points for layer 1",
        ),
    ],
    ids=str,
)
def test_bad_values_are_named_as_they_were_given(model, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(model=model, **options)
    with pytest.raises(ValueError, match=message):
        pipeline(model=model)(random_image(4, 5), **options)


def test_help_lists_differences_from_hugging_face():
    text = inspect.getdoc(sam_jax.pipeline)
    for word in ("crops", "batch_size", "num_workers", "timeout", "max_hole_area", "device"):
        assert word in text
