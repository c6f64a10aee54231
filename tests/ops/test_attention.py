import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from reference import assert_close, normal, tensor

from sam_jax.ops.attention import (
    _rows_per_block,
    fold_positions,
    rel_pos_attention,
    relative_positions,
    softmax,
)

image_encoder = torch_reference.import_reference("segment_anything").modeling.image_encoder


@pytest.mark.parametrize("length", [13, 27, 9], ids=["fits", "longer", "shorter"])
def test_relative_positions(length):
    table = normal((length, 8))
    assert_close(relative_positions(table, 7), image_encoder.get_rel_pos(7, 7, tensor(table)))


def reference_attention(q, k, v, rel_pos, grid):
    """Meta's: scaled logits, plus positions of the unscaled query."""
    b, heads, n, d = q.shape
    q, k, v = (tensor(x).reshape(b * heads, n, d) for x in (q, k, v))
    logits = (q * d**-0.5) @ k.transpose(-2, -1)
    if rel_pos is not None:
        h, w = (tensor(table) for table in rel_pos)
        logits = image_encoder.add_decomposed_rel_pos(logits, q, h, w, grid, grid)
    return (torch.softmax(logits, dim=-1) @ v).reshape(b, heads, n, d)


def inputs(grid, d=8):
    n = grid[0] * grid[1]
    q, k, v = (normal((2, 3, n, d), seed=i) for i in range(3))
    tables = tuple(normal((2 * size - 1, d), seed=3 + i) for i, size in enumerate(grid))
    return q, k, v, tables


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (5, 7), (1, 4), (48, 33)])
def test_attention(implementation, grid):
    q, k, v, tables = inputs(grid)
    actual = rel_pos_attention(q, k, v, tables, grid, implementation)
    assert_close(actual, reference_attention(q, k, v, tables, grid))


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
def test_attention_without_positions(implementation):
    q, k, v, _ = inputs((6, 6))
    actual = rel_pos_attention(q, k, v, None, (6, 6), implementation)
    assert_close(actual, reference_attention(q, k, v, None, (6, 6)))


@pytest.mark.parametrize("implementation", ["folded", "chunked"])
def test_gradients_agree(implementation):
    grid = (8, 6)
    arrays = inputs(grid)

    def scalar(implementation):
        return lambda q, k, v, tables: jnp.sum(
            jnp.sin(rel_pos_attention(q, k, v, tables, grid, implementation))
        )

    expected = jax.grad(scalar("xla"), argnums=(0, 1, 2, 3))(*arrays)
    actual = jax.grad(scalar(implementation), argnums=(0, 1, 2, 3))(*arrays)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-4), actual, expected)


def folded_attention(q, k, v, tables, grid):
    """What "cudnn" does, by XLA."""
    tables = tuple(map(relative_positions, tables, grid))
    q, k = (x.transpose(0, 2, 1, 3) for x in fold_positions(q, k, tables))
    v = jnp.pad(v.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, sum(grid))))
    out = jax.nn.dot_product_attention(q, k, v, scale=1.0)
    return out.transpose(0, 2, 1, 3)[..., : tables[0].shape[-1]]


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (2, 4), (14, 14)])
def test_positions_as_channels(grid):
    arrays = inputs(grid)
    assert_close(
        jax.jit(folded_attention, static_argnums=4)(*arrays, grid),
        reference_attention(*arrays, grid),
    )

    def scalar(attention):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(attention(*x, grid))), (0, 1, 2, 3)))

    expected = scalar(rel_pos_attention)(*arrays)
    actual = scalar(folded_attention)(*arrays)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-4), actual, expected)


def test_cudnn_says_what_it_needs():
    q, k, v, tables = inputs((2, 2))
    with pytest.raises(ValueError, match=r"'cudnn', which needs an NVIDIA GPU .* runs on cpu here"):
        rel_pos_attention(q, k, v, tables, (2, 2), "cudnn")


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
def test_large_logits_in_bfloat16_stay_finite(implementation):
    q, k, v, tables = inputs((6, 6))
    q = (100 * q).astype(jnp.bfloat16)
    out = rel_pos_attention(
        q,
        k.astype(jnp.bfloat16),
        v.astype(jnp.bfloat16),
        tuple(t.astype(jnp.bfloat16) for t in tables),
        (6, 6),
        implementation,
    )
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_chunks_divide_the_rows():
    assert _rows_per_block(64, 64) == 8
    assert _rows_per_block(14, 14) == 14
    assert _rows_per_block(7, 600) == 1


def test_unknown_implementation():
    q, k, v, tables = inputs((2, 2))
    with pytest.raises(ValueError, match=r"'flash'.*chunked.*xla"):
        # Through the undecorated function: the type of the argument names the known ones.
        rel_pos_attention.__wrapped__(q, k, v, tables, (2, 2), "flash")


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_gradient_sums_to_zero(axis):
    """Also where all that is weighted is nearly the same, as values after a layer norm are."""
    logits = normal((300, 300), seed=1)
    similar = 1 + 1e-3 * normal((300, 300), seed=2)
    value, pullback = jax.vjp(lambda x: softmax(x, axis), logits)
    (gradient,) = pullback(similar)

    exact_logits = tensor(logits).double().requires_grad_()
    exact = torch.softmax(exact_logits, axis)
    exact.backward(tensor(similar).double())
    assert_close(value, exact, 1e-6)
    assert_close(gradient, exact_logits.grad, 1e-4)
    # The sum over all keys, as a mean that they share multiplies it.
    largest = np.abs(exact_logits.grad.numpy()).sum(axis).max()
    assert np.abs(np.asarray(gradient, np.float64).sum(axis)).max() <= 1e-6 * largest
