import functools

import jax
import jax.numpy as jnp
import pytest
import torch
from reference import assert_close, from_torch_image, normal, tensor, to_torch

from sam_jax.models.convolutions import depthwise_conv, halving_conv

pytestmark = pytest.mark.optimized


def assert_like_torch(conv, x, kernel, **options):
    """Compares the result and both gradients with PyTorch's."""
    given = [
        tensor(to_torch(x)).requires_grad_(),
        tensor(kernel.transpose(3, 2, 0, 1)).requires_grad_(),
    ]
    expected = torch.conv2d(*given, padding=1, **options)
    actual, pullback = jax.vjp(conv, x, kernel)
    assert_close(actual, from_torch_image(expected))
    weights = normal(actual.shape, seed=2)
    expected.backward(to_torch(weights))
    of_x, of_kernel = pullback(weights)
    assert_close(of_x, from_torch_image(given[0].grad))
    assert_close(of_kernel, given[1].grad.permute(2, 3, 1, 0))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("hw", [(7, 9), pytest.param((34, 4), marks=pytest.mark.slow)], ids=str)
def test_depthwise_conv(hw, stride, platform):
    """The kernel's gradient is computed row by row on a CPU, and at once elsewhere."""
    conv = functools.partial(depthwise_conv, stride=stride)
    x, kernel = normal((2, *hw, 5)), normal((3, 3, 1, 5), seed=1)
    assert_like_torch(conv, x, kernel, stride=stride, groups=5)


@pytest.mark.parametrize("hw", [(6, 8), (2, 2)], ids=str)
def test_halving_conv(hw, platform):
    """On a CPU, the kernel's gradient is computed by matmuls; elsewhere, it is XLA's own."""
    x, kernel = normal((2, *hw, 5)), normal((3, 3, 5, 7), seed=1)
    assert_like_torch(halving_conv, x, kernel, stride=2)


CONVS = {
    "depthwise": (functools.partial(depthwise_conv, stride=1), 1),
    "halving": (halving_conv, 3),
}


@pytest.mark.parametrize("name", CONVS)
def test_gradients_with_a_symbolic_batch(name):
    conv, channels = CONVS[name]

    def total(x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel)))

    gradients = jax.jit(jax.grad(total, (0, 1)))
    x, kernel = normal((2, 6, 6, 3)), normal((3, 3, channels, 3), seed=1)
    shape = jax.export.symbolic_shape("batch, 6, 6, 3")
    exported = jax.export.export(gradients)(jax.ShapeDtypeStruct(shape, x.dtype), kernel)
    for actual, expected in zip(exported.call(x, kernel), gradients(x, kernel), strict=True):
        assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVS)
def test_forward_mode_and_vmap(name):
    conv, channels = CONVS[name]
    x, kernel = normal((2, 6, 6, 3)), normal((3, 3, channels, 3), seed=1)

    def total(kernel, x):
        return jnp.sum(jnp.sin(conv(x[None], kernel)))

    reverse = jax.vmap(jax.grad(total), (None, 0))(kernel, x)
    assert_close(jax.vmap(jax.jacfwd(total), (None, 0))(kernel, x), reverse)
