import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from reference import assert_close, flash_attentions, lowered_for_cuda, normal, tensor

import sam_jax.ops.attention
from sam_jax.ops.attention import rel_pos_attention, relative_positions, softmax

pytestmark = pytest.mark.optimized

attend = jax.jit(rel_pos_attention, static_argnums=(4, 5))

image_encoder = torch_reference.import_reference("segment_anything").modeling.image_encoder


@pytest.mark.parametrize("length", [13, 27, 9], ids=["fits", "longer", "shorter"])
def test_relative_positions(length):
    table = normal((length, 8))
    assert_close(relative_positions(table, 7), image_encoder.get_rel_pos(7, 7, tensor(table)))


def reference_attention(q, k, v, rel_pos, grid):
    """Meta's attention: scaled logits, plus the relative positions of the unscaled query."""
    rel_pos = rel_pos and [tensor(table) for table in rel_pos]
    return torch_attention(*map(tensor, (q, k, v)), rel_pos, grid)


def torch_attention(q, k, v, rel_pos, grid):
    b, heads, n, d = q.shape
    q, k, v = (x.reshape(b * heads, n, d) for x in (q, k, v))
    logits = (q * d**-0.5) @ k.transpose(-2, -1)
    if rel_pos is not None:
        logits = image_encoder.add_decomposed_rel_pos(logits, q, *rel_pos, grid, grid)
    return (torch.softmax(logits, dim=-1) @ v).reshape(b, heads, n, d)


def inputs(grid, d=8):
    n = grid[0] * grid[1]
    q, k, v = (normal((2, 3, n, d), seed=i) for i in range(3))
    tables = tuple(normal((2 * size - 1, d), seed=3 + i) for i, size in enumerate(grid))
    return q, k, v, tables


def refused(implementation, grid, dtype, d=8, positions=True):
    """Traces attention with inputs of this dtype, which must raise an error."""
    as_dtype = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)  # noqa: E731
    q, k, v, tables = jax.tree.map(as_dtype, inputs(grid, d))
    call = functools.partial(rel_pos_attention, grid=grid, implementation=implementation)
    jax.eval_shape(call, q, k, v, tables if positions else None)


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
@pytest.mark.parametrize("grid", [(7, 5), (5, 7), (1, 4), (48, 33)])
def test_attention(implementation, grid):
    q, k, v, tables = inputs(grid)
    actual = attend(q, k, v, tables, grid, implementation)
    assert_close(actual, reference_attention(q, k, v, tables, grid))


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
def test_attention_without_positions(implementation):
    q, k, v, _ = inputs((6, 6))
    actual = attend(q, k, v, None, (6, 6), implementation)
    assert_close(actual, reference_attention(q, k, v, None, (6, 6)))


def gradients(implementation, arrays, grid):
    def total(*arrays):
        return jnp.sum(jnp.sin(rel_pos_attention(*arrays, grid, implementation)))

    return jax.jit(jax.grad(total, (0, 1, 2, 3)))(*arrays)


@pytest.mark.parametrize("implementation", ["folded", "chunked"])
def test_gradients_agree(implementation):
    grid = (8, 6)
    arrays = inputs(grid)

    expected, actual = gradients("xla", arrays, grid), gradients(implementation, arrays, grid)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-4), actual, expected)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """Runs the implementation "cudnn" with XLA's attention instead of cuDNN's."""
    plain = jax.nn.dot_product_attention

    def attention(q, k, v, *, scale, implementation):
        assert implementation == "cudnn"
        return plain(q, k, v, scale=scale)

    monkeypatch.setattr(sam_jax.ops.attention, "_cudnn_unsupported_reason", lambda *_: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)


