"""Attention on a GPU against plain attention in float32, without PyTorch, for benchmarks/gpu.sh."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.attention import Implementation, rel_pos_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

# Heads of ViT-B and ViT-H, in global and window layers. cuDNN's gradients had bugs with batches.
SHAPES = [(2, 4, (64, 64), 64), (2, 4, (64, 64), 80), (50, 4, (14, 14), 64), (50, 4, (14, 14), 80)]


def inputs(batch, heads, grid, d):
    keys = jax.random.split(jax.random.key(0), 5)
    n = grid[0] * grid[1]
    q, k, v = (jax.random.normal(key, (batch, heads, n, d)) for key in keys[:3])
    tables = [
        0.2 * jax.random.normal(key, (2 * size - 1, d))
        for key, size in zip(keys[3:], grid, strict=True)
    ]
    return q, k, v, tuple(tables)


def relative(actual, expected):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", get_args(Implementation))
def test_attention_and_its_gradients_in_bfloat16(implementation, shape):
    arrays, grid = inputs(*shape), shape[2]
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)

    def run(arrays, implementation):
        q, k, v, tables = arrays
        return rel_pos_attention(q, k, v, tables, grid, implementation)

    try:
        jax.eval_shape(lambda arrays: run(arrays, implementation), low)
    except ValueError as unsupported:
        pytest.skip(str(unsupported))

    def gradients(arrays, implementation):
        def total(arrays):
            return jnp.sum(jnp.sin(run(arrays, implementation).astype(jnp.float32)))

        return jax.jit(jax.grad(total))(arrays)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(run, static_argnums=1)(arrays, "xla")
        expected_gradients = gradients(arrays, "xla")
    actual = jax.jit(run, static_argnums=1)(low, implementation)
    assert actual.dtype == jnp.bfloat16
    assert relative(actual, expected) <= 2e-2
    for found, wanted in zip(
        jax.tree.leaves(gradients(low, implementation)),
        jax.tree.leaves(expected_gradients),
        strict=True,
    ):
        assert relative(found, wanted) <= 4e-2


def test_cudnn_refuses_float32():
    q, k, v, tables = inputs(1, 2, (4, 4), 8)
    with pytest.raises(ValueError, match="the model computes in float32; give it dtype"):
        rel_pos_attention(q, k, v, tables, (4, 4), "cudnn")
