import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import (
    SMALL_TINY,
    assert_close,
    from_torch_image,
    meta_sam,
    normal,
    ours,
    run,
    tensor,
    to_torch,
    torch_encode,
)

from sam_jax.models.tiny_vit import depthwise_conv, halving_conv

pytestmark = pytest.mark.optimised


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL_TINY)
    return torch_sam, ours(torch_sam, SMALL_TINY).image_encoder


@pytest.fixture(scope="module")
def intermediates(pair):
    """The reference's input and output of every stage, and of the whole."""
    reference, values = pair[0].image_encoder, {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: values.update({name: (inputs[0], output)})
        )
        for name, module in [
            ("patch_embed", reference.patch_embed),
            *((f"layer{i}", layer) for i, layer in enumerate(reference.layers)),
            ("neck", reference.neck),
        ]
    ]
    pixels = to_torch(normal((1, 256, 256, 3)))
    values["encoder"] = pixels, torch_encode(pair[0], pixels)
    for hook in hooks:
        hook.remove()
    return values


def grid_last(x):
    """[b, c, h, w] or [b, h * w, c] of a square grid -> [b, h, w, c]."""
    if x.ndim == 4:
        return from_torch_image(x)
    side = int(x.shape[1] ** 0.5)
    return x.detach().numpy().reshape(1, side, side, -1)


@pytest.mark.parametrize(
    "name", ["patch_embed", "layer0", "layer1", "layer2", "layer3", "neck", "encoder"]
)
def test_stage(pair, intermediates, name):
    _, encoder = pair
    module = {"patch_embed": encoder.patch_embed, "neck": encoder.neck, "encoder": encoder}
    module |= {f"layer{i}": layer for i, layer in enumerate(encoder.layers)}
    given, expected = intermediates[name]
    actual = run(module[name], np.asarray(grid_last(given)))
    assert_close(actual, grid_last(expected))


def test_block_with_padded_window(pair, platform):
    """Grids of 32 and 16 in windows of 7 and 14 are padded; padded positions are attended.

    Heads are in two groups on a CPU, in one elsewhere.
    """
    for stage in (1, 2):
        block = pair[0].image_encoder.layers[stage].blocks[0]
        side = block.input_resolution[0]
        assert side % block.window_size
        x = normal((1, side, side, block.dim), seed=stage)
        expected = block(tensor(x).reshape(1, side * side, -1))
        assert_close(run(pair[1].layers[stage].blocks[0], x), grid_last(expected))


def assert_like_torch(conv, x, kernel, **options):
    """The result and both gradients."""
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
@pytest.mark.parametrize("hw", [(7, 9), (34, 4)], ids=str)
def test_depthwise_conv(hw, stride, platform):
    """The kernel's gradient goes by rows on a CPU, at once elsewhere."""
    conv = functools.partial(depthwise_conv, stride=stride)
    x, kernel = normal((2, *hw, 5)), normal((3, 3, 1, 5), seed=1)
    assert_like_torch(conv, x, kernel, stride=stride, groups=5)


@pytest.mark.parametrize("hw", [(6, 8), (2, 2)], ids=str)
def test_halving_conv(hw, platform):
    """The kernel's gradient is of products on a CPU, XLA's own elsewhere."""
    x, kernel = normal((2, *hw, 5)), normal((3, 3, 5, 7), seed=1)
    assert_like_torch(halving_conv, x, kernel, stride=2)


CONVS = {
    "depthwise": (functools.partial(depthwise_conv, stride=1), 1),
    "halving": (halving_conv, 3),
}


@pytest.mark.parametrize("name", CONVS)
def test_gradients_with_an_open_batch(name):
    conv, channels = CONVS[name]

    def total(x, kernel):
        return jnp.sum(jnp.sin(conv(x, kernel)))

    gradients = jax.jit(jax.grad(total, (0, 1)))
    x, kernel = normal((2, 6, 6, 3)), normal((3, 3, channels, 3), seed=1)
    shape = jax.export.symbolic_shape("batch, 6, 6, 3")
    exported = jax.export.export(gradients)(jax.ShapeDtypeStruct(shape, x.dtype), kernel)
    for actual, expected in zip(exported.call(x, kernel), gradients(x, kernel), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("name", CONVS)
def test_forward_mode_and_vmap(name):
    conv, channels = CONVS[name]
    x, kernel = normal((2, 6, 6, 3)), normal((3, 3, channels, 3), seed=1)

    def total(kernel, x):
        return jnp.sum(jnp.sin(conv(x[None], kernel)))

    reverse = jax.vmap(jax.grad(total), (None, 0))(kernel, x)
    assert_close(jax.vmap(jax.jacfwd(total), (None, 0))(kernel, x), reverse)
