"""COCO files, examples and batches of small images."""

import json

import numpy as np
import pycocotools.coco
import pycocotools.mask
from reference import SMALL

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


def change(coco, edit):
    content = json.loads((coco / "coco.json").read_text())
    edit(content["images"], content["annotations"])
    (coco / "coco.json").write_text(json.dumps(content))


def transformed(example, seed=0, **options):
    transform = ExampleTransform(SMALL, **{"max_objects": 4, "target_size": SIDE, **options})
    return transform(example, np.random.default_rng(seed))


def take(data, count):
    iterator = iter(data)
    return [next(iterator) for _ in range(count)]


def assert_same_batch(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        np.testing.assert_array_equal(array, expected[name])


def squares(*sides):
    """An image of 4 times the model's input size, with squares of these sides in a row."""
    size = 4 * SIZE
    masks = np.zeros((len(sides), size, size), bool)
    for k, side in enumerate(sides):
        left = size // 2 + 40 * k
        masks[k, size // 2 : size // 2 + side, left : left + side] = True
    return {"image": np.zeros((size, size, 3), np.uint8), "masks": masks}


# A cell of the grid: 8 of these pixels, 2 of the model's input.
CELL = 4 * SIZE // SIDE
