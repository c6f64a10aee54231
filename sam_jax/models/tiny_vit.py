"""MobileSAM's image encoder: TinyViT (Wu et al. 2022; reference `TinyViT` of MobileSAM).

A convolutional stem and stage, then three stages of windowed attention. Unlike in a classifier the
third stage does not halve the grid, so that a 1024-pixel image gives the 64 x 64 grid of SAM.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam_jax.config import SamConfig, TinyViTConfig
from sam_jax.idioms import WithAdvice
from sam_jax.models.checks import check_pixels
from sam_jax.models.convolutions import ConvBN
from sam_jax.models.layers import (
    Buffer,
    LayerNorm,
    Linear,
    Neck,
    Remat,
    call_block,
    gelu,
    join_windows,
    partition_windows,
)
from sam_jax.models.meshes import with_auto_axes
from sam_jax.ops.attention import Implementation, softmax

_EPS = 1e-5  # of layer norms outside the neck: PyTorch's default


class TinyViT(WithAdvice, nnx.Module):
    """Normalized pixels to image embeddings.

    `norm_head` and `head` are the classifier that the encoder was first trained with. SAM has no
    use for them; they are kept where the checkpoint holds them, as MobileSAM's does.
    """

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: Implementation = "portable",
        rngs: nnx.Rngs,
    ):
        if attention != "portable":
            raise ValueError(
                f"attention is {attention!r}, but TinyViT (MobileSAM) computes its attention in "
                "one way only; leave it out"
            )
        tiny = config.image_encoder
        assert isinstance(tiny, TinyViTConfig)
        dims = tiny.embed_dims
        self.image_size = config.image_size
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
        self, pixel_values: Float[Array, "b size size 3"], *, remat: Remat = False
    ) -> Float[Array, "b grid grid c"]:
        return self.embed(self.hidden_states(pixel_values, remat=remat))

    def hidden_states(
        self, pixel_values: Float[Array, "b size size 3"], *, remat: Remat = False
    ) -> list[Float[Array, "b _ _ _"]]:
        """The output of the stem, then of each of the four stages, whose grids differ.

        So the input of `layers[i]` is entry i. Its blocks follow each other, and all but those of
        the first stage have `attention_weights(x)` of their input.
        """

        def states_of(pixel_values, vit):
            states = [vit.patch_embed(pixel_values)]
            for stage in vit.layers:
                states.append(stage(states[-1], remat=remat))
            return states

        return with_auto_axes(states_of, check_pixels(self.image_size, pixel_values), self)

    def embed(
        self, hidden_states: Sequence[Float[Array, "b _ _ _"]]
    ) -> Float[Array, "b grid grid c"]:
        """The image embeddings, from `hidden_states`."""
        x = self.neck(hidden_states[-1])
        # SAM-HQ's decoder reads the first stage with attention, which is on the grid already.
        return jnp.concatenate([x, hidden_states[2]], -1) if self.hq else x


class Stage(nnx.Module):
    """Blocks, then the merging to the next stage (reference `ConvLayer`, `BasicLayer`)."""

    def __init__(self, blocks, downsample):
        self.blocks = nnx.List(blocks)
        self.downsample = downsample

    def __call__(
        self, x: Float[Array, "b h w c"], *, remat: Remat = False
    ) -> Float[Array, "b h2 w2 c2"]:
        for block in self.blocks:
            x = call_block(block, x, remat=remat)
        return x if self.downsample is None else self.downsample(x)


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

    def attention_weights(self, x: Float[Array, "b h w c"]) -> Float[Array, "windows heads n n"]:
        """How much each position (third axis) attends to each (last axis); they sum to 1, float32.

        Positions are those of a window of `attn.window` x `attn.window`, row by row, and windows
        follow each other row by row, image by image.
        """
        return with_auto_axes(lambda x, block: block.attn.weights(x), x, self)


class Attention(nnx.Module):
    """Self-attention within windows with a learned bias for each distance in rows and columns."""

    def __init__(self, dim, num_heads, window, *, dtype, rngs):
        self.norm = LayerNorm(dim, eps=_EPS, dtype=dtype)
        self.qkv = Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.attention_biases = nnx.Param(jnp.zeros((num_heads, window * window)))
        self.window = window

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        grid, window, c = (x.shape[1], x.shape[2]), self.window, x.shape[-1]
        out = _attend(*self._heads(x)).transpose(0, 2, 1, 3).reshape(-1, window, window, c)
        return self.proj(join_windows(out, grid))

    def weights(self, x: Float[Array, "b h w c"]) -> Float[Array, "windows heads n n"]:
        """What the values are averaged with; see `TinyViTBlock.attention_weights`."""
        qkv, bias = self._heads(x)
        q, k, _ = _split(qkv)
        return _weights(q, k, bias)

    def _heads(self, x):
        """Queries, keys and values, joined: [windows, n, heads, 3 * d]; the bias [heads, n, n]."""
        window, c = self.window, x.shape[-1]
        n, heads = window * window, self.attention_biases.shape[0]
        # The reference pads with zeros before the norm, which makes its bias of them.
        padding = self.qkv(self.norm(jnp.zeros(c, x.dtype)))
        qkv = partition_windows(self.qkv(self.norm(x)), window, padding)
        qkv = qkv.reshape(-1, n, heads, 3 * c // heads)

        # The bias of |row distance| r and |column distance| c is entry r * window + c.
        row, column = jnp.divmod(jnp.arange(n), window)
        index = abs(row[:, None] - row[None]) * window + abs(column[:, None] - column[None])
        return qkv, self.attention_biases[...].astype(jnp.float32)[:, index]


@jax.jit
def _attend(
    qkv: Float[Array, "b n heads c3"], bias: Float[Array, "heads n n"]
) -> Float[Array, "b heads n c3//3"]:
    """Self-attention of heads whose queries, keys and values lie one after the other."""
    return jax.lax.platform_dependent(
        qkv, bias, cpu=_attend_in_two_groups, default=_attend_all_heads
    )


def _attend_in_two_groups(qkv, bias):
    """XLA computes a batch of products on one core of a CPU, and two batches on two."""
    parts = zip(jnp.array_split(qkv, 2, 2), jnp.array_split(bias, 2), strict=True)
    return jnp.concatenate([_attend_all_heads(*some_heads) for some_heads in parts], 1)


def _attend_all_heads(qkv, bias):
    q, k, v = _split(qkv)
    return jnp.einsum("bnqk,bnkd->bnqd", _weights(q, k, bias).astype(v.dtype), v)


def _split(qkv):
    return (t.transpose(0, 2, 1, 3) for t in jnp.split(qkv, 3, -1))


def _weights(q, k, bias):
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32)
    # A product with ones, whose gradient is one, too: XLA on a CPU is slow at the sum of a
    # broadcast's.
    bias = jnp.einsum("b,nqk->bnqk", jnp.ones(q.shape[0], bias.dtype), bias)
    return softmax(logits + bias)


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
