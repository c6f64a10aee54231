import json

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
from PIL import ExifTags, Image
from reference import SMALL

from sam_jax.config import with_preprocessing
from sam_jax.ops.masks import rle_decode
from sam_jax.processing import SamProcessor
from sam_jax.training.data import (
    CocoInstances,
    Prepare,
    SegmentAnything1B,
    batches,
    check_objects,
    fingerprint,
    open_source,
)

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
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": H, "width": W})
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
    # A crowd is none of its objects, nor what has no area.
    assert source[1]["masks"].shape == (0, H, W)
    assert source[2]["masks"].shape == (2, H, W)


def test_sa_1b(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((H, W, 3), i, np.uint8)).save(tmp_path / f"sa_{i}.jpg")
        annotations = [{"segmentation": compressed(rectangle(*box))} for box in RECTANGLES]
        image = {"image_id": i, "file_name": f"sa_{i}.jpg", "height": H, "width": W}
        content = {"image": image, "annotations": annotations}
        (tmp_path / f"sa_{i}.json").write_text(json.dumps(content))
    source = open_source(tmp_path)
    assert isinstance(source, SegmentAnything1B)
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]["masks"], [rectangle(*box) for box in RECTANGLES])
    assert source[1]["image"].mean() == pytest.approx(1, abs=0.5)
    assert source.image_id(1) == "sa_1"
    (tmp_path / "sa_0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"image sa_0: .* no file of SA-1B: KeyError\('image'\)"):
        source[0]
    with pytest.warns(UserWarning, match="image sa_0"):
        assert len(open_source(tmp_path, bad_annotations="skip")[0]["masks"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ("[]", "is no COCO instance file"),
        ('{"images": []}', "KeyError\\('annotations'\\)"),
        ('{"images": [], "annotations": []}', "no picture of .* has an object"),
        ('{"images": [{}], "annotations": []}', "KeyError\\('id'\\); expected images of id"),
    ],
)
def test_files_that_are_none_of_cocos(tmp_path, content, message):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ValueError, match=message):
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
        (lambda i, a: a[0].update(bbox=[60, 10, 30, 5]), FIRST + "its box [60, 10, 30, 5] is not"),
        (lambda i, a: a[0].update(bbox=[6, 10, -1, 5]), FIRST + "its box [6, 10, -1, 5] is not"),
        (
            lambda i, a: a[0].update(segmentation={"size": [3, 3], "counts": [9]}),
            FIRST + "its size is [3, 3], but the picture's [55, 70]",
        ),
        (
            lambda i, a: a[0].update(segmentation={"size": [H, W], "counts": [9]}),
            FIRST + "its run lengths do not fill the picture",
        ),
        (
            lambda i, a: a[0].update(segmentation={"counts": [9]}),
            FIRST + "it cannot be read: KeyError('size')",
        ),
        (
            lambda i, a: a[0].update(segmentation=[[5, 8, 25, 8, 25, 30, 5]]),
            FIRST + "a polygon of it has 7 numbers, expected x and y of each point",
        ),
        (lambda i, a: a[0].pop("image_id"), "image None: annotation 1: it has no image_id"),
        (lambda i, a: a[0].update(image_id=5), "image 5: annotation 1: there is no picture of"),
        (lambda i, a: a[0].update(id=2), "image 10: annotation 2: there are two annotations of"),
        (lambda i, a: i.append({**i[1], "file_name": "x"}), "image 11: there are two pictures of"),
        (lambda i, a: i[2].update(file_name="gone.png"), "gone.png is missing"),
    ],
)
def test_bad_entries_are_named_by_image_and_refused_or_left_out(coco, edit, message):
    def counts(source):
        return {source.image_id(i): len(source[i]["masks"]) for i in range(len(source))}

    expected = counts(CocoInstances(coco / "coco.json", coco))
    change(coco, edit)
    with pytest.raises(ValueError, match="has bad entries; mend them, or leave them out") as error:
        CocoInstances(coco / "coco.json", coco)
    assert message in str(error.value)
    with pytest.warns(UserWarning, match="has bad entries, left out") as warned:
        found = counts(CocoInstances(coco / "coco.json", coco, "skip"))
    assert message in str(warned[0].message)
    if "gone" in message:
        expected.pop(12)
    elif "two pictures" in message:  # whose objects they are cannot be known
        expected.pop(11)
    else:
        expected[10] -= 1
    assert found == expected


