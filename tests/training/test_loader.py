import sys

import grain
import numpy as np
import pytest
from coco_examples import (
    CELL,
    RECTANGLES,
    SIDE,
    SIZE,
    H,
    W,
    assert_same_batch,
    rectangle,
    squares,
    take,
    transformed,
)
from reference import SMALL

from sam_jax.errors import MissingExtra
from sam_jax.training.datasets import (
    CocoInstances,
)
from sam_jax.training.loader import check_objects, make_loader
from sam_jax.training.transform import ExampleTransform


def test_batches_have_the_examples_indices(many):
    plain = ExampleTransform(SMALL, 2, target_size=SIDE)
    batch = take(make_loader(many, plain, batch_size=4, seed=0), 1)[0]
    for index, pixels in zip(batch["index"], batch["pixel_values"], strict=True):
        expected = transformed(many[index])["pixel_values"]
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


TRANSFORM = ExampleTransform(SMALL, 2, target_size=SIDE, flip=0.5, scale_range=(0.5, 1.5))


def test_batches_can_resume_anywhere(many):
    options = {"batch_size": 4, "seed": 3}
    whole = take(make_loader(many, TRANSFORM, **options), 6)
    assert whole[0]["pixel_values"].shape == (4, SIZE, SIZE, 3)
    rest = take(make_loader(many, TRANSFORM, start=4, **options), 2)
    for actual, expected in zip(rest, whole[4:], strict=True):
        assert_same_batch(actual, expected)
    other = take(make_loader(many, TRANSFORM, batch_size=4, seed=4), 1)
    assert not np.array_equal(other[0]["pixel_values"], whole[0]["pixel_values"])


def test_an_epoch_has_every_image_once(many):
    plain = ExampleTransform(SMALL, 2, target_size=SIDE)
    pixels = np.concatenate(
        [b["pixel_values"] for b in take(make_loader(many, plain, batch_size=7, seed=0), 2)]
    )
    first, second = ([p.tobytes() for p in part] for part in (pixels[:7], pixels[7:]))
    assert len(set(first)) == 7
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize(("batch_size", "start"), [(4, 0), (2, 0), (2, 3)])
def test_hosts_share_the_batch(many, batch_size, start):
    options = {"batch_size": batch_size, "seed": 3, "start": start}
    whole = take(make_loader(many, TRANSFORM, **options), 3)
    parts = [
        take(make_loader(many, TRANSFORM, process_index=i, process_count=2, **options), 3)
        for i in (0, 1)
    ]
    for step, expected in enumerate(whole):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in expected}
        assert_same_batch(joined, expected)
    with pytest.raises(
        ValueError, match=f"batch_size is {batch_size}, expected a multiple of the 3 hosts"
    ):
        make_loader(many, TRANSFORM, process_count=3, **options)
    with pytest.raises(ValueError, match="there are no images to train on"):
        make_loader([], TRANSFORM, **options)
    for name, value in (("start", -1), ("workers", -1), ("process_count", 0), ("process_index", 1)):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected a whole number of at l"):
            make_loader(many, TRANSFORM, **{"batch_size": 4, "seed": 0, name: value})
    with pytest.raises(ValueError, match="seed is -1, expected a whole number of at least 0"):
        make_loader(many, TRANSFORM, batch_size=2, seed=-1)


@pytest.mark.slow
def test_worker_processes_change_nothing(coco):
    dataset = CocoInstances(coco / "coco.json", coco)
    expected = take(make_loader(dataset, TRANSFORM, batch_size=2, seed=1, start=2), 3)
    iterator = iter(make_loader(dataset, TRANSFORM, batch_size=2, seed=1, start=2, workers=2))
    try:
        for batch in expected:
            assert_same_batch(next(iterator), batch)
    finally:
        iterator.close()


def test_the_order_does_not_depend_on_workers(many, monkeypatch):
    """Simulates the workers in this process, since others start slowly."""
    monkeypatch.setattr(grain.IterDataset, "mp_prefetch", lambda dataset, *_, **__: dataset)
    whole, by_workers = (
        take(make_loader(many, TRANSFORM, batch_size=4, seed=3, start=2, workers=workers), 3)
        for workers in (0, 2)
    )
    for actual, expected in zip(by_workers, whole, strict=True):
        assert_same_batch(actual, expected)


class Read(list):
    """A list of examples that counts how many are read."""

    count = 0

    def __getitem__(self, index):
        self.count += 1
        return super().__getitem__(index)


def test_a_dataset_without_objects_is_refused():
    plain, empty, tiny = ExampleTransform(SMALL, 4, target_size=SIDE), squares(), squares(CELL // 2)
    dataset = Read([squares(2, CELL)] * 4)
    check_objects(dataset, plain)
    assert dataset.count == 1
    check_objects([empty, empty, squares(2, CELL), tiny], plain)
    for transform in (plain, None):
        with pytest.raises(ValueError, match=r"^none of the 2 images that were read has an obj"):
            check_objects([empty, empty], transform)
    with pytest.raises(ValueError, match=r"cell of the target grid, 2 x 2 pi.*--full-resolution"):
        check_objects([empty, tiny], plain)
    check_objects([empty, tiny], ExampleTransform(SMALL, 4, target_size=SIZE))
    check_objects([empty, tiny], None)
    # A random crop often misses it.
    check_objects([tiny], ExampleTransform(SMALL, 4, target_size=SIDE, scale_range=(4, 4)))
    dataset = Read([empty] * 5000)
    with pytest.warns(UserWarning, match=r"none of the 1000 images.* \(the other 4000 were not"):
        check_objects(dataset, None)
    assert dataset.count == 1000
    # Every fifth image has an object, starting with any of the first five.
    for first in range(5):
        check_objects([[tiny, empty][(i - first) % 5 > 0] for i in range(5000)], None)


class Bad(list):
    """A list whose second example cannot be read."""

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
    for dataset, message in (
        (Bad(many), r"^image photo_1: MemoryError\(\)"),
        (wrong, r"^image \d: the masks have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            take(make_loader(dataset, TRANSFORM, batch_size=7, seed=0, workers=workers), 1)


@pytest.mark.usefixtures("unchecked")
def test_a_transform_that_returns_nothing(many):
    with pytest.raises(ValueError, match=r"^image \d: its transform returned None, expected an ex"):
        take(make_loader(many, lambda *_: None, batch_size=4, seed=0), 1)


def test_without_grain(many, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MissingExtra, match=r'grain is not installed; .*"sam_jax\[train\]"'):
        make_loader(many, TRANSFORM, batch_size=4, seed=0)
