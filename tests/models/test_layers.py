import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from flax import nnx
from reference import assert_close, from_torch_image, normal, tensor, to_torch

from sam_jax.models.layers import (
    LayerNorm,
    PatchConv,
    UpscaleConv,
    gelu,
    join_pixels,
    join_windows,
    matmul,
    partition_windows,
)

pytestmark = pytest.mark.optimized

image_encoder = torch_reference.import_reference("segment_anything").modeling.image_encoder


@pytest.mark.parametrize("grid", [(12, 12), (10, 7), (5, 14), (4, 3)])
def test_windows(grid):
    x = normal((2, *grid, 3))
    windows = partition_windows(x, 5, jnp.zeros(3))
    expected, padded = image_encoder.window_partition(tensor(x), 5)
    np.testing.assert_array_equal(windows, expected.numpy())
    padding = normal((3,), seed=1)
    from_padding, _ = image_encoder.window_partition(tensor(x - padding), 5)
    windows = partition_windows(x, 5, padding)
    np.testing.assert_allclose(windows, from_padding.numpy() + padding, atol=1e-6)
    joined = image_encoder.window_unpartition(expected, 5, padded, grid)
    np.testing.assert_array_equal(join_windows(windows, grid), joined.numpy())
    np.testing.assert_array_equal(join_windows(windows, grid), x)


def test_layer_norm():
    norm = LayerNorm(6, eps=1e-6, dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = normal((6,), seed=1), normal((6,), seed=2)
    x = 100 + normal((4, 6))  # a mean far from zero, where E[x^2] - E[x]^2 is an inexact variance
    expected = torch.nn.functional.layer_norm(
        tensor(x), (6,), tensor(norm.scale[...]), tensor(norm.bias[...]), 1e-6
    )
    assert_close(norm(x), expected)


def test_gradients_of_layer_norm():
    norm = LayerNorm(6, eps=1e-6, dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = normal((6,), seed=1), normal((6,), seed=2)
    x, towards = 3 + normal((2, 4, 6)), normal((2, 4, 6), seed=3)
    wanted = [tensor(a).requires_grad_() for a in (x, norm.scale[...], norm.bias[...])]
    out = torch.nn.functional.layer_norm(wanted[0], (6,), *wanted[1:], 1e-6)
    (out * tensor(towards)).sum().backward()

    def loss(norm, x):
        return (norm(x) * towards).sum()

    of_norm, of_x = nnx.grad(loss, argnums=(0, 1))(norm, x)
    for actual, expected in zip((of_x, of_norm.scale[...], of_norm.bias[...]), wanted, strict=True):
        assert_close(actual, expected.grad)
    direction = normal(x.shape, seed=4)
    _, forwards = jax.jvp(lambda x: loss(norm, x), (x,), (direction,))
    np.testing.assert_allclose(forwards, (of_x * direction).sum(), rtol=1e-5)


def test_patch_conv():
    conv = PatchConv(3, 5, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = normal((5,), seed=1)
    x = normal((2, 12, 8, 3))
    kernel = tensor(conv.kernel[...].transpose(3, 2, 0, 1))
    expected = torch.nn.functional.conv2d(to_torch(x), kernel, tensor(conv.bias[...]), stride=4)
    assert_close(conv(x), from_torch_image(expected))


def test_upscale_conv():
    conv = UpscaleConv(6, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.bias[...] = normal((5,), seed=1)
    x = normal((4, 3, 6))
    kernel = tensor(conv.kernel[...].transpose(0, 3, 1, 2))
    expected = torch.nn.functional.conv_transpose2d(
        to_torch(x)[None], kernel, tensor(conv.bias[...]), stride=2
    )
    assert_close(join_pixels(conv(x)), from_torch_image(expected)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_is_rounded_once(dtype):
    """The product and its gradients match those of `@`, in the dtype of the factors."""
    x, kernel, weight = (normal(shape, i) for i, shape in enumerate([(64, 48), (48, 40), (64, 40)]))
    x, kernel, weight = (jnp.asarray(a, dtype) for a in (x, kernel, weight))

    def weighted(multiply, *factors):
        return (multiply(*factors) * weight).astype(jnp.float32).sum()

    step = jnp.finfo(dtype).eps
    for found, expected in zip(
        (matmul(x, kernel), *jax.grad(weighted, (1, 2))(matmul, x, kernel)),
        (x @ kernel, *jax.grad(weighted, (1, 2))(jnp.matmul, x, kernel)),
        strict=True,
    ):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            np.float32(found), np.float32(expected), rtol=step, atol=step * abs(expected).max()
        )


def test_gelu_is_exact():
    x = jnp.linspace(-6, 6, 101)
    expected = tensor(x).requires_grad_()
    torch.nn.functional.gelu(expected).sum().backward()
    assert_close(gelu(x), torch.nn.functional.gelu(expected))
    assert_close(jax.grad(lambda x: gelu(x).sum())(x), expected.grad)


def test_gelu_of_bfloat16_is_computed_in_float32():
    """Tests inputs where 1 + erf would lose all digits in bfloat16."""
    x = jnp.linspace(-4, -2, 50, dtype=jnp.bfloat16)
    actual, exact = gelu(x), gelu(x.astype(jnp.float32))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float32), exact, rtol=2**-8)
