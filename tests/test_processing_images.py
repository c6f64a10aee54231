"""Preprocessing of images and segmentation maps, and resizing of masks to the images' sizes."""

import dataclasses
import os

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import skimage.transform
import torch
import torch_reference
from PIL import Image
from processors import (
    SIZES,
    hf_fixture,  # noqa: F401
    processor_fixture,  # noqa: F401
    random_image,
    small_fixture,  # noqa: F401
    transforms_fixture,  # noqa: F401
)
from reference import SMALL, assert_close, mask_iou

from sam_jax import arrays as arrays_module
from sam_jax import processing
from sam_jax.config import lite_medsam, vit_b, with_preprocessing
from sam_jax.errors import NonFiniteError
from sam_jax.processing import SamProcessor


@pytest.fixture(scope="module")
def meta():
    """Meta's `Sam` for 1024 pixels without its encoder, which these tests do not need."""
    modeling = torch_reference.import_reference("segment_anything").modeling
    encoder = torch.nn.Module()
    encoder.img_size = 1024
    return modeling.Sam(encoder, torch.nn.Identity(), torch.nn.Identity())


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_match_meta(processor, transforms, meta, size):
    image = random_image(*size)
    resized = transforms.ResizeLongestSide(1024).apply_image(image)
    expected = meta.preprocess(torch.tensor(resized).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    inputs = processor(image)
    assert inputs["pixel_values"].dtype == np.float32
    assert np.array_equal(inputs["pixel_values"], expected[None])
    assert inputs["original_sizes"].tolist() == [list(size)]
    assert inputs["reshaped_input_sizes"].tolist() == [list(resized.shape[:2])]
    assert inputs["original_sizes"].dtype == inputs["reshaped_input_sizes"].dtype == np.int64


@pytest.mark.parametrize("size", [s for s in SIZES if min(s) > 3], ids=str)
def test_pixels_match_hf(processor, hf, size):
    image = Image.fromarray(random_image(*size))
    expected = hf(image, return_tensors="np")
    inputs = processor(image)
    pixels = np.moveaxis(inputs["pixel_values"], -1, 1)
    assert np.abs(pixels - expected["pixel_values"]).max() <= 1e-6
    for name in ("original_sizes", "reshaped_input_sizes"):
        assert np.array_equal(inputs[name], expected[name])


def test_another_image_size_and_statistics(transforms):
    config = dataclasses.replace(SMALL, pixel_mean=(0.0, 1.0, 2.0), pixel_std=(1.0, 2.0, 4.0))
    image = random_image(50, 71)
    resized = transforms.ResizeLongestSide(96).apply_image(image).astype(np.float32)
    pixels = SamProcessor(config)(image)["pixel_values"][0]
    assert pixels.shape == (96, 96, 3)
    expected = (resized - [0, 1, 2]) / [1, 2, 4]
    assert np.array_equal(pixels[: len(resized)], expected.astype(np.float32))
    assert not pixels[len(resized) :].any()


def test_medsams_images():
    """MedSAM resizes to a square, then maps the smallest value to 0 and the largest to 1."""
    config = with_preprocessing(SMALL, "medsam")
    processor = SamProcessor(config)
    image = skimage.data.coffee()[:, :300] // 2 + 20
    inputs = processor(image, input_boxes=[[[30, 40, 150, 200]]])
    square = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR))
    expected = (square - square.min()) / np.float32(square.max() - square.min())
    np.testing.assert_allclose(inputs["pixel_values"][0], expected, atol=1e-6)
    assert inputs["pixel_values"].min() == 0
    assert inputs["pixel_values"].max() == 1
    np.testing.assert_allclose(inputs["input_boxes"][0, 0], [9.6, 9.6, 48, 48], rtol=1e-6)

    logits = np.random.default_rng(0).normal(size=(1, 1, 1, 48, 48)).astype(np.float32)
    full = torch.nn.functional.interpolate(torch.tensor(logits[0]), (96, 96), mode="bilinear")
    full = torch.nn.functional.interpolate(full, (400, 300), mode="bilinear")
    (masks,) = processor.post_process_masks(
        logits, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    assert_close(masks, full)
    assert not processor(np.full((8, 8, 3), 7, np.uint8))["pixel_values"].any()


@pytest.mark.slow
def test_medsam_resampling_error_is_as_documented():
    """Compares PIL's bilinear filter with the authors' own inference on a photo."""
    image = skimage.data.coffee()
    medsam = skimage.transform.resize(
        image, (1024, 1024), order=3, preserve_range=True, anti_aliasing=True
    ).astype(np.uint8)
    lite = cv2.resize(image, (256, 171), interpolation=cv2.INTER_AREA)
    for config, resized, mean in (
        (with_preprocessing(vit_b(), "medsam"), medsam, 0.006),
        (lite_medsam(), lite, 0.004),
    ):
        pixels = SamProcessor(config).preprocess(image)
        assert not pixels[len(resized) :].any()
        expected = (resized - resized.min()) / np.float32(np.ptp(resized))
        assert round(float(np.abs(pixels[: len(resized)] - expected).mean()), 3) == mean


def test_several_images_of_different_sizes(small, tmp_path):
    images = [random_image(40, 60), random_image(61, 33, 1), random_image(7, 7, 2)]
    Image.fromarray(images[1]).save(tmp_path / "image.png")
    inputs = small([Image.fromarray(images[0]), tmp_path / "image.png", images[2]])
    for i, image in enumerate(images):
        alone = small(image)
        for name, value in alone.items():
            assert np.array_equal(inputs[name][i], value[0])


def test_a_hair_thin_image_keeps_a_pixel(small):
    # The reference computes a width of 0 here and fails.
    inputs = small(random_image(500, 1), input_points=[[[0, 250]]])
    assert inputs["reshaped_input_sizes"].tolist() == [[96, 1]]
    assert inputs["input_points"].tolist() == [[[[0, 48]]]]


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (256, 256), (700, 1500), (5, 9)], ids=str)
def test_segmentation_maps_match_hf(processor, hf, size):
    rng = np.random.default_rng(0)
    image, labels = random_image(*size), rng.integers(0, 200, size, dtype=np.uint8)
    expected = hf(Image.fromarray(image), segmentation_maps=labels, return_tensors="np")["labels"]
    for given in (labels, [labels], labels.astype(np.int64), Image.fromarray(labels)):
        found = processor(image, segmentation_maps=given)["labels"]
        assert found.dtype == np.int64
        assert np.array_equal(found, expected)


