import json
import os
import re
import warnings

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
from image_files import eps, write_deep
from PIL import ExifTags, Image
from reference import SMALL

from sam_jax.config import with_preprocessing
from sam_jax.image import turn
from sam_jax.ops.rle import rle_decode
from sam_jax.processing import SamProcessor
from sam_jax.training.datasets import (
    CocoInstances,
    SegmentAnything1B,
    fingerprint,
    open_annotations,
)
from sam_jax.training.loader import check_objects, make_loader
from sam_jax.training.transform import ExampleTransform

SIZE, SIDE = SMALL.image_size, SMALL.mask_size
RECTANGLES = [(5, 8, 25, 30), (40, 10, 60, 45), (12, 35, 30, 50)]  # x0, y0, x1, y1
H, W = 55, 70


def rectangle(x0, y0, x1, y1, size=(H, W)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def uncompressed(mask):
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts if not flat[0] else [0, *counts]}


def compressed(mask):
    rle = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture
def coco(tmp_path):
    """Three pictures: one of three objects, one of a crowd and a point, one of two objects."""
    images, annotations = [], []
    kinds = [
        lambda m, r: [[r[0], r[1], r[2], r[1], r[2], r[3], r[0], r[3]]],
        uncompressed,
        compressed,
    ]

    def as_kind(k, box):
        mask = rectangle(*box)
        return kinds[k](mask, box) if k == 0 else kinds[k](mask)

    for i in range(3):
        array = np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        image = {"id": 10 + i, "file_name": f"{i}.png", "height": H, "width": W}
        images.append({**image, "folder": str(tmp_path)})
    for k, box in enumerate(RECTANGLES):
        annotations.append({"image_id": 10, "segmentation": as_kind(k, box), "iscrowd": 0})
    crowd = {"image_id": 11, "segmentation": uncompressed(rectangle(0, 0, 9, 9)), "iscrowd": 1}
    point = {"image_id": 11, "segmentation": [[3, 3, 4, 4, 3, 3]], "iscrowd": 0}
    annotations += [crowd, point]
    annotations += [
        {"image_id": 12, "segmentation": as_kind(1, box), "iscrowd": 0} for box in RECTANGLES[:2]
    ]
    for i, annotation in enumerate(annotations):
        annotation |= {"id": i + 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
    point["bbox"] = [3, 3, 1, 0]  # as one of COCO's own
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_is_read_as_pycocotools_does(coco):
    source = CocoInstances(coco / "coco.json", coco)
    assert len(source) == 3
    reference = pycocotools.coco.COCO(coco / "coco.json")
    example = source[0]
    np.testing.assert_array_equal(example["image"], np.asarray(Image.open(coco / "0.png")))
    expected = [reference.annToMask(a) for a in reference.loadAnns(reference.getAnnIds([10]))]
    np.testing.assert_array_equal(example["masks"], np.array(expected, bool))
    np.testing.assert_array_equal(example["masks"][1], rectangle(*RECTANGLES[1]))
    assert [source.image_id(i) for i in range(3)] == [10, 11, 12]
    # A crowd is not an object. A mask without a pixel is one, and is counted as too small.
    assert source[1]["masks"].shape == (1, H, W)
    assert not np.any(source[1]["masks"])
    assert prepared(source[1])["dropped"] == 1
    assert source[2]["masks"].shape == (2, H, W)


@pytest.fixture
def sa_1b(tmp_path):
    """Two images of three objects."""
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
    source = open_annotations(sa_1b)
    assert isinstance(source, SegmentAnything1B)
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]["masks"], [rectangle(*box) for box in RECTANGLES])
    assert source[1]["image"].mean() == pytest.approx(1, abs=0.5)
    assert source.image_id(1) == "sa_1"


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


def test_sa_1b_is_of_the_stored_pixels(sa_1b):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for i in range(2):
        with Image.open(sa_1b / f"sa_{i}.jpg") as image:
            image.save(sa_1b / f"sa_{i}.jpg", exif=exif)
    source = open_annotations(sa_1b)
    with pytest.warns(UserWarning, match="has EXIF orientation 3.*store the image upright"):
        assert source[0]["image"].shape == (H, W, 3)
    source[1]  # a second warning would be an error


