import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.training.simulate import next_click, noisy_box, sample_point

MASK = np.zeros((8, 8), bool)
MASK[2:4, 5:8] = True
MASK[7, 0] = True
KEYS = jax.random.split(jax.random.key(0), 2000)


def test_points_are_uniform_in_the_region():
    points, found = jax.vmap(lambda k: sample_point(k, jnp.asarray(MASK), 32))(KEYS)
    assert found.all()
    # Points are centers of cells of 4 x 4 pixels; a pixel's center has whole coordinates.
    cells = (np.asarray(points) + 0.5) / 4 - 0.5
    np.testing.assert_array_equal(cells, cells.round())
    counts = np.zeros((8, 8), int)
    np.add.at(counts, tuple(cells.astype(int).T[::-1]), 1)
    assert (counts[~MASK] == 0).all()
    expected = len(KEYS) / MASK.sum()
    assert np.abs(counts[MASK] - expected).max() < 4 * np.sqrt(expected)


def test_points_at_full_resolution_are_pixels():
    point, _ = sample_point(KEYS[0], jnp.asarray(MASK), 8)
    x, y = np.asarray(point)
    assert MASK[int(y), int(x)]
    assert (x, y) == (int(x), int(y))


def test_an_empty_region_has_no_point():
    point, found = sample_point(KEYS[0], jnp.zeros((8, 8), bool), 8)
    assert not found
    assert np.isfinite(point).all()


def test_boxes_have_the_papers_noise():
    box = jnp.array([300.0, 400.0, 400.0, 430.0])  # 100 x 30
    boxes = np.asarray(jax.vmap(lambda k: noisy_box(k, box, 1024))(KEYS))
    noise = boxes - np.asarray(box)
    assert np.abs(noise.mean(0)).max() < 1
    # Clipped at two standard deviations horizontally, not at all vertically.
    np.testing.assert_allclose(noise[:, [1, 3]].std(0), 3, rtol=0.06)
    assert np.abs(noise[:, [0, 2]]).max() == pytest.approx(20)
    np.testing.assert_allclose(noise[:, [0, 2]].std(0), 9.6, rtol=0.06)
    large = jax.vmap(lambda k: noisy_box(k, jnp.array([0.0, 0, 1000, 1000]), 1024))(KEYS)
    assert np.abs(np.asarray(large) - [0, 0, 1000, 1000]).max() == pytest.approx(20)
    assert np.asarray(large).min() >= 0


def test_noisy_boxes_stay_valid():
    for box in ([0.0, 0, 3, 1023], [1020.0, 5, 1023, 5]):
        boxes = np.asarray(jax.vmap(lambda k, b=box: noisy_box(k, jnp.array(b), 1024))(KEYS))
        assert boxes.min() >= 0
        assert boxes.max() <= 1023
        assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_clicks_are_where_the_mask_is_wrong():
    target, predicted = jnp.asarray(MASK), np.zeros((8, 8), bool)
    predicted[2:4, 6:8] = True  # misses column 5 and the corner
    predicted[0] = True  # and has an extra row
    wrong = predicted != MASK
    click = jax.vmap(lambda k: next_click(k, jnp.asarray(predicted), target, 32))
    points, labels = map(np.asarray, click(KEYS))
    x, y = ((points + 0.5) / 4).astype(int).T
    assert wrong[y, x].all()
    np.testing.assert_array_equal(labels, MASK[y, x])
    assert set(labels.tolist()) == {0, 1}
    assert {(a, b) for a, b in zip(y, x, strict=True)} == set(zip(*np.nonzero(wrong), strict=True))


def test_a_perfect_mask_is_not_clicked_on():
    _, label = next_click(KEYS[0], jnp.asarray(MASK), jnp.asarray(MASK), 32)
    assert label == -10


def test_the_key_decides():
    point, _ = sample_point(KEYS[3], jnp.asarray(MASK), 32)
    again, _ = jax.jit(sample_point, static_argnums=2)(KEYS[3], jnp.asarray(MASK), 32)
    np.testing.assert_array_equal(point, again)
