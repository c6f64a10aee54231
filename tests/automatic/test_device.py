import pytest
from everything import as_on_a_gpu, assert_same_records, generator, random_image

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("points_per_batch", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_points_per_batch_changes_nothing(points_per_batch):
    image = random_image(100, 75)
    expected = generator(points_per_side=5).generate(image)
    actual = generator(points_per_side=5, points_per_batch=points_per_batch).generate(image)
    assert_same_records(actual, expected, exact=True)


def test_the_schedule_of_accelerators_changes_nothing():
    image = random_image(100, 75)
    expected = generator(points_per_side=9).generate(image)
    assert_same_records(as_on_a_gpu(points_per_side=9).generate(image), expected, exact=True)
