"""MobileSAM's image encoder: TinyViT (Wu et al. 2022; reference `TinyViT` of MobileSAM).

A convolutional stem and stage, then three stages of windowed attention. Unlike in a classifier the
third stage does not halve the grid, so that a 1024-pixel picture gives the 64 x 64 grid of SAM.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam_jax.config import SamConfig
from sam_jax.idioms import WithAdvice
from sam_jax.models.layers import (
    Buffer,
    LayerNorm,
    Linear,
    Neck,
    align,
    call_block,
    gelu,
    join_windows,
    partition_windows,
    rowwise,
)
from sam_jax.ops.attention import softmax
from sam_jax.ops.operation import operation

_EPS = 1e-5  # of batch norms and of layer norms outside the neck: PyTorch's default


class TinyViT(WithAdvice, nnx.Module):
    """Normalised pixels to image embeddings.

    `norm_head` and `head` are the classifier that the encoder was first trained with. SAM has no
    use for them; they are kept where the checkpoint holds them, as MobileSAM's does.
    """

    def __init__(self, config: SamConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        tiny = config.image_encoder
        dims = tiny.embed_dims
        self.patch_embed = PatchEmbed(dims[0], tiny.stem_stride, dtype=dtype, rngs=rngs)
        self.layers = nnx.List()
        for i, (dim, depth) in enumerate(zip(dims, tiny.depths, strict=True)):
            if i == 0:
                hidden = int(dim * tiny.mbconv_expand_ratio)
                blocks = [MBConv(dim, hidden, dtype=dtype, rngs=rngs) for _ in range(depth)]
            else:
                heads, window = tiny.num_heads[i], tiny.window_sizes[i]
                blocks = [
                    TinyViTBlock(dim, heads, window, tiny.mlp_ratio, dtype=dtype, rngs=rngs)
                    for _ in range(depth)
                ]
            merging = None
            if i + 1 < len(dims):
                # The last merging of four stages keeps the grid. (The reference decides by the
                # width: 320, 448 or 576.)
                stride = 1 if i + 2 == len(dims) else 2
                merging = PatchMerging(dim, dims[i + 1], stride, dtype=dtype, rngs=rngs)
            self.layers.append(Stage(blocks, merging))
        if tiny.num_classes is not None:
            self.norm_head = ClassifierNorm(dims[-1])
            self.head = ClassifierHead(dims[-1], tiny.num_classes)
        self.hq = config.hq
        self.neck = Neck(dims[-1], config.prompt_embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, pixel_values: Float[Array, "b size size 3"], *, remat: bool = False
    ) -> Float[Array, "b grid grid c"]:
        x = self.patch_embed(pixel_values)
        early = None
        for i, layer in enumerate(self.layers):
            x = layer(x, remat=remat)
            if self.hq and i == 1:  # of the first stage with attention, on the grid already
                early = x
        x = self.neck(x)
        return x if early is None else jnp.concatenate([x, early], -1)


class Stage(nnx.Module):
    """Blocks, then the merging to the next stage (reference `ConvLayer`, `BasicLayer`)."""

    def __init__(self, blocks, downsample):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample

    def __call__(
        self, x: Float[Array, "b h w c"], *, remat: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        for block in self.blocks:
            x = call_block(block, x, remat=remat)
        return x if self.downsample is None else self.downsample(x)


class ConvBN(nnx.Module):
    """A convolution and a batch norm with fixed statistics (`Conv2d_BN` in evaluation mode).

    The convolution is of one pixel, depthwise, or of 3 x 3 pixels with stride 2.

    The norm is folded into the kernel, which costs a pass over the kernel instead of one over the
    picture.
    """

    def __init__(self, in_chans, out_chans, size=1, stride=1, *, depthwise=False, dtype, rngs):
        shape = (size, size, 1 if depthwise else in_chans, out_chans)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
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
        scale = scale * jax.lax.rsqrt(var + _EPS)
        kernel = (kernel * align(scale, kernel)).astype(self.dtype)
        bias = (bias - mean * scale).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.depthwise:
            return depthwise_conv(x, kernel, self.stride) + align(bias, x)
        if kernel.shape[0] == 1:
            return rowwise(lambda rows: rows @ kernel[0, 0] + bias[None], x)
        return halving_conv(x, kernel) + align(bias, x)


@jax.custom_jvp
@jax.jit
@operation("sam.conv")
def halving_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h//2 w//2 o"]:
    """The stem's convolution, of stride 2, as one of stride 1 whose pixels are blocks of 2 x 2.

    XLA on a CPU is faster at the gradient of the picture, three times.
    """
    (b, h, w, c), out = x.shape, kernel.shape[-1]
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    # Around pixel 2 * i are one of the block before and both of its own.
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
    """As products of matrices; in the gradient of the kernel XLA on a CPU is faster."""
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
    return _shifted_sum(_pad(x, kernel), _taps(kernel), stride)


@depthwise_conv.defjvp
def _depthwise_conv_jvp(stride, primals, tangents):
    """Written for its transpose, which is what training needs, to be fast on a CPU."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    by_x = _padded_sum(x_dot, kernel) if stride == 1 else depthwise_conv(x_dot, kernel, stride)
    padded = _barrier_on_cpu(_pad(x, kernel))
    by_kernel = _depthwise_conv_by_kernel(padded, kernel_dot, stride)
    return _shifted_sum(padded, _taps(kernel), stride), by_x + by_kernel


