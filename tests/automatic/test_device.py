import pytest
from everything import (
    assert_same_records,
    generator,
    picture,
)

from sam_jax.automatic.device import chunk_sizes


@pytest.mark.parametrize("points_per_batch", [1, 7, 1024])
def test_points_per_batch_changes_nothing(points_per_batch):
    image = picture(100, 75)
    expected = generator(points_per_side=9).generate(image)  # 81 points, 64 at a time
    actual = generator(points_per_side=9, points_per_batch=points_per_batch).generate(image)
    assert_same_records(actual, expected, exact=True)


@pytest.mark.slow
def test_the_schedule_of_accelerators_changes_nothing():
    image, some = picture(100, 75), generator(points_per_side=9)
    expected = some.generate(image)
    some._chunks = chunk_sizes(64, "gpu")
    assert_same_records(some.generate(image), expected, exact=True)