IMAGE = '{"id": 1, "file_name": "i.png", "height": 3, "width": 4}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 200, "is nested 200 deep"),
        ("[]", "is not a COCO instance file: it is [], expected an object"),
        ("null", "is not a COCO instance file: it is None, expected an object"),
        ('{"images": []}', "it has no annotations"),
        ('{"images": {}, "annotations": []}', "its images is {}, expected a list"),
        ('{"images": [], "annotations": null}', "its annotations is None, expected a list"),
        ('{"images": [], "annotations": []}', "no image of "),
        (
            f'{{"images": [{IMAGE}], "annotations": [], "info": {{"exif_orientation": 6}}}}',
            '"exif_orientation" of its info is 6, expected "applied" or "ignored"',
        ),
    ],
)
def test_files_that_are_not_cocos(tmp_path, content, message):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        CocoInstances(tmp_path / "coco.json", tmp_path)


def change(coco, edit):
    content = json.loads((coco / "coco.json").read_text())
    edit(content["images"], content["annotations"])
    (coco / "coco.json").write_text(json.dumps(content))


FIRST = "image 10: annotation 1: "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i, a: a[0].update(segmentation=[]), FIRST + "its segmentation is empty"),
        (lambda i, a: a[0].update(segmentation=[[1, 2]]), FIRST + "its segmentation is empty"),
        (
            lambda i, a: a[0].update(segmentation={"size": [3, 3], "counts": [9]}),
            FIRST + "its size is [3, 3], but the image's is [55, 70]",
        ),
        (
            lambda i, a: a[0].update(segmentation={"size": [H, W], "counts": [9]}),
            FIRST + "its run lengths do not fill the mask: their sum is 9",
        ),
        (
            lambda i, a: a[0].update(segmentation={"counts": [9]}),
            FIRST + "it has no size",
        ),
        (
            lambda i, a: a[0].update(segmentation=[[5, 8, 25, 8, 25, 30, 5]]),
            FIRST + "a polygon of it has 7 numbers, expected x and y of each point",
        ),
        (lambda i, a: a[0].pop("image_id"), "image None: annotation 1: it has no image_id"),
        (
            lambda i, a: a[0].update(image_id=5),
            "annotation 1: there is no image of the id 5",
        ),
        (lambda i, a: a[0].update(id=2), "image 10: annotation 2: there are two annotations of"),
        (lambda i, a: i.append({**i[1], "file_name": "x"}), "image 11: there are two images of"),
        (lambda i, a: i[2].update(file_name="gone.png"), "gone.png is missing"),
    ],
)
def test_bad_entries_are_named_by_image_and_refused_or_left_out(coco, edit, message):
    expected = counts_of(CocoInstances(coco / "coco.json", coco))
    change(coco, edit)
    with pytest.raises(ValueError, match="has bad entries; mend them, or leave them out") as error:
        CocoInstances(coco / "coco.json", coco)
    assert message in str(error.value)
    with pytest.warns(UserWarning, match="has bad entries, left out") as warned:
        found = counts_of(CocoInstances(coco / "coco.json", coco, "skip"))
    assert message in str(warned[0].message)
    if "gone" in message:
        expected.pop(12)
    elif "two images" in message:  # whose objects they are cannot be known
        expected.pop(11)
    else:
        expected[10] -= 1
    assert found == expected


def counts_of(source):
    return {source.image_id(i): len(source[i]["masks"]) for i in range(len(source))}


WHOLE = [H * 5.0, 3.0, (H * (W - 5)) - 3.0]


def as_float(entry, *names):
    for name in names:
        entry[name] = float(entry[name])


