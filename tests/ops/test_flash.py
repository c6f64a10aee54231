import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from reference import assert_close, normal, tensor

import sam_jax.ops.attention
from sam_jax.ops.attention import rel_pos_attention
from sam_jax.ops.flash import flash_attention

pytestmark = pytest.mark.slow

image_encoder = torch_reference.import_reference("segment_anything").modeling.image_encoder


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Interprets the kernels, which works on any device and in any dtype."""
    interpreted = functools.partial(flash_attention, interpret=True)
    monkeypatch.setattr(sam_jax.ops.flash, "flash_attention", interpreted)
    monkeypatch.setattr(sam_jax.ops.attention, "_pallas_unsupported_reason", lambda *_: None)


def inputs(grid, d, b=2, heads=2):
    q, k, v = (normal((b, heads, grid[0] * grid[1], d), seed=i) for i in range(3))
    tables = tuple(normal((2 * size - 1, d), seed=3 + i) for i, size in enumerate(grid))
    return q, k, v, tables


def flash(q, k, v, tables):
    grid = tuple((len(table) + 1) // 2 for table in tables)
    return rel_pos_attention(q, k, v, tables, grid, "pallas")


# Heads 64 + 16 and 8 + 4 wide, which the kernels load in slices of powers of two. The first grid
# fills the kernels' blocks, the second does not.
@pytest.mark.parametrize(("grid", "d"), [((8, 32), 80), ((3, 33), 12)], ids=str)
def test_matches_metas_attention(grid, d):
    """The gradients match, too."""
    arrays = inputs(grid, d)
    weights = normal(arrays[0].shape, seed=7)
    ours, gradients = jax.vjp(flash, *arrays)

    leaves = [tensor(x).requires_grad_() for x in jax.tree.leaves(arrays)]
    q, k, v = (x.flatten(0, 1) for x in leaves[:3])
    logits = (q * d**-0.5) @ k.transpose(-2, -1)
    logits = image_encoder.add_decomposed_rel_pos(logits, q, *leaves[3:], grid, grid)
    metas = (torch.softmax(logits, -1) @ v).reshape(weights.shape)
    metas.backward(tensor(weights))
    assert_close(ours, metas.detach())
    for actual, leaf in zip(jax.tree.leaves(gradients(weights)), leaves, strict=True):
        assert_close(actual, leaf.grad, 1e-5)


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
    """Maps gradients over some of the arrays but not over others."""
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
