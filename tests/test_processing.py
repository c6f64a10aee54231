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
import transformers
from PIL import Image
from reference import SMALL, assert_close, mask_iou
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from sam_jax.config import lite_medsam, vit_b, with_preprocessing
from sam_jax.processing import SamProcessor

SIZES = [(300, 451), (451, 300), (96, 96), (1024, 1024), (700, 1500), (5, 9), (60, 1), (1, 60)]


@pytest.fixture(scope="module")
def processor():
    return SamProcessor(vit_b())


@pytest.fixture(scope="module")
def small():
    return SamProcessor(SMALL)


@pytest.fixture(scope="module")
def transforms():
    torch_reference.import_reference("segment_anything")
    import segment_anything.utils.transforms as module

    return module


@pytest.fixture(scope="module")
def meta():
    """Meta's `Sam` for 1024 pixels without its encoder, which these tests do not need."""
    modeling = torch_reference.import_reference("segment_anything").modeling
    encoder = torch.nn.Module()
    encoder.img_size = 1024
    return modeling.Sam(encoder, torch.nn.Identity(), torch.nn.Identity())


@pytest.fixture(scope="module")
def hf():
    return transformers.SamProcessor(SamImageProcessorPil())


def random_image(height, width, seed=0):
    """Random, with smooth parts and edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.3, noise, smooth)


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_metas(processor, transforms, meta, size):
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
def test_pixels_are_hfs(processor, hf, size):
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
    """Its lines: a square, then the smallest value to 0 and the largest to 1."""
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


def test_medsams_resampling_is_as_close_as_we_say():
    """PIL's bilinear filter compared with the authors' own inference, on a photo."""
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
def test_segmentation_maps_are_hfs(processor, hf, size):
    rng = np.random.default_rng(0)
    image, labels = random_image(*size), rng.integers(0, 200, size, dtype=np.uint8)
    expected = hf(Image.fromarray(image), segmentation_maps=labels, return_tensors="np")["labels"]
    for given in (labels, [labels], labels.astype(np.int64), Image.fromarray(labels)):
        found = processor(image, segmentation_maps=given)["labels"]
        assert found.dtype == np.int64
        assert np.array_equal(found, expected)


def test_segmentation_maps_of_stretched_images():
    """They lie on the model's masks, whose image lost its proportions."""
    labels = np.zeros((300, 451), np.uint8)
    labels[100:200, 150:] = 7
    processor = SamProcessor(with_preprocessing(vit_b(), "medsam"))
    (found,) = processor(random_image(300, 451), segmentation_maps=labels)["labels"]
    expected = Image.fromarray(labels).resize((256, 256), Image.Resampling.NEAREST)
    assert np.array_equal(found, np.asarray(expected))


def test_segmentation_maps_of_booleans_and_large_numbers(small):
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


def test_no_image(small):
    for images in ([], ()):
        with pytest.raises(ValueError, match="images is an empty list, expected at least one"):
            small(images)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:input_.* outside", "ignore:.*label -1")
@pytest.mark.parametrize("size", [*SIZES, (333, 1023), (1365, 767)], ids=str)
def test_coordinates_are_metas_and_hfs(processor, transforms, hf, size):
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
def test_nesting_is_hfs(processor, hf, prompts, count):
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
    """The one ragged case that the reference knows; it gives the padding coordinates of -10."""
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
def test_a_point_on_the_edge_and_a_box_without_area_are_fine(small):
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


def test_different_numbers_of_prompts_in_one_of_two_images(small):
    """Padding to the largest number must not hide it."""
    with pytest.raises(ValueError, match=r"input_points\[0\] are 2 prompts, but there are 1 boxes"):
        small(
            [random_image(30, 40)] * 2,
            input_points=[[[[1, 1]], [[2, 2]]], [[1, 1]]],
            input_boxes=[[[1, 1, 2, 2]], [[1, 1, 2, 2], [3, 3, 4, 4]]],
        )


