import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, normal

from sam_jax.ops.attention import _position_terms, rel_pos_attention, relative_positions
from sam_jax.ops.flash import flash_attention

# Heads of two powers of two, and of none; grids as large as the kernels' blocks, and not.
LAYERS = [((8, 32), 80), ((3, 33), 12)]


def inputs(grid, d, b=2, heads=2):
    q, k, v = (normal((b, heads, grid[0] * grid[1], d), seed=i) for i in range(3))
    tables = tuple(normal((2 * size - 1, d), seed=3 + i) for i, size in enumerate(grid))
    return q, k, v, tables


def flash(q, k, v, tables):
    """The kernels, step by step, as `rel_pos_attention` calls them."""
    tables = tuple(relative_positions(table, (len(table) + 1) // 2) for table in tables)
    terms = (term.astype(q.dtype) for term in _position_terms(q, tables))
    return flash_attention(q * q.shape[-1] ** -0.5, k, v, *terms, True)


@pytest.mark.parametrize(("grid", "d"), LAYERS, ids=str)
def test_it_is_the_plain_attention(grid, d):
    arrays = inputs(grid, d)
    weights = normal(arrays[0].shape, seed=7)

    def plain(*arrays):
        return rel_pos_attention(*arrays, grid, "xla")

    expected, gradients = jax.vjp(plain, *arrays)
    actual, actual_gradients = jax.vjp(flash, *arrays)
    assert_close(actual, expected)
    jax.tree.map(
        lambda a, e: assert_close(a, e, 1e-5), actual_gradients(weights), gradients(weights)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    arrays = inputs((8, 16), 16)
    low = jax.tree.map(lambda x: x.astype(dtype), arrays)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    weights = normal(arrays[0].shape, seed=7)
    expected, gradients = jax.vjp(flash, *rounded)
    actual, actual_gradients = jax.vjp(flash, *low)
    assert actual.dtype == dtype
    tolerance = 3e-2 if dtype == "bfloat16" else 4e-3
    assert_close(actual, expected, tolerance)
    found = actual_gradients(jnp.asarray(weights, dtype))
    jax.tree.map(lambda a, e: assert_close(a, e, tolerance), found, gradients(weights))


def test_large_logits_stay_finite():
    q, *rest = inputs((8, 16), 16)
    arrays = jax.tree.map(lambda x: x.astype(jnp.float16), (100 * q, *rest))
    out, gradients = jax.vjp(flash, *arrays)
    for x in (out, *jax.tree.leaves(gradients(out))):
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_vmap():
    """Over some arrays and not over others, and of gradients."""
    q, k, v, tables = inputs((2, 16), 16, b=3)

    def total(q, k, v):
        return jnp.sum(jnp.sin(flash(q[None], k[None], v[None], tables)))

    found = jax.vmap(jax.value_and_grad(total, (0, 1)), (0, None, 0))(q, k[0], v)
    for i in range(3):
        expected = jax.value_and_grad(total, (0, 1))(q[i], k[0], v[i])
        jax.tree.map(lambda a, e, i=i: assert_close(a[i], e), found, expected)


SHARDED = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sam_jax.ops.flash import flash_attention

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("images", "heads"))
shapes = [(4, 2, 128, 16)] * 3 + [(4, 2, 128, 8), (4, 2, 128, 16)]
keys = jax.random.split(jax.random.key(0), 5)
arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]

def total(*arrays):
    return jnp.sum(jnp.sin(flash_attention(*arrays, True)))

step = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3, 4)))
expected = step(*arrays)
for spec in (P("images"), P("images", "heads"), P(None, "heads")):
    placed = jax.device_put(arrays, NamedSharding(mesh, spec))
    assert "all-gather" not in step.lower(*placed).compile().as_text(), spec
    found = step(*placed)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-5, 1e-5), found, expected)
    assert found[1][0].sharding.is_equivalent_to(placed[0].sharding, 4), found[1][0].sharding
"""


def test_devices_compute_their_own_images_and_heads():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    subprocess.run([sys.executable, "-c", SHARDED], env=environment, check=True, timeout=300)