@pytest.mark.parametrize(
    "edit",
    [
        lambda i, a: a[1]["segmentation"].update(size=[float(H), float(W)]),
        lambda i, a: a[0].update(segmentation={"size": [H, W], "counts": WHOLE}),
        lambda i, a: as_float(i[0], "id", "height", "width"),
        lambda i, a: as_float(a[0], "id", "image_id", "iscrowd"),
        lambda i, a: a[0].update(iscrowd=False),
        lambda i, a: a[0].update(iscrowd=None),
        lambda i, a: a[0].pop("iscrowd"),
        lambda i, a: a[3].update(iscrowd=True),
        lambda i, a: a[3].update(iscrowd=1.0, segmentation=None, image_id=None),  # not used
        lambda i, a: (
            [x.update(image_id=str(x["image_id"])) for x in a]
            and [x.update(id=str(x["id"])) for x in i]
        ),
        lambda i, a: [x.pop("id") for x in a],
        *[
            lambda i, a, name=name, value=value: a[0].update({name: value})
            for name in ("bbox", "area", "category_id")
            for value in (None, "x", [1, 2], {}, -1, [60, 10, 30, 5])
        ],
        lambda i, a: [a[0].pop(name) for name in ("bbox", "area", "category_id")],
        lambda i, a: i[0].update(file_name="./folder/../0.png"),
        lambda i, a: i[0].update(file_name=os.path.abspath(i[0]["folder"] + "/0.png")),
    ],
)
def test_whole_numbers_are_taken_and_what_is_not_used_is_not_looked_at(coco, edit):
    expected = [3, 1, 2]
    change(coco, edit)
    assert list(counts_of(CocoInstances(coco / "coco.json", coco)).values()) == expected


NOT_WHOLE = [None, "x", [], {}, 1.5, float("nan"), float("inf"), True]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *[
            (lambda i, a, value=value: a[0].update(iscrowd=value), FIRST + "its iscrowd is ")
            for value in ["0", "", [], {}, 2, -1, 0.5, float("nan")]
        ],
        *[
            (
                lambda i, a, value=value: a[0].update(segmentation=value),
                FIRST + "its segmentation is ",
            )
            for value in [None, True, 5, 0, "x", ""]
        ],
        *[
            (
                lambda i, a, value=value: a[0].update(segmentation=value),
                FIRST + "a polygon of it is",
            )
            for value in [
                [5, 8, 25, 8, 25, 30],
                [[[5, 8], [25, 8], [25, 30]]],
                ["abcdef"],
                [[5, 8, 25, 8, 25, "30"]],
                [[5, 8, 25, 8, 25, None]],
                [[5, 8, 25, 8, 25, True]],
                [None],
                [{}],
            ]
        ],
        *[
            (
                lambda i, a, value=value: a[0].update(segmentation=[[5, 8, 25, 8, 25, value]]),
                FIRST + "its polygons are not finite or reach beyond 16 times the image",
            )
            for value in [float("nan"), float("inf"), -float("inf"), 1e12, 10**400]
        ],
        (
            lambda i, a: a[0].update(segmentation=[[80, 5, 90, 5, 90, 9]]),
            FIRST + "its polygons are outside the image of 70 x 55",
        ),
        *[
            (
                lambda i, a, value=value: a[0].update(segmentation={"size": value, "counts": "0"}),
                FIRST + "its size is ",
            )
            for value in [None, 55, "55", [55], [W, H], [H, 70.5], [H, "70"], [H, W, 3], [H, True]]
        ],
        *[
            (
                lambda i, a, value=value: a[0].update(
                    segmentation={"size": [H, W], "counts": value}
                ),
                FIRST + message,
            )
            for value, message in [
                (None, "its counts is None, expected a list or a string"),
                (5, "its counts is 5"),
                ({}, "its counts is {}"),
                (["9"], "its run length is '9', expected a whole number"),
                ([0.5, H * W - 0.5], "its run length is 0.5"),
                ([True, H * W - 1], "its run length is True"),
                ([None], "its run length is None"),
                ([float("nan")], "its run length is nan"),
                ([H * W + 5, -5], "its run lengths do not fill the mask"),
                ([], "its run lengths do not fill the mask"),
            ]
        ],
        *[
            (
                lambda i, a, value=value: a[0].update(image_id=value),
                f"image {value}: annotation 1: ",
            )
            for value in NOT_WHOLE
            if value != "x"
        ],
        (lambda i, a: a[0].update(image_id="10"), "annotation 1: there is no image of the id '10'"),
        *[
            (lambda i, a, value=value: a[0].update(id=value), f"image 10: annotation {value}: its ")
            for value in NOT_WHOLE
            if value not in (None, "x")
        ],
        *[
            (lambda i, a, value=value: a.__setitem__(0, value), "annotations[0]: it is ")
            for value in [None, 5, "x", []]
        ],
        *[
            (lambda i, a, value=value: i[0].update(id=value), "images[0]: its id is ")
            for value in NOT_WHOLE
            if value != "x"
        ],
        *[
            (lambda i, a, value=value: i.__setitem__(0, value), "images[0]: it is ")
            for value in [None, 5, "x", []]
        ],
        (lambda i, a: i[0].pop("id"), "images[0]: it has no id"),
        *[
            (lambda i, a, name=name: i[0].pop(name), f"image 10: it has no {name}")
            for name in ("file_name", "height", "width")
        ],
        *[
            (
                lambda i, a, name=name, value=value: i[0].update({name: value}),
                f"image 10: its {name} is ",
            )
            for name in ("height", "width")
            for value in NOT_WHOLE
        ],
        (lambda i, a: i[0].update(height=0), "image 10: its height and width are 0 and 70"),
        *[
            (lambda i, a, value=value: i[0].update(file_name=value), "image 10: its file_name ")
            for value in [None, 5, [], "/etc/hostname", "../0.png", "a/../../0.png"]
        ],
        *[
            (lambda i, a, value=value: i[0].update(file_name=value), " is missing")
            for value in ["", ".", "a\0b.png", "x" * 5000, "\ud800.png"]
        ],
    ],
)
def test_values_of_another_type_are_named_and_refused_or_left_out(coco, edit, message):
    change(coco, edit)
    with pytest.raises(ValueError, match="has bad entries; mend them, or leave them out") as error:
        CocoInstances(coco / "coco.json", coco)
    assert message in str(error.value)
    with pytest.warns(UserWarning, match="has bad entries, left out") as warned:
        found = counts_of(CocoInstances(coco / "coco.json", coco, "skip"))
    assert message in str(warned[0].message)
    if "annotation" in message:
        assert found == {10: 2, 11: 1, 12: 2}
    else:  # whose annotations are left out with it
        assert found == {11: 1, 12: 2}


