"""Pieces that several parts of the model share. Channels are last everywhere."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam_jax.ops.operation import operation

# Whether a block is computed again in the backward pass, rather than kept: not, all of it, or what
# a policy of `jax.checkpoint_policies` does not save.
Remat = bool | Callable[..., bool]


class Buffer(nnx.Variable):
    """A tensor of the checkpoint that is saved and converted but never trained.

    The frequencies of the positional encoding and the statistics of batch norms are such tensors:
    `register_buffer` in the reference.
    """


def random_init(init: nnx.Initializer) -> nnx.Initializer:
    """The initializer, which without a key gives zeros.

    Where only shapes matter, as in `from_pretrained`, half of the time would be spent on tracing
    random numbers.
    """

    def initialize(key, shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype) if key is None else init(key, shape, dtype)

    return initialize


lecun_normal = random_init(nnx.initializers.lecun_normal())
normal = random_init(nnx.initializers.normal(1.0))


class LayerNorm(nnx.Module):
    """Layer norm over the channels (the reference's `LayerNorm` and `LayerNorm2d`).

    Mean and variance are computed in float32; the result has the dtype `dtype`.
    """

    def __init__(self, channels: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        scale, bias = (v[...].astype(jnp.float32) for v in (self.scale, self.bias))
        return _layer_norm(x.astype(jnp.float32), scale, bias, self.eps).astype(self.dtype)


@functools.partial(jax.jit, static_argnums=3)
@operation("sam.layer_norm")
def _layer_norm(x, scale, bias, eps):
    x = _normalize(x, eps)
    return x * align(scale, x) + align(bias, x)


def align(vector: Float[Array, "*last"], x: Float[Array, "*shape"]) -> Float[Array, "*full"]:
    """`vector` with leading axes of size one, up to the rank of `x`.

    So it broadcasts even where users forbid JAX's `numpy_rank_promotion`.
    """
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normalize(x, eps):
    centered, rate = _center(x, eps)
    return centered * rate


def _center(x, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered, jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)


@_normalize.defjvp
def _normalize_jvp(eps, primals, tangents):
    """Written for its transpose, so that the backward pass keeps less."""
    (x,), (tangent,) = primals, tangents
    centered, rate = _center(x, eps)
    ones = jnp.ones((x.shape[-1], 1), x.dtype)

    # As a matmul, whose transpose is one, too: XLA on a CPU materializes the broadcast of a sum.
    def mean(t):
        t = jnp.matmul(t, ones, precision="highest") / x.shape[-1]
        return jnp.matmul(t, ones.T, precision="highest")

    slope = tangent - mean(tangent) - centered * mean(centered * tangent) * rate**2
    return centered * rate, slope * rate


class Linear(nnx.Linear):
    """`nnx.Linear`, by `rowwise`."""

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, kernel_init=lecun_normal, **options)

    # Without the sharding of its result: rows are joined.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Array, "*batch i"]
    ) -> Float[Array, "*batch o"]:
        kernel = self.kernel[...].astype(self.dtype)
        bias = None if self.bias is None else self.bias[...].astype(self.dtype)

        def linear(rows):
            y = matmul(rows.astype(self.dtype), kernel)
            return y if bias is None else y + bias[None]

        return rowwise(linear, x)

    def weight(self) -> Float[Array, "i o"]:
        """What the layer multiplies with; the two-way `Attention` multiplies with it directly."""
        return self.kernel[...]


def matmul(x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """`x @ kernel`, in the form that is fast on a CPU, too.

    Of bfloat16, XLA multiplies on a CPU's units for it (AMX) if the product is float32.
    """
    return x @ kernel if x.dtype != jnp.bfloat16 else _matmul_to_float32(x, kernel)


@jax.custom_jvp
@jax.jit
def _matmul_to_float32(x, kernel):
    def wide(x, kernel):
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, kernel, cpu=wide, default=jnp.matmul)


@_matmul_to_float32.defjvp
def _matmul_to_float32_jvp(primals, tangents):
    """With products whose transposes have one dtype."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    return _matmul_to_float32(x, kernel), x_dot @ kernel + x @ kernel_dot


def rowwise(function, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
    """`function` of [rows, i], on `x` with all axes but the last joined.

    A kernel's gradient sums over rows. If rows span several axes, XLA on a CPU copies what it sums
    into a transposed array.
    """
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


class MLP(nnx.Module):
    """Linear, activation, linear (the reference's `MLPBlock`)."""

    def __init__(self, channels: int, mlp_dim: int, activation, *, dtype, rngs: nnx.Rngs):
        self.lin1 = Linear(channels, mlp_dim, dtype=dtype, rngs=rngs)
        self.lin2 = Linear(mlp_dim, channels, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return self.lin2(self.activation(self.lin1(x)))


class PatchConv(nnx.Module):
    """A convolution whose stride is its kernel size: one matmul over non-overlapping patches."""

    def __init__(self, in_chans: int, out_chans: int, patch: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(lecun_normal(rngs.params(), (patch, patch, in_chans, out_chans)))
        self.bias = nnx.Param(jnp.zeros(out_chans))
        self.patch = patch
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "*batch h w i"]
    ) -> Float[Array, "*batch h//{self.patch} w//{self.patch} o"]:
        p, _, i, o = self.kernel.shape
        *batch, h, w, _ = x.shape
        x = x.astype(self.dtype).reshape(*batch, h // p, p, w // p, p, i)
        x = jnp.swapaxes(x, -4, -3).reshape(*batch, h // p, w // p, p * p * i)
        kernel = self.kernel[...].astype(self.dtype).reshape(p * p * i, o)
        bias = self.bias[...].astype(self.dtype)
        return rowwise(lambda patches: matmul(patches, kernel) + bias[None], x)


class UpscaleConv(nnx.Module):
    """`ConvTranspose2d(kernel_size=2, stride=2)`: each pixel becomes 2 x 2 pixels, by one matmul.

    The new pixels get axes of their own, so that operations per pixel need no transpose;
    `join_pixels` makes one image of them. `kernel[c, i, j, o]` leads from channel c to channel o of
    the pixel at row i, column j, as in the reference's kernel, so that nothing is flipped.
    """

    def __init__(self, in_chans: int, out_chans: int, *, dtype, rngs: nnx.Rngs):
        init = random_init(nnx.initializers.lecun_normal(in_axis=0, out_axis=3))
        self.kernel = nnx.Param(init(rngs.params(), (in_chans, 2, 2, out_chans)))
        self.bias = nnx.Param(jnp.zeros(out_chans))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*pixels i"]) -> Float[Array, "*pixels 2 2 o"]:
        i, _, _, o = self.kernel.shape
        kernel = self.kernel[...].astype(self.dtype).reshape(i, 4 * o)
        x = rowwise(lambda pixels: matmul(pixels.astype(self.dtype), kernel), x)
        x = x.reshape(*x.shape[:-1], 2, 2, o)
        return x + align(self.bias[...].astype(self.dtype), x)


def join_pixels(x: Float[Array, "h w *pixels_of_pixels c"]) -> Float[Array, "rows columns c"]:
    """Pixels of pixels as one image: [h, w, 2, 2, 2, 2, c] -> [4 * h, 4 * w, c]."""
    *pixels, c = x.shape
    last = len(pixels)
    rows, columns = range(0, last, 2), range(1, last, 2)
    x = x.transpose(*rows, *columns, last)
    return x.reshape(math.prod(pixels[::2]), math.prod(pixels[1::2]), c)


class Neck(nnx.Module):
    """1x1 and 3x3 convolution with norms: encoder width to embedding width."""

    def __init__(self, in_chans: int, out_chans: int, *, dtype, rngs: nnx.Rngs):
        options = {"use_bias": False, "kernel_init": lecun_normal, "dtype": dtype, "rngs": rngs}
        self.conv1 = nnx.Conv(in_chans, out_chans, (1, 1), **options)
        self.norm1 = LayerNorm(out_chans, eps=1e-6, dtype=dtype)
        self.conv2 = nnx.Conv(out_chans, out_chans, (3, 3), **options)
        self.norm2 = LayerNorm(out_chans, eps=1e-6, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


def relu(x: Array) -> Array:
    """`jax.nn.relu` as a function that can be pickled, and a model that holds it."""
    return jax.nn.relu(x)


def gelu(x: Array) -> Array:
    """The exact GELU, computed as PyTorch does: with `erf`, in float32 whatever the dtype.

    `jax.nn.gelu(x, approximate=False)` uses `erfc`, which takes a CPU 2.5 times as long, and keeps
    several arrays for the backward pass, where this keeps one.
    """
    return _gelu(x)  # which cannot be pickled itself, and a model holds this function


@jax.custom_jvp
@operation("sam.gelu")
def _gelu(x):
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    # erf(-x): otherwise XLA's CSE shares the forward erf and keeps it alive for the backward pass.
    slope = 0.5 * (1 - jax.lax.erf(wide * -math.sqrt(0.5))) + wide * density
    return _gelu(x), tangent * slope.astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def drop_path(x: Float[Array, "b h w c"], rate: float, keys: Array | None) -> Array:
    """Stochastic depth (Huang et al. 2016): drops the branch for some images of the batch.

    Branches that stay are scaled up, so that the mean is unchanged. Each image has its own key, so
    that the result does not depend on the batch. Without keys nothing is dropped.
    """
    if keys is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (1, 1, 1)))(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def split_keys(keys: Array, count: int) -> Array:
    """[b] keys -> [count, b]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def call_block(block, x: Array, *args, remat: Remat) -> Array:
    """`block(x, *args)`, whose activations are kept for the backward pass or not."""

    def call(x):
        return block(x, *args)

    if not remat:
        return call(x)
    return jax.checkpoint(call, policy=remat if callable(remat) else None)(x)


def partition_windows(
    x: Float[Array, "b h w c"], window: int, padding: Float[Array, " c"]
) -> Float[Array, "n {window} {window} c"]:
    """Splits a grid into windows; positions beyond its lower and right edges get `padding`.

    The reference's `window_partition`: padded positions are attended to like any other. The
    reference pads the input of a linear layer. This pads its output, which saves work.
    """
    b, h, w, c = x.shape
    rows, columns = -(-h // window), -(-w // window)
    below = jnp.broadcast_to(padding, (b, rows * window - h, w, c))
    x = jnp.concatenate([x, below], 1)
    right = jnp.broadcast_to(padding, (b, rows * window, columns * window - w, c))
    x = jnp.concatenate([x, right], 2)
    x = x.reshape(b, rows, window, columns, window, c)
    return jnp.swapaxes(x, 2, 3).reshape(b * rows * columns, window, window, c)


def join_windows(
    windows: Float[Array, "n window window c"], grid: tuple[int, int]
) -> Float[Array, "b {grid[0]} {grid[1]} c"]:
    """The inverse of `partition_windows` for a grid of (h, w); it drops the padding."""
    h, w = grid
    n, window, _, c = windows.shape
    rows, columns = -(-h // window), -(-w // window)
    x = windows.reshape(n // (rows * columns), rows, columns, window, window, c)
    x = jnp.swapaxes(x, 2, 3).reshape(-1, rows * window, columns * window, c)
    return x[:, :h, :w]
