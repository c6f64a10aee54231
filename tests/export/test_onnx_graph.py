"""Operations translated to ONNX give in ONNX Runtime what they give in JAX."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from reference import assert_close, normal

from sam_jax.export import onnx_graph
from sam_jax.export.onnx_graph import Graph
from sam_jax.models.convolutions import depthwise_conv, halving_conv
from sam_jax.models.layers import gelu
from sam_jax.ops.attention import softmax
from sam_jax.ops.operation import operation

A, B, IMAGE = normal((3, 4, 5), 1), normal((3, 5, 6), 2), normal((2, 7, 8, 4), 3)


def conv(x, kernel, strides, padding, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


FUNCTIONS = {
    "arithmetic": lambda x: (x + 2) * x / 3 - jnp.maximum(x, 0.5) + x.astype(jnp.int32),
    "functions": lambda x: jnp.sin(x) + jnp.cos(x) + jnp.exp(x) + jax.lax.rsqrt(jnp.square(x) + 1),
    "choices": lambda x: (
        jnp.where(x.astype(jnp.int32) == 0, 2 * x, x),
        jnp.where(x.astype(jnp.int32) != 1, x, 0.0),
    ),
    "gelu": gelu,
    "softmax": lambda x: (softmax(x), softmax(x, 0)),
    "reductions": lambda x: (x.sum((0, 2)), x.max(1), x.mean(-1, keepdims=True)),
    "axes": lambda x: (x.transpose(2, 0, 1).reshape(15, 4), x[:, None], x[1], x[:, 1::2, 1:4]),
    "joined": lambda x: (jnp.concatenate([x, 2 * x], 1), jnp.stack([x, x + 1], 2)),
    "split": lambda x: jnp.split(x, [1, 3], 2),
    "sliced": lambda x: (
        jax.lax.slice(x, (0, 1, 0), (3, 2, 5)),
        jax.lax.slice(x, (0,) * 3, x.shape),
    ),
    "padded": lambda x: jnp.pad(x, ((0, 1), (2, 0), (0, 0)), constant_values=7),
    # The sum of a broadcast array is not the sum of the original array.
    "broadcast": lambda x: (
        jnp.broadcast_to(x[:, :1], x.shape).sum(1),
        jnp.broadcast_to(x[0, 0], (2, 5)).reshape(10) * 2,
        jnp.concatenate([jnp.broadcast_to(x[:1], (2, 4, 5)), x]),
    ),
    "batched": lambda x: jnp.einsum("bij,bjk->bik", x, B),
    "several_rows": lambda x: x @ B[0],
    "vectors": lambda x: (x[0, 0] @ B[0], x[0] @ B[0, :, 0], x[0, 0] @ B[0, :, 0]),
    "two_summed": lambda x: jnp.einsum("bij,kbj->ik", x, B.transpose(2, 0, 1)),
    "batch_inside": lambda x: jnp.einsum("bij,kjb->jbik", x, B.transpose(2, 1, 0)),
}
IMAGES = {
    "conv": lambda x: conv(x, normal((3, 3, 4, 6)), (2, 1), ((1, 1), (0, 2))),
    "groups": lambda x: conv(x, normal((3, 3, 2, 6)), (1, 1), "SAME", 2),
    "depthwise": lambda x: depthwise_conv(x, normal((3, 3, 1, 4)), 1),
    "depthwise_strided": lambda x: depthwise_conv(x, normal((3, 3, 1, 4)), 2),
    "halving": lambda x: halving_conv(x[:, 1:], normal((3, 3, 4, 5))),
}


def run_onnx(function, x, folder, shape=None):
    """The function's results in ONNX Runtime; `shape` may have symbolic sizes."""
    shape = x.shape if shape is None else shape
    graph = Graph()
    graph.input("x", [n if isinstance(n, int) else str(n) for n in shape])
    results = graph.call(function, ("x", jax.ShapeDtypeStruct(shape, x.dtype)))
    ranks = [result.ndim for result in jax.tree.leaves(jax.eval_shape(function, x))]
    outputs = {
        f"out_{i}": (name, [f"size_{i}_{axis}" for axis in range(rank)])
        for i, (name, rank) in enumerate(zip(results, ranks, strict=True))
    }
    graph.save(folder / "f.onnx", outputs)
    return onnxruntime.InferenceSession(folder / "f.onnx").run(None, {"x": np.asarray(x)})