def test_long_lists_are_cut(coco):
    change(coco, lambda _, a: a.extend({**a[0], "image_id": 99, "id": 50 + i} for i in range(30)))
    with pytest.raises(ValueError, match=r"image 99: annotation 59: .*\n  and 20 more$"):
        CocoInstances(coco / "coco.json", coco)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("0", "its run lengths do not fill the mask"),
        ("\x00", "is no string of COCO's run lengths"),
        ("\ud800", "codec can't encode"),
    ],
)
def test_segmentations_that_show_only_when_they_are_read(coco, counts, message):
    change(coco, lambda _, a: a[0].update(segmentation={"size": [H, W], "counts": counts}))
    match = f"image 10: annotation 1: its segmentation cannot be read: .*{message}"
    with pytest.raises(ValueError, match=match):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=message):
        assert len(CocoInstances(coco / "coco.json", coco, "skip")[0]["masks"]) == 2


@pytest.mark.parametrize("kind", ["damaged", "other size", "16 bits", "EPS"])
def test_images_that_are_bad(coco, kind):
    if kind == "other size":
        Image.new("RGB", (W + 1, H)).save(coco / "0.png")
    elif kind == "16 bits":
        write_deep(coco / "0.png", "png_color")
    else:
        (coco / "0.png").write_bytes(eps() if kind == "EPS" else b"no image")
    with pytest.raises(ValueError, match=r"image 10: .*0\.png"):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=r"image 10: .*0\.png"):
        example = CocoInstances(coco / "coco.json", coco, "skip")[0]
    assert prepared(example)["valid"].tolist() == [0, 0, 0, 0]


def set_rule(coco, rule):
    content = json.loads((coco / "coco.json").read_text())
    content["info"] = {"exif_orientation": rule} if rule else "my data"
    (coco / "coco.json").write_text(json.dumps(content))


def square(coco):
    """Makes the first image a square one, of one object."""
    array = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(coco / "0.png")
    mask = uncompressed(rectangle(3, 5, 20, 12, (40, 40)))
    change(coco, lambda i, a: [i[0].update(height=40, width=40), a[0].update(segmentation=mask)])
    change(coco, lambda i, a: [a.pop(2), a.pop(1)])