@pytest.mark.parametrize(
    ("corner", "outwards"),
    [((-1, 9), (-1, 0)), ((9, -1), (0, -1)), ((W - 4, 9), (1, 0)), ((9, H - 4), (0, 1))],
    ids=["left", "top", "right", "bottom"],
)
def test_boxes_may_be_a_pixel_beyond_the_picture(coco, corner, outwards):
    """By rounding; here one of 5 x 5."""
    change(coco, lambda _, a: a[0].update(bbox=[*corner, 5, 5]))
    assert len(CocoInstances(coco / "coco.json", coco)[0]["masks"]) == 3
    further = (np.array(corner) + np.array(outwards) / 2).tolist()
    change(coco, lambda _, a: a[0].update(bbox=[*further, 5, 5]))
    with pytest.raises(ValueError, match="is not within the picture of 70 x 55"):
        CocoInstances(coco / "coco.json", coco)


def test_long_lists_are_cut(coco):
    change(coco, lambda _, a: a.extend({**a[0], "image_id": 99, "id": 50 + i} for i in range(30)))
    with pytest.raises(ValueError, match=r"image 99: annotation 59: .*\n  and 20 more$"):
        CocoInstances(coco / "coco.json", coco)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [H, W], "counts": "0"}, "its run lengths do not fill the mask"),
        ({"size": [H, W], "counts": "\x00"}, "is no string of COCO's run lengths"),
        ({"size": [H, W], "counts": [H * W + 5, -5]}, "its run lengths do not fill the mask"),
        ({"size": [H, W], "counts": [0.5, H * W - 0.5]}, "its run lengths do not fill the mask"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
        ([[1, 2, 3, 4, 5, 1e12]], "reach beyond 16 times the picture"),
        (["abcdefgh"], "could not convert"),
    ],
)
def test_segmentations_that_show_only_when_they_are_read(coco, segmentation, message):
    change(coco, lambda _, a: a[0].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=f"image 10: a segmentation cannot be read: .*{message}"):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=message):
        assert len(CocoInstances(coco / "coco.json", coco, "skip")[0]["masks"]) == 2


