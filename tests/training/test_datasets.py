import json
import warnings

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
from coco_examples import RECTANGLES, H, W, change, compressed, rectangle, transformed, uncompressed
from image_files import eps, write_deep
from PIL import ExifTags, Image

from sam_jax.image import turn
from sam_jax.training.datasets import (
    CocoInstances,
    SegmentAnything1B,
    fingerprint,
    open_annotations,
)


def test_coco_matches_pycocotools(coco):
    dataset = CocoInstances(coco / "coco.json", coco)
    assert len(dataset) == 3
    reference = pycocotools.coco.COCO(coco / "coco.json")
    example = dataset[0]
    np.testing.assert_array_equal(example["image"], np.asarray(Image.open(coco / "0.png")))
    expected = [reference.annToMask(a) for a in reference.loadAnns(reference.getAnnIds([10]))]
    np.testing.assert_array_equal(example["masks"], np.array(expected, bool))
    np.testing.assert_array_equal(example["masks"][1], rectangle(*RECTANGLES[1]))
    assert [dataset.image_id(i) for i in range(3)] == [10, 11, 12]
    # A crowd is not an object. An empty mask is an object, and counts as too small.
    assert dataset[1]["masks"].shape == (1, H, W)
    assert not np.any(dataset[1]["masks"])
    assert transformed(dataset[1])["dropped"] == 1
    assert dataset[2]["masks"].shape == (2, H, W)


@pytest.fixture
def sa_1b(tmp_path):
    """Two images with three objects each."""
    for i in range(2):
        Image.fromarray(np.full((H, W, 3), i, np.uint8)).save(tmp_path / f"sa_{i}.jpg")
        annotations = [
            {"id": k, "segmentation": compressed(rectangle(*box))}
            for k, box in enumerate(RECTANGLES)
        ]
        image = {"image_id": i, "file_name": f"sa_{i}.jpg", "height": H, "width": W}
        content = {"image": image, "annotations": annotations}
        (tmp_path / f"sa_{i}.json").write_text(json.dumps(content))
    return tmp_path


def test_sa_1b(sa_1b):
    dataset = open_annotations(sa_1b)
    assert isinstance(dataset, SegmentAnything1B)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset[1]["masks"], [rectangle(*box) for box in RECTANGLES])
    assert dataset[1]["image"].mean() == pytest.approx(1, abs=0.5)
    assert dataset.image_id(1) == "sa_1"


@pytest.mark.parametrize(
    ("edit", "message", "left"),
    [
        (lambda i, a: i.update(height=55.0), None, 3),
        (lambda i, a: a[0]["segmentation"].update(size=[55.0, 70.0]), None, 3),
        (lambda i, a: i.clear(), "image sa_0: .* is not a file of SA-1B: it has no file_name", 0),
        (lambda i, a: i.update(width="70"), "its width is '70', expected a whole number", 0),
        (lambda i, a: i.update(file_name="../sa_1.jpg"), "leads out of the folder", 0),
        (lambda i, a: i.update(file_name="gone.jpg"), "image sa_0: .*No such file", 0),
        (lambda i, a: a[1].update(segmentation=5), "sa_0: annotation 1: its segmentation is", 2),
        (lambda i, a: a[1].pop("segmentation"), "annotation 1: it has no segmentation", 2),
        (
            lambda i, a: a[1]["segmentation"].update(counts="\0"),
            "annotation 1: its segmentation",
            2,
        ),
        (lambda i, a: a.append(None), r"image sa_0: annotations\[3\]: it is None", 3),
    ],
)
def test_bad_files_of_sa_1b(sa_1b, edit, message, left):
    content = json.loads((sa_1b / "sa_0.json").read_text())
    edit(content["image"], content["annotations"])
    (sa_1b / "sa_0.json").write_text(json.dumps(content))
    if message is None:
        assert len(open_annotations(sa_1b)[0]["masks"]) == left
        return
    with pytest.raises(ValueError, match=message):
        open_annotations(sa_1b)[0]
    with pytest.warns(UserWarning, match=message):
        assert len(open_annotations(sa_1b, on_bad_annotation="skip")[0]["masks"]) == left


