import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import torch

from sam_jax.arrays import as_array, as_numpy

NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


class OnlyDLPack:
    """An array of a library that numpy does not know."""

    def __dlpack__(self, **options):
        return NUMBERS.__dlpack__(**options)

    def __dlpack_device__(self):
        return NUMBERS.__dlpack_device__()


@pytest.mark.parametrize(
    "value",
    [
        NUMBERS,
        jnp.asarray(NUMBERS),
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, requires_grad=True),
        pandas.DataFrame(NUMBERS),
        OnlyDLPack(),
        NUMBERS.tolist(),
        [torch.tensor(row, requires_grad=True) for row in NUMBERS],
        ([jnp.asarray(row) for row in NUMBERS]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_of_any_library(value):
    found = as_numpy(value, "numbers")
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, NUMBERS)
    if not isinstance(value, (list, tuple)):
        assert np.array_equal(as_array(value, "numbers"), NUMBERS)


def test_unreadable_values_are_named():
    with pytest.raises(TypeError, match=r"points is a torch.Tensor .*.*Sparse"):
        as_numpy(torch.eye(3).to_sparse(), "points")
    with pytest.raises(TypeError, match="points are a str, expected an array"):
        as_array("points", "points")


def test_traced_arrays_stay():
    assert jax.jit(lambda x: as_array(x, "x") + 1)(jnp.ones(2)).tolist() == [2, 2]