@pytest.mark.parametrize("content", [b"no picture", None], ids=["damaged", "other size"])
def test_pictures_that_are_bad(coco, content):
    if content is None:
        Image.new("RGB", (W + 1, H)).save(coco / "0.png")
    else:
        (coco / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image 10: .*0\.png"):
        CocoInstances(coco / "coco.json", coco)[0]
    with pytest.warns(UserWarning, match=r"image 10: .*0\.png"):
        example = CocoInstances(coco / "coco.json", coco, "skip")[0]
    assert prepared(example)["valid"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_turns_no_picture(coco, orientation):
    """As in pycocotools, which knows nothing of it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = CocoInstances(coco / "coco.json", coco)[0]["image"]
    Image.fromarray(stored).save(coco / "0.png", exif=exif)
    source = CocoInstances(coco / "coco.json", coco)
    np.testing.assert_array_equal(source[0]["image"], stored)
    Image.fromarray(stored.swapaxes(0, 1)).save(coco / "0.png", exif=exif)
    with pytest.raises(ValueError, match=r"it has \(70, 55\) pixels, but \(55, 70\)") as error:
        source[0]
    assert ("EXIF orientation is 6, and its annotations" in str(error.value)) == (orientation == 6)


@pytest.mark.usefixtures("unchecked")
def test_other_ways_with_bad_annotations(coco):
    for annotations in (coco / "coco.json", coco):
        with pytest.raises(
            ValueError, match="bad_annotations is 'ignore', expected 'refuse' or 'skip'"
        ):
            open_source(annotations, coco, "ignore")


def prepared(example, seed=0, **options):
    prepare = Prepare(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})
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
    result = Prepare(config, 3, SIDE)(example, np.random.default_rng(0))
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
    monkeypatch.setattr("sam_jax.training.data.rle_decode", spy)
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
        Prepare(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})


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
    plain = Prepare(SMALL, 2, SIDE)
    batch = take(batches(many, plain, batch_size=4, seed=0), 1)[0]
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


PREPARE = Prepare(SMALL, 2, SIDE, flip=0.5, scale_range=(0.5, 1.5))


def test_batches_can_go_on_anywhere(many):
    options = {"batch_size": 4, "seed": 3}
    whole = take(batches(many, PREPARE, **options), 6)
    assert whole[0]["pixel_values"].shape == (4, SIZE, SIZE, 3)
    rest = take(batches(many, PREPARE, start=4, **options), 2)
    for actual, expected in zip(rest, whole[4:], strict=True):
        assert_same_batch(actual, expected)
    other = take(batches(many, PREPARE, batch_size=4, seed=4), 1)
    assert not np.array_equal(other[0]["pixel_values"], whole[0]["pixel_values"])


def test_an_epoch_has_every_picture_once(many):
    plain = Prepare(SMALL, 2, SIDE)
    pixels = np.concatenate(
        [b["pixel_values"] for b in take(batches(many, plain, batch_size=7, seed=0), 2)]
    )
    first, second = ([p.tobytes() for p in part] for part in (pixels[:7], pixels[7:]))
    assert len(set(first)) == 7
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize("batch_size", [4, 2])
def test_hosts_share_the_batch(many, batch_size):
    options = {"batch_size": batch_size, "seed": 3}
    whole = take(batches(many, PREPARE, **options), 3)
    parts = [
        take(batches(many, PREPARE, process_index=i, process_count=2, **options), 3) for i in (0, 1)
    ]
    for step, expected in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
        assert_same_batch(joined, expected)
    with pytest.raises(
        ValueError, match=f"batch_size is {batch_size}, expected a multiple of the 3 hosts"
    ):
        batches(many, PREPARE, process_count=3, **options)
    with pytest.raises(ValueError, match="there are no pictures to train on"):
        batches([], PREPARE, **options)
    with pytest.raises(ValueError, match="seed is -1, expected 0 or above"):
        batches(many, PREPARE, batch_size=2, seed=-1)


def test_worker_processes_change_nothing(coco):
    source = CocoInstances(coco / "coco.json", coco)
    expected = take(batches(source, PREPARE, batch_size=2, seed=1, start=2), 3)
    iterator = iter(batches(source, PREPARE, batch_size=2, seed=1, start=2, workers=2))
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
    batch = take(batches([example], Prepare(SMALL, 4, SIDE), batch_size=2, seed=0), 1)[0]
    assert batch["dropped"].tolist() == [2, 2]


class Read(list):
    """Examples, which counts how many are read."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        return super().__getitem__(index)


def test_a_source_without_objects_is_refused():
    plain, empty, tiny = Prepare(SMALL, 4, SIDE), squares(), squares(CELL // 2)
    source = Read([empty, empty, squares(2, CELL), tiny])
    check_objects(source, plain)
    assert source.count == 3
    for prepare in (plain, None):
        with pytest.raises(ValueError, match=r"^none of the 2 images that were read has an obj"):
            check_objects([empty, empty], prepare)
    with pytest.raises(ValueError, match=r"cell of the target grid, 2 x 2 pi.*--full-resolution"):
        check_objects([empty, tiny], plain)
    check_objects([empty, tiny], Prepare(SMALL, 4, SIZE))
    check_objects([empty, tiny], None)
    # A random crop often misses it.
    check_objects([tiny], Prepare(SMALL, 4, SIDE, scale_range=(4, 4)))
    source = Read([empty] * 5000)
    with pytest.raises(ValueError, match="none of the 1000 images"):
        check_objects(source, None)
    assert source.count == 1000


class Bad(list):
    """Its second example cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise MemoryError
        return super().__getitem__(index)

    def image_id(self, index):
        return f"photo_{index}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_image(many, workers):
    wrong = [{**example, "masks": example["masks"][:, 1:]} for example in many]
    for source, message in (
        (Bad(many), r"^image photo_1: MemoryError\(\)"),
        (wrong, r"^image \d: the masks have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            take(batches(source, PREPARE, batch_size=7, seed=0, workers=workers), 1)