# --- masks --------------------------------------------------------------------------------------

# Scaled up and down, not square, odd; a hair.
MASK_SIZES = [(300, 451), (451, 301), (1024, 1024), (1365, 2047), (77, 33), (1, 60), (255, 513)]


def logits(*shape, seed=0):
    """Smooth logits of scale 10, of either sign, whose edges cross pixels anywhere."""
    coarse = np.random.default_rng(seed).normal(size=(*shape[:-2], shape[-2] // 8, shape[-1] // 8))
    smooth = torch.nn.functional.interpolate(
        torch.tensor(coarse, dtype=torch.float32).reshape(1, -1, *coarse.shape[-2:]),
        shape[-2:],
        mode="bicubic",
    )
    return 10 * smooth.reshape(shape).numpy()


@pytest.mark.parametrize("size", MASK_SIZES, ids=str)
def test_masks_are_metas_and_hfs(processor, hf, meta, size):
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
        ((1, 1, 3), [(20, 30)], [(64, 97)], "larger than the model's input of 96 pixels"),
        ((1,), [(20, 30)], [(64, 96)], r"masks\[0\] has shape \(48, 48\), expected \(prompts"),
    ],
)
def test_bad_sizes_of_masks(small, shape, originals, inputs, message):
    with pytest.raises(ValueError, match=message):
        small.post_process_masks(np.zeros((*shape, 48, 48), np.float32), originals, inputs)


def test_masks_of_the_images_size_are_refused(small):
    message = r"masks\[0\] has shape \(1, 3, 20, 30\), expected .*48, 48\): low-resolution logits"
    with pytest.raises(ValueError, match=message):
        small.post_process_masks(np.zeros((1, 1, 3, 20, 30)), [(20, 30)], [(64, 96)])


def test_from_pretrained(mobile_sam_file):
    assert SamProcessor.from_pretrained(os.fspath(mobile_sam_file)).config.image_size == 1024


# --- masks as prompts -----------------------------------------------------------------------------


def disk(height, width):
    y, x = np.mgrid[:height, :width]
    return ((y / height - 0.6) ** 2 + (x / width - 0.7) ** 2) < 0.07


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
    # Smaller masks have more of an edge for their area.
    assert mask_iou(back[0, 0], mask) > (0.98 if image_size == 1024 else 0.95)
    for same in (mask.astype(np.uint8), 255 * mask.astype(np.uint8), mask.astype(np.float32)):
        assert np.array_equal(processor.mask_to_logits(same), logits)
        assert np.array_equal(processor.mask_to_logits(torch.tensor(same)), logits)
    both = processor.mask_to_logits([mask, ~mask])
    assert both.shape == (2, *logits.shape)
    assert np.array_equal(both[0], logits)


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
def test_what_is_not_a_mask(small, mask, message):
    with pytest.raises(ValueError, match=message):
        small.mask_to_logits(mask)


def test_none_is_an_image_without_prompts(small):
    images = [random_image(96, 96), random_image(96, 96)]
    for none in (None, []):
        inputs = small(images, input_points=[[[[1, 2]]], none], input_boxes=[[[1, 2, 3, 4]], none])
        assert inputs["input_labels"].tolist() == [[[1]], [[-10]]]
        assert inputs["input_boxes"].tolist() == [[[1, 2, 3, 4]], [[0] * 4]]
    with pytest.raises(ValueError, match="input_points are None for all images; leave them out"):
        small(images, input_points=[None, None])


def test_inputs_are_a_dictionary_with_attributes(small):
    inputs = small(random_image(96, 96), return_tensors="np")
    assert inputs.pixel_values is inputs["pixel_values"]
    doubled = jax.tree.map(lambda array: 2 * array, inputs)
    assert np.array_equal(doubled.original_sizes, [[192, 192]])
    with pytest.raises(AttributeError, match="no attribute 'to'; leave it out"):
        inputs.to("cuda")