@pytest.mark.slow
@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("grid", [(7, 5), (2, 4), (14, 14)])
def test_inputs_given_to_cudnn(grid):
    q, k, v, tables = inputs(grid)
    for arrays in ((q, k, v, tables), (q, k, v, None)):
        found, expected = attend(*arrays, grid, "cudnn"), reference_attention(*arrays, grid)
        assert_close(found, expected)
        found, expected = (gradients(name, arrays, grid) for name in ("cudnn", "xla"))
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-4), found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize(
    ("implementation", "grid", "d"),
    [
        *(("cudnn", *layer) for layer in (((64, 64), 64), ((64, 64), 80), ((14, 14), 80))),
        *(("pallas", *layer) for layer in (((64, 64), 64), ((64, 64), 80), ((14, 14), 80))),
    ],
    ids=str,
)
def test_flash_attention_lowers_for_cuda(implementation, grid, d):
    """Neither the forward nor the backward pass has an array of all logits, padded or not."""
    n = grid[0] * grid[1]
    q = jax.ShapeDtypeStruct((2, 4, n, d), jnp.bfloat16)
    tables = tuple(jax.ShapeDtypeStruct((2 * size - 1, d), jnp.bfloat16) for size in grid)

    def total(q, k, v, tables):
        out = rel_pos_attention(q, k, v, tables, grid, implementation)
        return out.astype(jnp.float32).sum()

    text = lowered_for_cuda(jax.jit(jax.grad(total, (0, 1, 2, 3))), q, q, q, tables)
    assert flash_attentions(text) == {implementation: (1, 1)}
    assert not re.search(rf"x{n}x{n}x|x{n}x{grid[0]}x{grid[1]}x|x256x224x", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nvidia", "dtype", "grid", "d", "supported"),
    [
        ("9.0", "bfloat16", (64, 64), 64, True),
        ("9.0", "float16", (64, 64), 80, True),
        ("9.0", "float32", (64, 64), 64, False),
        ("9.0", "bfloat16", (14, 14), 64, True),
        ("9.0", "bfloat16", (96, 96), 80, False),
        ("9.0", "bfloat16", (27, 27), 64, False),
        ("8.0", "bfloat16", (64, 64), 64, False),
        ("8.0", "bfloat16", (14, 14), 64, True),
        ("10.0", "bfloat16", (64, 64), 64, False),
        ("7.5", "bfloat16", (14, 14), 32, False),
    ],
    indirect=["nvidia"],
)
@pytest.mark.usefixtures("nvidia")
def test_cudnn_support(dtype, grid, d, supported):
    """Cases in cuDNN's support matrix lower; all others raise an error."""
    n = grid[0] * grid[1]
    q = jax.ShapeDtypeStruct((1, 2, n, d), dtype)
    tables = tuple(jax.ShapeDtypeStruct((2 * size - 1, d), dtype) for size in grid)
    run = jax.jit(lambda *arrays: rel_pos_attention(*arrays, grid, "cudnn"))
    if supported:
        assert flash_attentions(lowered_for_cuda(run, q, q, q, tables)) == {"cudnn": (1, 0)}
    else:
        with pytest.raises(ValueError, match="'cudnn', which needs an NVIDIA GPU"):
            lowered_for_cuda(run, q, q, q, tables)


@pytest.mark.slow
@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("grid", [(64, 64), (14, 14)], ids=str)
def test_the_default_on_a_gpu_runs_everywhere(grid):
    """On any GPU, the default uses XLA alone, without an array of all logits of a large grid."""
    n = grid[0] * grid[1]
    q = jax.ShapeDtypeStruct((1, 2, n, 64), jnp.bfloat16)
    tables = tuple(jax.ShapeDtypeStruct((2 * size - 1, 64), jnp.bfloat16) for size in grid)
    text = lowered_for_cuda(jax.jit(lambda *a: rel_pos_attention(*a, grid)), q, q, q, tables)
    assert flash_attentions(text) == {}
    assert n == 14 * 14 or f"x{n}x{n}x" not in text


@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
@pytest.mark.parametrize("grid", [(14, 14), (24, 24)], ids=str)
def test_query_gradients_if_keys_have_a_mean(implementation, grid):
    """Keys have a mean, as after a layer norm with a bias; values are similar: see `softmax`."""
    q, k, v, tables = inputs(grid, d=16)
    arrays = q, k + 5, 1 + 0.05 * v, tables

    def total(q, k, v, tables):
        return jnp.sum(jnp.sin(3 * rel_pos_attention(q, k, v, tables, grid, implementation)))

    actual = jax.jit(jax.grad(total))(*arrays)
    q, k, v = (tensor(x).double() for x in arrays[:3])
    q.requires_grad_()
    exact = torch_attention(q, k, v, [tensor(t).double() for t in tables], grid)
    torch.sin(3 * exact).sum().backward()
    assert_close(actual, q.grad, 5e-5)