@jax.jit
def _barrier_on_cpu(padded):
    """Otherwise XLA takes the middle tap from what was padded, and keeps what that is made of."""
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(padded, cpu=barrier, default=lambda x: x)


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
    """The convolution of stride 1 with a transpose of slices, where `_shifted_sum`'s is of pads.

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

    So many rows at a time.

    XLA on a CPU makes arrays of the products that it sums, but not of those that it adds up.
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


class PatchEmbed(nnx.Module):
    """The stem: two convolutions, of 3 x 3 pixels and stride 2, or of one pixel (LiteMedSAM)."""

    def __init__(self, dim, stride, *, dtype, rngs):
        size = 2 * stride - 1
        self.conv1 = ConvBN(3, dim // 2, size, stride, dtype=dtype, rngs=rngs)
        self.conv2 = ConvBN(dim // 2, dim, size, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv2(gelu(self.conv1(x)))


class MBConv(nnx.Module):
    """An inverted bottleneck; the last activation follows the residual."""

    def __init__(self, dim, hidden, *, dtype, rngs):
        self.conv1 = ConvBN(dim, hidden, dtype=dtype, rngs=rngs)
        self.conv2 = ConvBN(hidden, hidden, 3, depthwise=True, dtype=dtype, rngs=rngs)
        self.conv3 = ConvBN(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return gelu(x + self.conv3(gelu(self.conv2(gelu(self.conv1(x))))))


class PatchMerging(nnx.Module):
    """To the next stage's width, and with stride 2 to half the grid."""

    def __init__(self, dim, out_dim, stride, *, dtype, rngs):
        self.conv1 = ConvBN(dim, out_dim, dtype=dtype, rngs=rngs)
        self.conv2 = ConvBN(out_dim, out_dim, 3, stride, depthwise=True, dtype=dtype, rngs=rngs)
        self.conv3 = ConvBN(out_dim, out_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


class TinyViTBlock(nnx.Module):
    """Windowed attention, a depthwise convolution, an MLP."""

    def __init__(self, dim, num_heads, window, mlp_ratio, *, dtype, rngs):
        self.attn = Attention(dim, num_heads, window, dtype=dtype, rngs=rngs)
        self.local_conv = ConvBN(dim, dim, 3, depthwise=True, dtype=dtype, rngs=rngs)
        self.mlp = NormMLP(dim, int(dim * mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.local_conv(x + self.attn(x))
        return x + self.mlp(x)


class Attention(nnx.Module):
    """Self-attention within windows with a learnt bias for each distance in rows and columns."""

    def __init__(self, dim, num_heads, window, *, dtype, rngs):
        self.norm = LayerNorm(dim, eps=_EPS, dtype=dtype)
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, window * window)))
        self.window = window

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        grid, window, c = x.shape[1:3], self.window, x.shape[-1]
        n, heads = window * window, self.attention_biases.shape[0]
        # The reference pads with zeros before the norm, which makes its bias of them.
        padding = self.qkv(self.norm(jnp.zeros(c, x.dtype)))
        qkv = partition_windows(self.qkv(self.norm(x)), window, padding)
        qkv = qkv.reshape(-1, n, heads, 3 * c // heads)

        # The bias of |row distance| r and |column distance| c is entry r * window + c.
        row, column = jnp.divmod(jnp.arange(n), window)
        index = abs(row[:, None] - row[None]) * window + abs(column[:, None] - column[None])
        bias = self.attention_biases[...].astype(jnp.float32)[:, index]

        out = _attend(qkv, bias).transpose(0, 2, 1, 3).reshape(-1, window, window, c)
        return self.proj(join_windows(out, grid))


@jax.jit
def _attend(
    qkv: Float[Array, "b n heads c3"], bias: Float[Array, "heads n n"]
) -> Float[Array, "b heads n c3//3"]:
    """Self-attention of heads whose queries, keys and values lie one after the other."""
    return jax.lax.platform_dependent(qkv, bias, cpu=_attend_in_two_groups, default=_attend_at_once)


def _attend_in_two_groups(qkv, bias):
    """XLA computes a batch of products on one core of a CPU, and two batches on two."""
    parts = zip(jnp.array_split(qkv, 2, 2), jnp.array_split(bias, 2), strict=True)
    return jnp.concatenate([_attend_at_once(*some_heads) for some_heads in parts], 1)


def _attend_at_once(qkv, bias):
    q, k, v = (t.transpose(0, 2, 1, 3) for t in jnp.split(qkv, 3, -1))
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32)
    # A product with ones, whose gradient is one, too: XLA on a CPU is slow at the sum of a
    # broadcast's.
    bias = jnp.einsum("b,nqk->bnqk", jnp.ones(q.shape[0], bias.dtype), bias)
    weights = softmax(logits + bias).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v)


class NormMLP(nnx.Module):
    """Layer norm, linear, GELU, linear."""

    def __init__(self, dim, hidden, *, dtype, rngs):
        self.norm = LayerNorm(dim, eps=_EPS, dtype=dtype)
        self.fc1 = Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return self.fc2(gelu(self.fc1(self.norm(x))))


class ClassifierNorm(nnx.Module):
    """Weights of the classifier's layer norm, kept for conversion."""

    def __init__(self, dim):
        self.scale = Buffer(jnp.ones(dim))
        self.bias = Buffer(jnp.zeros(dim))


class ClassifierHead(nnx.Module):
    """Weights of the classifier's linear layer, kept for conversion."""

    def __init__(self, dim, num_classes):
        self.kernel = Buffer(jnp.zeros((dim, num_classes)))
        self.bias = Buffer(jnp.zeros(num_classes))