@pytest.mark.parametrize("rule", [None, "ignored", "applied"])
@pytest.mark.parametrize("is_square", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_an_exif_orientation_does(coco, orientation, suffix, is_square, rule):
    """Annotations are of the stored pixels, as in pycocotools, if it is not said otherwise."""
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
    source = CocoInstances(coco / "coco.json", coco)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = source[0]
        source[0]
    np.testing.assert_array_equal(example["image"], annotated)
    np.testing.assert_array_equal(example["masks"], upright["masks"])
    told = [str(warning.message) for warning in caught]
    if rule is None and orientation > 1 and (orientation < 5 or is_square):
        (message,) = told  # once
        assert f"image 10 ({coco / f'0.{suffix}'}) has EXIF orientation {orientation}" in message
        assert 'set "exif_orientation" in the annotation file\'s "info" to "applied"' in message
    else:
        assert told == []


@pytest.mark.parametrize("rule", [None, "ignored"])
def test_a_turned_image_whose_annotations_fit_only_when_it_is_upright(coco, rule):
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
def test_other_ways_with_bad_annotations(coco):
    for annotations in (coco / "coco.json", coco):
        with pytest.raises(
            ValueError, match="on_bad_annotation is 'ignore', expected 'raise' or 'skip'"
        ):
            open_annotations(annotations, coco, "ignore")


def prepared(example, seed=0, **options):
    prepare = ExampleTransform(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})
    return prepare(example, np.random.default_rng(seed))


def test_a_prepared_example(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    result = prepared(example)
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
    """MedSAM's preprocessing: the axes of picture, masks and boxes are scaled apart."""
    example = CocoInstances(coco / "coco.json", coco)[0]
    config = with_preprocessing(SMALL, "medsam")
    result = ExampleTransform(config, 3, SIDE)(example, np.random.default_rng(0))
    expected = SamProcessor(config).preprocess(example["image"])
    np.testing.assert_array_equal(result["pixel_values"], expected)
    scale = SIZE / np.array([W, H, W, H])
    np.testing.assert_allclose(result["boxes"], np.array(RECTANGLES) * scale - [0, 0, 1, 1], atol=1)
    for mask, box in zip(result["masks"], RECTANGLES, strict=True):
        ys, xs = np.nonzero(mask)
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * SIZE / SIDE
        np.testing.assert_allclose(found, np.array(box) * scale, atol=2)  # a cell of the grid


def test_fewer_places_than_objects(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    chosen = {prepared(example, seed, max_objects=1)["boxes"][0, 0] for seed in range(20)}
    assert len(chosen) == 3


def test_only_chosen_objects_are_decoded(coco, monkeypatch):
    example = CocoInstances(coco / "coco.json", coco)[0]
    every = {**example, "masks": np.asarray(example["masks"])}
    decoded = []
    spy = lambda rle: decoded.append(rle) or rle_decode(rle)  # noqa: E731
    monkeypatch.setattr("sam_jax.training.datasets.rle_decode", spy)
    for seed in range(3):
        assert_same_batch(
            prepared(example, seed, max_objects=1), prepared(every, seed, max_objects=1)
        )
    assert len(decoded) == 3
    np.testing.assert_array_equal(list(example["masks"]), every["masks"])
    np.testing.assert_array_equal(example["masks"][1:], every["masks"][1:])


def test_objects_too_small_for_the_grid_are_none(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    example["masks"] = np.array(example["masks"])
    example["masks"][1] = rectangle(3, 3, 4, 4)
    assert prepared(example)["valid"].tolist() == [1, 1, 0, 0]
    assert prepared(example, target_size=SIZE)["valid"].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("target_size", [SIDE, SIZE])
@pytest.mark.parametrize("options", [{"flip": 1.0}, {"scale_range": (0.3, 2.0)}], ids=str)
def test_augmented_masks_lie_on_their_objects(options, target_size):
    """The object is white: the picture tells where the mask has to be."""
    mask = rectangle(30, 10, 62, 40, (60, 90))
    image = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    example = {"image": image, "masks": mask[None]}
    grey = SamProcessor(SMALL).normalize(np.full((1, 1, 3), 128, np.uint8))[0, 0]
    seen = set()
    for seed in range(25):
        result = prepared(example, seed, target_size=target_size, **options)
        if not result["valid"][0]:
            continue
        cell = SIZE // target_size
        shown = (result["pixel_values"] >= grey).all(-1)
        shown = shown.reshape(target_size, cell, target_size, cell).mean((1, 3)) >= 0.5
        both, either = (shown & result["masks"][0]).sum(), (shown | result["masks"][0]).sum()
        assert both / either > 0.85
        seen.add(int(result["boxes"][0, 0]))
    assert len(seen) == 1 if "flip" in options else len(seen) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_objects": 0}, "max_objects is 0, expected at least 1"),
        ({"target_size": 0}, "target_size is 0, expected a divisor of the model's input size"),
        ({"target_size": SIDE + 1}, f"target_size is {SIDE + 1}, expected a divisor of"),
        ({"flip": 1.5}, "flip is 1.5, expected 0 to 1"),
        ({"scale_range": (0, 1)}, r"scale_range is \(0, 1\), expected two numbers above 0"),
        ({"scale_range": (2.0, 1.0)}, r"scale_range is \(2.0, 1.0\), expected two numbers"),
    ],
)
def test_numbers_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleTransform(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})


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
    ],
)
def test_masks_that_are_none_of_the_pictures(masks, error, message):
    with pytest.raises(error, match=message):
        prepared({"image": np.zeros((H, W, 3), np.uint8), "masks": masks})