def test_segmentation_maps_of_stretched_images():
    """The maps are stretched like the image, so that they align with the model's masks."""
    labels = np.zeros((300, 451), np.uint8)
    labels[100:200, 150:] = 7
    processor = SamProcessor(with_preprocessing(vit_b(), "medsam"))
    (found,) = processor(random_image(300, 451), segmentation_maps=labels)["labels"]
    expected = Image.fromarray(labels).resize((256, 256), Image.Resampling.NEAREST)
    assert np.array_equal(found, np.asarray(expected))


def test_boolean_and_large_segmentation_maps(small):
    side = small.config.mask_size
    image = random_image(side // 4, side)
    truth = np.zeros(image.shape[:2], bool)
    truth[2:8, 10:20] = True
    (labels,) = small(image, segmentation_maps=truth)["labels"]
    assert labels.shape == (side, side)
    assert np.array_equal(labels[: side // 4], truth)
    assert not labels[side // 4 :].any()
    (labels,) = small(image, segmentation_maps=truth * 70_000)["labels"]
    assert labels.max() == 70_000


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((9, 8), int), r"segmentation_maps\[0\] is int64 of shape \(9, 8\).*\(8, 9\)"),
        (np.zeros((8, 9)), r"is float64 of shape \(8, 9\), expected integers"),
        ([np.zeros((8, 9), int)] * 2, "there are 1 images, but 2 segmentation_maps"),
        (np.full((8, 9), 3_000_000_000, np.uint32), r"\[0\] has the value 3000000000, expected -2"),
        (np.full((8, 9), 2**32 + 5), "has the value 4294967301, expected -2"),
        (np.full((8, 9), 2**64 - 1, np.uint64), "has the value 18446744073709551615, expected -2"),
        (np.full((8, 9), -(2**31) - 1), "has the value -2147483649, expected -2"),
    ],
)
def test_bad_segmentation_maps(small, maps, message):
    with pytest.raises(ValueError, match=message):
        small(random_image(8, 9), segmentation_maps=maps)


@pytest.mark.parametrize("most", [2**31 - 1, -(2**31)])
def test_segmentation_maps_up_to_int32(small, most):
    (labels,) = small(random_image(8, 9), segmentation_maps=np.full((8, 9), most))["labels"]
    assert set(np.unique(labels)) == {0, most}  # 0 is the padding


def test_coordinates_are_pairs_and_images_fit(small):
    for coords in ([1, 2, 3], 5.0):
        with pytest.raises(ValueError, match=r"coords have shape .*, expected \(\.\.\., 2\)"):
            small.scale_coords(coords, (20, 30))
    with pytest.raises(ValueError, match=r"the image is 97 x 20 pixels, expected at most 96 x 96"):
        small.normalize(random_image(20, 97))


def test_no_image(small):
    for images in ([], ()):
        with pytest.raises(ValueError, match="images is an empty list, expected at least one"):
            small(images)


def test_inputs_are_a_dictionary_with_attributes(small):
    inputs = small(random_image(96, 96), return_tensors="np")
    assert inputs.pixel_values is inputs["pixel_values"]
    doubled = jax.tree.map(lambda array: 2 * array, inputs)
    assert np.array_equal(doubled.original_sizes, [[192, 192]])
    with pytest.raises(AttributeError, match="no attribute 'to'; leave it out"):
        inputs.to("cuda")


# --- masks --------------------------------------------------------------------------------------

# Scaled up and down, not square, odd, one pixel wide.
MASK_SIZES = [(300, 451), (451, 301), (1024, 1024), (1365, 2047), (77, 33), (1, 60), (255, 513)]


def logits(*shape, seed=0):
    """Smooth logits of scale 10 and either sign, whose edges cross pixels anywhere."""
    coarse = np.random.default_rng(seed).normal(size=(*shape[:-2], shape[-2] // 8, shape[-1] // 8))
    smooth = torch.nn.functional.interpolate(
        torch.tensor(coarse, dtype=torch.float32).reshape(1, -1, *coarse.shape[-2:]),
        shape[-2:],
        mode="bicubic",
    )
    return 10 * smooth.reshape(shape).numpy()


@pytest.mark.parametrize("size", MASK_SIZES, ids=str)
def test_masks_match_meta_and_hf(processor, hf, meta, size):
    low_res = logits(2, 3, 256, 256)
    sizes = [size], [processor.input_size(size)]
    expected = meta.postprocess_masks(torch.tensor(low_res), sizes[1][0], size).numpy()
    (theirs,) = hf.post_process_masks([torch.tensor(low_res)], *sizes, binarize=False)
    assert np.array_equal(expected, theirs.numpy())
    (found,) = processor.post_process_masks(low_res[None], *sizes, binarize=False)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (2, 3, *size)
    assert np.abs(found - expected).max() <= 1e-4
    for threshold in (None, 0.0, 5.5, -2.0):
        (masks,) = processor.post_process_masks(low_res[None], *sizes, mask_threshold=threshold)
        assert masks.dtype == bool
        assert masks.shape == expected.shape
        assert mask_iou(masks, expected > (threshold or 0)).min() >= 0.9999


def test_masks_of_several_images(processor, hf):
    sizes = [(300, 451), (451, 300), (20, 30)]
    inputs = processor([random_image(*size) for size in sizes])
    low_res = logits(3, 1, 3, 256, 256)
    expected = hf.post_process_masks(
        [torch.tensor(m) for m in low_res], inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    reshaped = [tuple(size) for size in inputs["reshaped_input_sizes"]]
    for given in (low_res, list(low_res), jnp.asarray(low_res), torch.tensor(low_res)):
        for known in (inputs["original_sizes"], sizes, torch.tensor(inputs["original_sizes"])):
            found = processor.post_process_masks(given, known, reshaped)
            for masks, theirs, size in zip(found, expected, sizes, strict=True):
                assert masks.shape == (1, 3, *size)
                assert mask_iou(masks, theirs.numpy()).min() >= 0.9999


def test_masks_on_an_accelerator_stay_there(small, monkeypatch):
    """On a simulated accelerator, they are resized where they are, with the same result."""
    low_res, sizes = logits(2, 3, 3, 48, 48), ([(20, 30), (9, 9)], [(64, 96), (96, 96)])
    expected = small.post_process_masks(low_res, *sizes)
    for module in (processing, arrays_module):
        monkeypatch.setattr(module, "on_accelerator", lambda x: isinstance(x, jax.Array))
    arrays = jax.device_put(low_res)
    with jax.transfer_guard_host_to_device("disallow"):
        found = [small.post_process_masks(given, *sizes) for given in (arrays, list(arrays))]
    for masks in found:
        for one, other in zip(masks, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_list_may_hold_different_numbers_of_masks(small):
    low_res = [logits(3, 1, 48, 48), logits(1, 3, 48, 48, seed=1)[:, ::2]]
    found = small.post_process_masks(low_res, [(20, 30)] * 2, [(64, 96)] * 2)
    assert [m.shape for m in found] == [(3, 1, 20, 30), (1, 2, 20, 30)]


def test_the_models_threshold(small):
    strict = SamProcessor(dataclasses.replace(SMALL, mask_threshold=3.0))
    low_res = logits(1, 1, 1, 48, 48)
    sizes = [(40, 50)], [(77, 96)]
    (expected,) = small.post_process_masks(low_res, *sizes, mask_threshold=3.0)
    (found,) = strict.post_process_masks(low_res, *sizes)
    assert np.array_equal(found, expected)
    assert 0 < found.sum() < small.post_process_masks(low_res, *sizes)[0].sum()


@pytest.mark.parametrize(
    ("shape", "originals", "inputs", "message"),
    [
        ((2, 1, 3), [(20, 30)], [(64, 96)] * 2, r"original_sizes are \[\[20.*per image, 2 in all"),
        ((2, 1, 3), [(20, 30)] * 2, [(64, 96)] * 3, "reshaped_input_sizes are .*, 2 in all"),
        ((2, 1, 3), (20, 30), (64, 96), r"original_sizes are \[20.0, 30.0\], expected one"),
        ((1, 1, 3), [(20, 0)], [(64, 96)], r"original_sizes are .*positive"),
        ((1, 1, 3), [(20, 30.5)], [(64, 96)], r"original_sizes are .*positive"),
        ((1, 1, 3), [(20, 10**6)], [(64, 96)], r"original_sizes are .*each side at most 65536"),
        ((1, 1, 3), [(20, 30)], [(64, 97)], r"are \[\(64, 97\)\], expected \[\(64, 96\)\]"),
        ((1, 1, 3), [(20, 30)], [(20, 30)], r"are \[\(20, 30\)\], expected \[\(64, 96\)\]"),
        ((1,), [(20, 30)], [(64, 96)], r"masks\[0\] has shape \(48, 48\), expected \(prompts"),
    ],
)
def test_bad_sizes_of_masks(small, shape, originals, inputs, message):
    with pytest.raises(ValueError, match=message):
        small.post_process_masks(np.zeros((*shape, 48, 48), np.float32), originals, inputs)


LOW = np.zeros((1, 1, 3, 48, 48))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("masks", "options", "error", "message"),
    [
        (LOW * np.nan, {}, NonFiniteError, r"masks\[0\] has logits that are NaN or infinite"),
        (LOW > 0, {}, ValueError, r"masks\[0\] are bool, expected logits, floats"),
        (LOW * 1j, {}, ValueError, "are complex128, expected logits"),
        (None, {}, ValueError, "masks are None, expected a list or an array"),
        (LOW, {"binarize": "no"}, TypeError, "binarize is 'no', expected a bool"),
        (LOW, {"mask_threshold": "a"}, ValueError, "mask_threshold is 'a', expected a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_masks_that_are_not_logits(small, masks, options, error, message):
    with pytest.raises(error, match=message):
        small.post_process_masks(masks, [(20, 30)], [(64, 96)], **options)


def test_masks_of_the_images_size_are_refused(small):
    message = r"masks\[0\] has shape \(1, 3, 20, 30\), expected .*48, 48\): low-resolution logits"
    with pytest.raises(ValueError, match=message):
        small.post_process_masks(np.zeros((1, 1, 3, 20, 30)), [(20, 30)], [(64, 96)])


def test_from_pretrained(mobile_sam_file):
    assert SamProcessor.from_pretrained(os.fspath(mobile_sam_file)).config.image_size == 1024
