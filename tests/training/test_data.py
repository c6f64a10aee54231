import json

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
from PIL import Image
from reference import SMALL

from sam_jax.processing import SamProcessor
from sam_jax.training.data import (
    CocoInstances,
    Prepare,
    SegmentAnything1B,
    batches,
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
    point = {"image_id": 11, "segmentation": [[3, 3, 4, 4]], "iscrowd": 0}
    annotations += [crowd, point, {"image_id": 11, "segmentation": [], "iscrowd": 0}]
    annotations += [
        {"image_id": 12, "segmentation": as_kind(1, box), "iscrowd": 0} for box in RECTANGLES[:2]
    ]
    for i, annotation in enumerate(annotations):
        annotation |= {"id": i + 1, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
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
    # A crowd is none of its objects, nor what has no area.
    assert source[1]["masks"].shape == (0, H, W)
    assert source[2]["masks"].shape == (2, H, W)


def test_sa_1b(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((H, W, 3), i, np.uint8)).save(tmp_path / f"sa_{i}.jpg")
        annotations = [{"segmentation": compressed(rectangle(*box))} for box in RECTANGLES]
        content = {"image": {"file_name": f"sa_{i}.jpg"}, "annotations": annotations}
        (tmp_path / f"sa_{i}.json").write_text(json.dumps(content))
    source = open_source(tmp_path)
    assert isinstance(source, SegmentAnything1B)
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]["masks"], [rectangle(*box) for box in RECTANGLES])
    assert source[1]["image"].mean() == pytest.approx(1, abs=0.5)
    (tmp_path / "sa_0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sa_0.json is no file of SA-1B: KeyError\('image'\)"):
        source[0]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[", ValueError, "is no JSON"),
        ("[]", ValueError, "is no COCO instance file"),
        ('{"images": []}', ValueError, "KeyError\\('annotations'\\)"),
        ('{"images": [], "annotations": []}', ValueError, "no picture of .* has an object"),
        (
            '{"images": [], "annotations": [{"image_id": 5, "segmentation": [[1]]}]}',
            ValueError,
            "an annotation is of the picture 5",
        ),
        (
            '{"images": [{"id": 5, "file_name": "gone.png"}], '
            '"annotations": [{"image_id": 5, "segmentation": [[1]]}]}',
            FileNotFoundError,
            "1 of 1 pictures of .* are missing, the first .*gone.png; is the folder",
        ),
    ],
)
def test_files_that_are_none_of_cocos(tmp_path, content, error, message):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(error, match=message):
        CocoInstances(tmp_path / "coco.json", tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 3], "counts": [9]}, "its size is \\[3, 3\\], but the picture's \\[55, 70\\]"),
        ({"size": [H, W], "counts": [9]}, "its run lengths do not fill the picture"),
        ({"counts": [9]}, "KeyError\\('size'\\)"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
        (["abcdefgh"], "could not convert"),
    ],
)
def test_segmentations_that_cannot_be(coco, segmentation, message):
    content = json.loads((coco / "coco.json").read_text())
    content["annotations"][0]["segmentation"] = segmentation
    (coco / "coco.json").write_text(json.dumps(content))
    source = CocoInstances(coco / "coco.json", coco)
    with pytest.raises(
        ValueError, match=f"a segmentation of .*0.png cannot be read.*{message}|{message}"
    ):
        source[0]
    assert len(source[2]["masks"]) == 2


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


def test_fewer_places_than_objects(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
    chosen = {prepared(example, seed, max_objects=1)["boxes"][0, 0] for seed in range(20)}
    assert len(chosen) == 3


def test_objects_too_small_for_the_grid_are_none(coco):
    example = CocoInstances(coco / "coco.json", coco)[0]
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


def take(data, count):
    iterator = iter(data)
    return [next(iterator) for _ in range(count)]


def assert_same_batch(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        np.testing.assert_array_equal(array, expected[name])


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


def test_hosts_share_the_batch(many):
    options = {"batch_size": 4, "seed": 3}
    whole = take(batches(many, PREPARE, **options), 3)
    parts = [
        take(batches(many, PREPARE, process_index=i, process_count=2, **options), 3) for i in (0, 1)
    ]
    for step, expected in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
        assert_same_batch(joined, expected)
    with pytest.raises(ValueError, match="batch_size is 4, expected a multiple of the 3 hosts"):
        batches(many, PREPARE, process_count=3, **options)
    with pytest.raises(ValueError, match="there are no pictures to train on"):
        batches([], PREPARE, **options)


def test_worker_processes_change_nothing(coco):
    source = CocoInstances(coco / "coco.json", coco)
    expected = take(batches(source, PREPARE, batch_size=2, seed=1, start=2), 3)
    iterator = iter(batches(source, PREPARE, batch_size=2, seed=1, start=2, workers=2))
    try:
        for batch in expected:
            assert_same_batch(next(iterator), batch)
    finally:
        iterator.close()
