import os
import re

import pytest
from coco_examples import H, W, change

from sam_jax.training.datasets import (
    CocoInstances,
)

IMAGE = '{"id": 1, "file_name": "i.png", "height": 3, "width": 4}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 200, "is nested 200 levels deep"),
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
def test_files_that_are_not_coco(tmp_path, content, message):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        CocoInstances(tmp_path / "coco.json", tmp_path)


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
            FIRST + "one of its polygons has 7 numbers, expected x and y of each point",
        ),
        (lambda i, a: a[0].pop("image_id"), "image None: annotation 1: it has no image_id"),
        (
            lambda i, a: a[0].update(image_id=5),
            "annotation 1: there is no image with the id 5",
        ),
        (lambda i, a: a[0].update(id=2), "image 10: annotation 2: there are two annotations with"),
        (lambda i, a: i.append({**i[1], "file_name": "x"}), "image 11: there are two images with"),
        (lambda i, a: i[2].update(file_name="gone.png"), "gone.png is missing"),
    ],
)
def test_bad_entries_are_refused_or_skipped(coco, edit, message):
    expected = counts_of(CocoInstances(coco / "coco.json", coco))
    found = left_out(coco, edit, message)
    if "gone" in message:
        expected.pop(12)
    elif "two images" in message:  # its objects belong to an unknown image
        expected.pop(11)
    else:
        expected[10] -= 1
    assert found == expected


def left_out(coco, edit, message):
    """Checks the error and the warning after an edit; returns the numbers of objects left."""
    change(coco, edit)
    with pytest.raises(ValueError, match="has bad entries; fix them, or leave them out") as error:
        CocoInstances(coco / "coco.json", coco)
    assert message in str(error.value)
    with pytest.warns(UserWarning, match="has bad entries, left out") as warned:
        found = counts_of(CocoInstances(coco / "coco.json", coco, on_bad_annotation="skip"))
    assert message in str(warned[0].message)
    return found


def counts_of(dataset):
    return {dataset.image_id(i): len(dataset[i]["masks"]) for i in range(len(dataset))}


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
def test_valid_and_unused_entries_are_accepted(coco, edit):
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
                FIRST + "one of its polygons is",
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
        (
            lambda i, a: a[0].update(image_id="10"),
            "annotation 1: there is no image with the id '10'",
        ),
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
def test_wrong_types_are_refused_or_skipped(coco, edit, message):
    found = left_out(coco, edit, message)
    if "annotation" in message:
        assert found == {10: 2, 11: 1, 12: 2}
    else:  # its annotations are left out with it
        assert found == {11: 1, 12: 2}


def test_long_lists_are_cut(coco):
    change(coco, lambda _, a: a.extend({**a[0], "image_id": 99, "id": 50 + i} for i in range(30)))
    with pytest.raises(ValueError, match=r"image 99: annotation 59: .*\n  and 20 more$"):
        CocoInstances(coco / "coco.json", coco)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("0", "its run lengths do not fill the mask"),
        ("\x00", "is not a string of COCO's run lengths"),
        ("\ud800", "codec can't encode"),
    ],
)
def test_segmentations_that_fail_when_read(coco, counts, message):
    change(coco, lambda _, a: a[0].update(segmentation={"size": [H, W], "counts": counts}))
    match = f"image 10: annotation 1: its segmentation cannot be read: .*{message}"
    with pytest.raises(ValueError, match=match):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=message):
        assert (
            len(CocoInstances(coco / "coco.json", coco, on_bad_annotation="skip")[0]["masks"]) == 2
        )