def test_fingerprints(coco):
    before = fingerprint(coco / "coco.json"), fingerprint(coco)
    assert before == (fingerprint(coco / "coco.json"), fingerprint(coco))
    change(coco, lambda _, a: a.pop())
    (coco / "more.json").write_text("{}")
    after = fingerprint(coco / "coco.json"), fingerprint(coco)
    assert len({*before, *after}) == 4


def take(data, count):
    iterator = iter(data)
    return [next(iterator) for _ in range(count)]


def assert_same_batch(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        np.testing.assert_array_equal(array, expected[name])


def test_batches_know_their_examples(many):
    plain = ExampleTransform(SMALL, 2, SIDE)
    batch = take(make_loader(many, plain, batch_size=4, seed=0), 1)[0]
    for index, pixels in zip(batch["index"], batch["pixel_values"], strict=True):
        expected = prepared(many[index])["pixel_values"]
        np.testing.assert_array_equal(pixels, expected)


@pytest.fixture
def many():
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 255, (H, W, 3), dtype=np.uint8),
            "masks": np.array([rectangle(*box) for box in RECTANGLES]),
        }
        for _ in range(7)
    ]


PREPARE = ExampleTransform(SMALL, 2, SIDE, flip=0.5, scale_range=(0.5, 1.5))


def test_batches_can_go_on_anywhere(many):
    options = {"batch_size": 4, "seed": 3}
    whole = take(make_loader(many, PREPARE, **options), 6)
    assert whole[0]["pixel_values"].shape == (4, SIZE, SIZE, 3)
    rest = take(make_loader(many, PREPARE, start=4, **options), 2)
    for actual, expected in zip(rest, whole[4:], strict=True):
        assert_same_batch(actual, expected)
    other = take(make_loader(many, PREPARE, batch_size=4, seed=4), 1)
    assert not np.array_equal(other[0]["pixel_values"], whole[0]["pixel_values"])


def test_an_epoch_has_every_picture_once(many):
    plain = ExampleTransform(SMALL, 2, SIDE)
    pixels = np.concatenate(
        [b["pixel_values"] for b in take(make_loader(many, plain, batch_size=7, seed=0), 2)]
    )
    first, second = ([p.tobytes() for p in part] for part in (pixels[:7], pixels[7:]))
    assert len(set(first)) == 7
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize("batch_size", [4, 2])
def test_hosts_share_the_batch(many, batch_size):
    options = {"batch_size": batch_size, "seed": 3}
    whole = take(make_loader(many, PREPARE, **options), 3)
    parts = [
        take(make_loader(many, PREPARE, process_index=i, process_count=2, **options), 3)
        for i in (0, 1)
    ]
    for step, expected in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
        assert_same_batch(joined, expected)
    with pytest.raises(
        ValueError, match=f"batch_size is {batch_size}, expected a multiple of the 3 hosts"
    ):
        make_loader(many, PREPARE, process_count=3, **options)
    with pytest.raises(ValueError, match="there are no pictures to train on"):
        make_loader([], PREPARE, **options)
    with pytest.raises(ValueError, match="seed is -1, expected 0 or above"):
        make_loader(many, PREPARE, batch_size=2, seed=-1)


