"""TinyViT's convolutions with batch norms, written so that XLA is fast at them on a CPU.

Each is a function with its own derivative, and equal to PyTorch's `conv2d`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sam_jax.models.layers import Buffer, align, lecun_normal, matmul, rowwise
from sam_jax.ops.barrier import barrier_on_cpu
from sam_jax.ops.operation import operation

EPS = 1e-5  # of batch norms: PyTorch's default


class ConvBN(nnx.Module):
    """A convolution and a batch norm with fixed statistics (`Conv2d_BN` in evaluation mode).

    The convolution is of one pixel, depthwise, or of 3 x 3 pixels with stride 2.

    The norm is folded into the kernel: a pass over the kernel instead of one over the image.
    """

    def __init__(self, in_chans, out_chans, size=1, stride=1, *, depthwise=False, dtype, rngs):
        shape = (size, size, 1 if depthwise else in_chans, out_chans)
        self.kernel = nnx.Param(lecun_normal(rngs.params(), shape))
        self.scale = nnx.Param(jnp.ones(out_chans))
        self.bias = nnx.Param(jnp.zeros(out_chans))
        self.mean = Buffer(jnp.zeros(out_chans))
        self.var = Buffer(jnp.ones(out_chans))
        self.num_batches_tracked = Buffer(jnp.zeros((), jnp.int32))
        self.stride = stride
        self.depthwise = depthwise
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        # In float32, also where the checkpoint holds less.
        kernel, scale, bias, mean, var = (
            v[...].astype(jnp.float32)
            for v in (self.kernel, self.scale, self.bias, self.mean, self.var)
        )
        scale = scale * jax.lax.rsqrt(var + EPS)
        kernel = (kernel * align(scale, kernel)).astype(self.dtype)
        bias = (bias - mean * scale).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.depthwise:
            return depthwise_conv(x, kernel, self.stride) + align(bias, x)
        if kernel.shape[0] == 1:
            return pointwise_conv(x, kernel, bias)
        return halving_conv(x, kernel) + align(bias, x)


@jax.jit
@operation("sam.conv")
def pointwise_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], bias: Float[Array, " o"]
) -> Float[Array, "b h w o"]:
    """The convolution of one pixel, as a matmul."""
    return rowwise(lambda rows: matmul(rows, kernel[0, 0]) + bias[None], x)


@jax.custom_jvp
@jax.jit
@operation("sam.conv")
def halving_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h//2 w//2 o"]:
    """The stem's convolution, of stride 2, as one of stride 1 whose pixels are blocks of 2 x 2.

    On a CPU, XLA is three times faster at the image's gradient this way.
    """
    (b, h, w, c), out = x.shape, kernel.shape[-1]
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    # The pixels around pixel 2 * i are the last of the block before and both of block i.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(2, 2, 2, 2, c, out).transpose(0, 2, 1, 3, 4, 5)
    blocks = blocks.reshape(b, h // 2, w // 2, 4 * c)
    kernel = kernel.reshape(2, 2, 4 * c, out)
    return jax.lax.conv_general_dilated(
        blocks, kernel, (1, 1), ((1, 0), (1, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@halving_conv.defjvp
def _halving_conv_jvp(primals, tangents):
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    by_kernel = _halving_conv_by_kernel(x, kernel_dot)
    return halving_conv(x, kernel), halving_conv(x_dot, kernel) + by_kernel


@jax.jit
def _halving_conv_by_kernel(x, kernel):
    """`halving_conv`, written for the kernel's gradient."""
    return jax.lax.platform_dependent(x, kernel, cpu=_product_by_rows, default=halving_conv)


def _product_by_rows(x, kernel):
    """As matmuls, with which XLA on a CPU is faster at the kernel's gradient."""
    b, h, w = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
    kernel = kernel.astype(jnp.float32)  # in which its gradients are added up
    padded, rows = _pad(x, kernel), math.gcd(h, 4)  # at a time

    @jax.checkpoint
    def some_rows(start):
        some = jax.lax.dynamic_slice_in_dim(padded, 2 * start, 2 * rows + 1, axis=1)
        shifted = [some[:, i : i + 2 * rows : 2, j : j + 2 * w : 2] for i, j in np.ndindex(3, 3)]
        patches = jnp.concatenate(shifted, -1)
        return patches @ kernel.reshape(patches.shape[-1], -1).astype(x.dtype)

    total = jax.lax.map(some_rows, jnp.arange(0, h, rows))
    return jnp.moveaxis(total, 0, 1).reshape(b, h, w, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)