def test_sa_1b_ignores_exif_orientation(sa_1b):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for i in range(2):
        with Image.open(sa_1b / f"sa_{i}.jpg") as image:
            image.save(sa_1b / f"sa_{i}.jpg", exif=exif)
    dataset = open_annotations(sa_1b)
    with pytest.warns(UserWarning, match="has EXIF orientation 3.*store the image upright"):
        assert dataset[0]["image"].shape == (H, W, 3)
    dataset[1]  # a second warning would be an error


@pytest.mark.parametrize("kind", ["damaged", "other size", "16 bits", "EPS"])
def test_bad_images(coco, kind):
    if kind == "other size":
        Image.new("RGB", (W + 1, H)).save(coco / "0.png")
    elif kind == "16 bits":
        write_deep(coco / "0.png", "png_color")
    else:
        (coco / "0.png").write_bytes(eps() if kind == "EPS" else b"no image")
    with pytest.raises(ValueError, match=r"image 10: .*0\.png"):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=r"image 10: .*0\.png"):
        example = CocoInstances(coco / "coco.json", coco, on_bad_annotation="skip")[0]
    assert transformed(example)["valid"].tolist() == [0, 0, 0, 0]


def set_rule(coco, rule):
    content = json.loads((coco / "coco.json").read_text())
    content["info"] = {"exif_orientation": rule} if rule else "my data"
    (coco / "coco.json").write_text(json.dumps(content))


def square(coco):
    """Replaces the first image by a square one with one object."""
    array = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(coco / "0.png")
    mask = uncompressed(rectangle(3, 5, 20, 12, (40, 40)))
    change(coco, lambda i, a: [i[0].update(height=40, width=40), a[0].update(segmentation=mask)])
    change(coco, lambda i, a: [a.pop(2), a.pop(1)])


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, "ignored", "applied"])
@pytest.mark.parametrize("is_square", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(coco, orientation, suffix, is_square, rule):
    """Annotations refer to the stored pixels, as in pycocotools, unless the file says otherwise."""
    if is_square:
        square(coco)
    set_rule(coco, rule)
    upright = CocoInstances(coco / "coco.json", coco)[0]
    annotated = np.asarray(upright["image"])
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = turn(annotated, inverse) if rule == "applied" else annotated
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(coco / f"0.{suffix}", exif=exif)
    change(coco, lambda i, _: i[0].update(file_name=f"0.{suffix}"))
    dataset = CocoInstances(coco / "coco.json", coco)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = dataset[0]
        dataset[0]
    np.testing.assert_array_equal(example["image"], annotated)
    np.testing.assert_array_equal(example["masks"], upright["masks"])
    told = [str(warning.message) for warning in caught]
    if rule is None and orientation > 1 and (orientation < 5 or is_square):
        (message,) = told  # warned once
        assert f"image 10 ({coco / f'0.{suffix}'}) has EXIF orientation {orientation}" in message
        assert 'set "exif_orientation" in the annotation file\'s "info" to "applied"' in message
    else:
        assert told == []


@pytest.mark.parametrize("rule", [None, "ignored"])
def test_annotations_that_fit_only_the_upright_image(coco, rule):
    set_rule(coco, rule)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(coco / "0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(coco / "0.png", exif=exif)
    message = (
        r"image 10: .*0\.png: its size is \[70, 55\], but \[55, 70\] is annotated; its EXIF "
        r'orientation is 6, .* set "exif_orientation" in .* "info" to "applied"'
    )
    with pytest.raises(ValueError, match=message):
        CocoInstances(coco / "coco.json", coco)[0]
    set_rule(coco, "applied")
    assert CocoInstances(coco / "coco.json", coco)[0]["image"].shape == (H, W, 3)


@pytest.mark.usefixtures("unchecked")
def test_unknown_on_bad_annotation(coco):
    for annotations in (coco / "coco.json", coco):
        with pytest.raises(
            ValueError, match="on_bad_annotation is 'ignore', expected 'raise' or 'skip'"
        ):
            open_annotations(annotations, coco, on_bad_annotation="ignore")


def test_annotations_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        open_annotations(tmp_path / "nothing.json")


def test_fingerprints(coco):
    with pytest.raises(FileNotFoundError):
        fingerprint(coco / "nope")
    before = fingerprint(coco / "coco.json"), fingerprint(coco)
    assert before == (fingerprint(coco / "coco.json"), fingerprint(coco))
    change(coco, lambda _, a: a.pop())
    (coco / "more.json").write_text("{}")
    after = fingerprint(coco / "coco.json"), fingerprint(coco)
    assert len({*before, *after}) == 4