@pytest.mark.slow
def test_worker_processes_change_nothing(coco):
    source = CocoInstances(coco / "coco.json", coco)
    expected = take(make_loader(source, PREPARE, batch_size=2, seed=1, start=2), 3)
    iterator = iter(make_loader(source, PREPARE, batch_size=2, seed=1, start=2, workers=2))
    try:
        for batch in expected:
            assert_same_batch(next(iterator), batch)
    finally:
        iterator.close()


def squares(*sides):
    """An image four times the model's input, with squares of these sides from its middle."""
    size = 4 * SIZE
    masks = np.zeros((len(sides), size, size), bool)
    for k, side in enumerate(sides):
        left = size // 2 + 40 * k
        masks[k, size // 2 : size // 2 + side, left : left + side] = True
    return {"image": np.zeros((size, size, 3), np.uint8), "masks": masks}


# A cell of the grid: 8 of these pixels, 2 of the model's input.
CELL = 4 * SIZE // SIDE


def test_objects_that_are_too_small_are_counted():
    example = squares(3 * CELL, CELL, CELL // 2, 1)
    for options, used, dropped in (({}, 2, 2), ({"target_size": SIZE}, 3, 1)):
        result = prepared(example, **options)
        assert (result["valid"].sum(), result["dropped"]) == (used, dropped)
    # What a crop leaves out is not too small.
    found = [prepared(squares(3 * CELL), seed, scale_range=(3, 3)) for seed in range(20)]
    assert {float(result["valid"].sum()) for result in found} == {0, 1}
    assert all(result["dropped"] == 0 for result in found)
    assert prepared(squares())["dropped"] == 0
    batch = take(make_loader([example], ExampleTransform(SMALL, 4, SIDE), batch_size=2, seed=0), 1)[
        0
    ]
    assert batch["dropped"].tolist() == [2, 2]


class Read(list):
    """Examples, which counts how many are read."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        return super().__getitem__(index)


def test_a_source_without_objects_is_refused():
    plain, empty, tiny = ExampleTransform(SMALL, 4, SIDE), squares(), squares(CELL // 2)
    source = Read([squares(2, CELL)] * 4)
    check_objects(source, plain)
    assert source.count == 1
    check_objects([empty, empty, squares(2, CELL), tiny], plain)
    for prepare in (plain, None):
        with pytest.raises(ValueError, match=r"^none of the 2 images that were read has an obj"):
            check_objects([empty, empty], prepare)
    with pytest.raises(ValueError, match=r"cell of the target grid, 2 x 2 pi.*--full-resolution"):
        check_objects([empty, tiny], plain)
    check_objects([empty, tiny], ExampleTransform(SMALL, 4, SIZE))
    check_objects([empty, tiny], None)
    # A random crop often misses it.
    check_objects([tiny], ExampleTransform(SMALL, 4, SIDE, scale_range=(4, 4)))
    source = Read([empty] * 5000)
    with pytest.warns(UserWarning, match=r"none of the 1000 images.* \(the other 4000 were not"):
        check_objects(source, None)
    assert source.count == 1000
    # Every fifth image has an object, wherever one begins to count.
    for first in range(5):
        check_objects([[tiny, empty][(i - first) % 5 > 0] for i in range(5000)], None)


class Bad(list):
    """Its second example cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise MemoryError
        return super().__getitem__(index)

    def image_id(self, index):
        return f"photo_{index}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_image(many, workers):
    wrong = [{**example, "masks": example["masks"][:, 1:]} for example in many]
    for source, message in (
        (Bad(many), r"^image photo_1: MemoryError\(\)"),
        (wrong, r"^image \d: the masks have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            take(make_loader(source, PREPARE, batch_size=7, seed=0, workers=workers), 1)