@operation("sam.conv")
def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "n n 1 c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    """A depthwise convolution, ten times faster on a CPU than XLA's grouped convolution."""
    # The barrier: otherwise XLA reads the middle tap before padding, computes the activation before
    # it twice, and keeps its inputs alive for the backward pass.
    return _shifted_sum(barrier_on_cpu(_pad(x, kernel)), _taps(kernel), stride)


@depthwise_conv.defjvp
def _depthwise_conv_jvp(stride, primals, tangents):
    """Written so that its transpose, which training needs, is fast on a CPU."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    by_x = _padded_sum(x_dot, kernel) if stride == 1 else depthwise_conv(x_dot, kernel, stride)
    padded = barrier_on_cpu(_pad(x, kernel))  # as in the function
    by_kernel = _depthwise_conv_by_kernel(padded, kernel_dot, stride)
    return _shifted_sum(padded, _taps(kernel), stride), by_x + by_kernel


@functools.partial(jax.jit, static_argnums=2)
def _depthwise_conv_by_kernel(padded, kernel, stride):
    """`depthwise_conv` of padded pixels, written for the kernel's gradient."""
    height = (padded.shape[1] - len(kernel)) // stride + 1
    some_rows = functools.partial(_sum_by_rows, stride=stride)
    return jax.lax.platform_dependent(
        padded,
        kernel,
        cpu=functools.partial(some_rows, rows=1),
        default=functools.partial(some_rows, rows=height),
    )


def _padded_sum(x, kernel):
    """The convolution of stride 1, whose transpose slices; that of `_shifted_sum` pads.

    XLA on a CPU is faster at slices.
    """
    size, (_, h, w, _) = len(kernel), x.shape
    total = jnp.zeros((), jnp.float32)
    for i, row in enumerate(_taps(kernel)):
        for j, tap in enumerate(row):
            edges = (0, 0), (size - 1 - i, i), (size - 1 - j, j), (0, 0)
            total = total + jnp.pad(x.astype(jnp.float32) * tap[None, None, None], edges)
    pad = size // 2
    return total[:, pad : pad + h, pad : pad + w].astype(x.dtype)


def _sum_by_rows(padded, kernel, stride, rows):
    """The convolution whose transpose adds up gradients of whole rows, and sums along them last.

    It computes `rows` rows at a time. XLA on a CPU materializes the products that a sum reduces,
    but not those that are added to each other.
    """
    (b, height, width, c), size = padded.shape, len(kernel)
    h, w = ((side - size) // stride + 1 for side in (height, width))
    taps = [[jnp.broadcast_to(tap, (b, rows, w, c)) for tap in row] for row in _taps(kernel)]

    @jax.checkpoint
    def some_rows(start):
        window = (rows - 1) * stride + size
        some = jax.lax.dynamic_slice_in_dim(padded, start * stride, window, axis=1)
        return _shifted_sum(some, taps, stride)

    total = jax.lax.map(some_rows, jnp.arange(0, h, rows))
    return jnp.moveaxis(total, 0, 1).reshape(b, h, w, c)


def _pad(x, kernel):
    pad = len(kernel) // 2
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _taps(kernel):
    """The weights of each row, and in it of each column."""
    return [[tap[0].astype(jnp.float32) for tap in row] for row in kernel]


def _shifted_sum(padded, taps, stride):
    """The convolution as shifted multiply-adds, which XLA fuses into one loop."""
    (b, h, w, c), size = padded.shape, len(taps)
    out_h, out_w = ((side - size) // stride + 1 for side in (h, w))
    total = jnp.zeros((b, out_h, out_w, c), jnp.float32)
    for i in range(size):
        for j in range(size):
            end = (b, i + (out_h - 1) * stride + 1, j + (out_w - 1) * stride + 1, c)
            shifted = jax.lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1))
            total = total + shifted.astype(jnp.float32) * align(taps[i][j], shifted)
    return total.astype(padded.dtype)