@pytest.mark.parametrize(
    ("gpu", "dtype", "grid", "message"),
    [
        (None, "bfloat16", (2, 2), "JAX has none here; leave it out, or name another"),
        ("9.0", "float32", (2, 2), "the model computes in float32; give it dtype=jnp.bfloat16"),
        (
            "9.0",
            "bfloat16",
            (130, 130),
            "a grid of 130 x 130 makes the heads 272 wide, and the limit is 256",
        ),
        (
            "8.9",
            "bfloat16",
            (64, 64),
            "has compute capability 8.9, and heads are 136 wide",
        ),
        ("9.0", "bfloat16", (3, 3), "a grid of 3 x 3 has an odd number of positions"),
    ],
)
def test_cudnn_says_what_it_needs(monkeypatch, gpu, dtype, grid, message):
    monkeypatch.setattr(sam_jax.ops.attention, "_nvidia_gpu", lambda: gpu)
    with pytest.raises(ValueError, match=rf"'cudnn', which needs an NVIDIA GPU .*{message}"):
        refused("cudnn", grid, dtype)


@pytest.mark.parametrize(
    ("gpu", "dtype", "grid", "d", "message"),
    [
        (None, "bfloat16", (16, 16), 16, "JAX has none here; leave it out, or name another"),
        ("8.0", "float32", (16, 16), 16, "the model computes in float32; give it dtype="),
        ("7.5", "bfloat16", (16, 16), 16, "this one has compute capability 7.5"),
        ("8.0", "bfloat16", (2, 130), 48, "a row of a grid of 2 x 130 is too large with heads 48"),
        ("8.0", "bfloat16", (2, 64), 144, "a row of a grid of 2 x 64 is too large with heads 144"),
        ("8.0", "bfloat16", (16, 16), None, "there are none"),
    ],
)
def test_pallas_says_what_it_needs(monkeypatch, gpu, dtype, grid, d, message):
    monkeypatch.setattr(sam_jax.ops.attention, "_nvidia_gpu", lambda: gpu)
    with pytest.raises(ValueError, match=rf"'pallas', which needs an NVIDIA GPU .*{message}"):
        refused("pallas", grid, dtype, d or 16, positions=d is not None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["xla", "folded", "chunked"])
def test_large_logits_stay_finite(implementation, dtype):
    q, k, v, tables = inputs((6, 6))
    arrays = jax.tree.map(lambda x: x.astype(dtype), (100 * q, k, v, tables))
    out = attend(*arrays, (6, 6), implementation)
    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(("grid", "rows"), [((64, 64), 8), ((14, 14), 14), ((7, 600), 1)])
def test_chunks_divide_the_rows(grid, rows):
    """A chunk's logits have as many rows as fit into 512 queries, and at least one."""
    n = grid[0] * grid[1]
    arrays = [jax.ShapeDtypeStruct((1, 1, n, 8), jnp.float32)] * 3
    jaxpr = jax.make_jaxpr(rel_pos_attention, static_argnums=(4, 5))(*arrays, None, grid, "chunked")
    assert f"f32[{rows * grid[1]},{n}]" in str(jaxpr)


def test_unknown_implementation():
    q, k, v, tables = inputs((2, 2))
    with pytest.raises(ValueError, match=r"'flash'.*xla.*chunked"):
        # `__wrapped__` skips the type check, which would reject the name first.
        rel_pos_attention.__wrapped__(q, k, v, tables, (2, 2), "flash")


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_gradient_sums_to_zero(axis):
    """Even if the incoming gradients are nearly equal, as after a layer norm."""
    logits = normal((300, 300), seed=1)
    similar = 1 + 1e-3 * normal((300, 300), seed=2)
    value, pullback = jax.vjp(lambda x: softmax(x, axis), logits)
    (gradient,) = pullback(similar)

    exact_logits = tensor(logits).double().requires_grad_()
    exact = torch.softmax(exact_logits, axis)
    exact.backward(tensor(similar).double())
    assert_close(value, exact, 1e-6)
    assert_close(gradient, exact_logits.grad, 1e-4)
    # A mean that all keys share multiplies this sum, so it must be close to zero.
    largest = np.abs(exact_logits.grad.numpy()).sum(axis).max()
    assert np.abs(np.asarray(gradient, np.float64).sum(axis)).max() <= 1e-6 * largest