@pytest.mark.parametrize("name", [*FUNCTIONS, *IMAGES])
def test_operations(name, tmp_path):
    function, x = (FUNCTIONS[name], A) if name in FUNCTIONS else (IMAGES[name], IMAGE)
    results = run_onnx(function, x, tmp_path)
    for result, expected in zip(results, jax.tree.leaves(jax.jit(function)(x)), strict=True):
        assert_close(result, expected)


def operators(folder):
    return {node.op_type for node in onnx.load(folder / "f.onnx").graph.node}


def test_functions_with_an_onnx_operator(tmp_path):
    kernel = normal((3, 3, 1, 4))
    for function, expected in (
        (lambda x: (softmax(x, 1),), {"Softmax"}),
        (lambda x: (depthwise_conv(x, kernel, 2),), {"Transpose", "Reshape", "Conv"}),
        (lambda x: (halving_conv(x, normal((3, 3, 4, 5))),), {"Transpose", "Reshape", "Conv"}),
    ):
        run_onnx(function, normal((2, 6, 8, 4)), tmp_path)
        assert operators(tmp_path) == {*expected, "Identity"}


def test_functions_are_recognized_by_their_mark(tmp_path):
    @jax.jit
    @operation("sam.gelu")
    def called_otherwise(x):
        return x

    run_onnx(lambda x: (called_otherwise(x),), normal((3,)), tmp_path)
    assert "Erf" in operators(tmp_path)


def test_symbolic_sizes(tmp_path):
    (n,) = jax.export.symbolic_shape("n")

    def function(x):
        joined = jnp.concatenate([normal((2, 5)), x])  # n + 2 long
        sums = joined.sum(1)
        many = jnp.broadcast_to(sums, (3, *sums.shape)).transpose(1, 0)
        return joined[:, 1:3], softmax(many.reshape(-1, 3)), joined @ joined.T, joined.max(0)

    for count in (1, 4):
        x = A[0, :count]
        results = run_onnx(function, x, tmp_path, (n, 5))
        for result, expected in zip(results, jax.jit(function)(x), strict=True):
            assert_close(result, expected)


def test_constants_are_computed_and_kept_once(tmp_path):
    weights = normal((5, 5), 9)

    def function(x):
        folded = jnp.exp(weights) @ weights[jnp.array([4, 3, 2, 1, 0])]
        return x @ folded + x @ folded, (x @ folded).sum(0)

    run_onnx(function, A[0], tmp_path)
    assert operators(tmp_path) == {"MatMul", "Add", "ReduceSum", "Identity"}


def test_constants_that_repeat_are_stored_once(tmp_path):
    """Equal constants are stored once, with one slice of axes that repeat; -0 is not 0."""
    table, row, zeros = normal((3, 40, 40), 9), normal((1, 300), 8), np.zeros((300, 2), np.float32)
    zeros[7] = -0.0

    def function(x):
        for _ in range(2):
            bias = jnp.einsum("b,nqk->bnqk", jnp.ones(50), jnp.asarray(table.copy()) + 1)
            x = x * 2 + bias
        weights = jnp.asarray(np.repeat(row, 40, 0))
        return x, 1 / (zeros * jnp.exp(x[0, 0, 0, 0])), x[0, 0] @ weights

    x = normal((50, 3, 40, 40), 1)
    results = run_onnx(function, x, tmp_path)
    for result, expected in zip(results, jax.jit(function)(x), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "f.onnx").stat().st_size < table.nbytes + row.nbytes + zeros.nbytes + 4000


def test_large_weights_have_their_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_LARGEST_FILE", 0)
    weights = normal((5, 3000), 9)
    (result,) = run_onnx(lambda x: x @ weights, A[0], tmp_path)
    assert (tmp_path / "f.onnx.data").stat().st_size >= weights.nbytes
    assert (tmp_path / "f.onnx").stat().st_size < 5000
    assert_close(result, A[0] @ weights)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(x), "'sort' cannot be exported"),
        (
            lambda x: x.at[x[:, 0, 0].astype(int)].get(
                mode="promise_in_bounds", wrap_negative_indices=False
            ),
            "indexing by arrays cannot be exported",
        ),
        (lambda x: jax.lax.pad(x, 0.0, [(-1, 0, 0)] * 3), "padding cannot be exported"),
    ],
)
def test_unsupported_operations(function, message):
    graph = Graph()
    graph.input("x", A.shape)
    with pytest.raises(ValueError, match=message):
        graph.call(function, ("x", jax.ShapeDtypeStruct(A.shape, A.dtype)))
