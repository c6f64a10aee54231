"""The ViT-B/L/H image encoder (paper, appendix A; reference `ImageEncoderViT`).

A plain ViT whose blocks attend within 14 x 14 windows, four of them globally, with decomposed
relative positions; a neck of two convolutions brings the result to 256 channels.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sam_jax.config import SamConfig, ViTConfig
from sam_jax.idioms import WithAdvice
from sam_jax.models.checks import check_pixels
from sam_jax.models.layers import (
    MLP,
    LayerNorm,
    Linear,
    Neck,
    PatchConv,
    Remat,
    call_block,
    drop_path,
    gelu,
    join_windows,
    partition_windows,
    split_keys,
)
from sam_jax.models.meshes import with_auto_axes
from sam_jax.ops.attention import Implementation, attention_weights, rel_pos_attention
from sam_jax.ops.barrier import narrow


class ImageEncoderViT(WithAdvice, nnx.Module):
    """Normalized pixels to image embeddings."""

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: Implementation = "portable",
        rngs: nnx.Rngs,
    ):
        vit, grid = config.image_encoder, config.image_embedding_size
        assert isinstance(vit, ViTConfig)
        self.image_size = config.image_size
        self.patch_embed = PatchConv(3, vit.embed_dim, vit.patch_size, dtype=dtype, rngs=rngs)
        self.pos_embed = (
            nnx.Param(jnp.zeros((1, grid, grid, vit.embed_dim))) if vit.use_abs_pos else None
        )
        self.blocks = nnx.List(
            Block(
                vit,
                grid=grid,
                window=0 if i in vit.global_attn_indexes else vit.window_size,
                dtype=dtype,
                attention=attention,
                rngs=rngs,
            )
            for i in range(vit.depth)
        )
        # SAM-HQ's decoder reads the output of the first block that attends globally.
        self.early_block = min(vit.global_attn_indexes) if config.hq else None
        self.neck = Neck(vit.embed_dim, config.prompt_embed_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        pixel_values: Float[Array, "b size size 3"],
        *,
        remat: Remat = False,
        drop_path_rate: float = 0.0,
        keys: Array | None = None,
    ) -> Float[Array, "b grid grid c"]:
        return self.embed(
            self.hidden_states(pixel_values, remat=remat, drop_path_rate=drop_path_rate, keys=keys)
        )

    def hidden_states(
        self,
        pixel_values: Float[Array, "b size size 3"],
        *,
        remat: Remat = False,
        drop_path_rate: float = 0.0,
        keys: Array | None = None,
    ) -> list[Float[Array, "b grid grid width"]]:
        """The embeddings of the patches, then the output of each block.

        So the input of `blocks[i]` is entry i, and `blocks[i].attention_weights` of it says what
        the block attends to.
        """

        def states_of(pixel_values, vit, keys):
            x = vit.patch_embed(pixel_values)
            if vit.pos_embed is not None:
                x = x + vit.pos_embed[...].astype(x.dtype)
            depth = len(vit.blocks)
            # From 0 in the first block to the whole rate in the last.
            rates = np.linspace(0, drop_path_rate, depth)
            block_keys = [None] * depth if keys is None else split_keys(keys, depth)
            states = [x]
            for block, rate, some_keys in zip(vit.blocks, rates, block_keys, strict=True):
                states.append(call_block(block, states[-1], rate, some_keys, remat=remat))
            return states

        return with_auto_axes(states_of, check_pixels(self.image_size, pixel_values), self, keys)

    def embed(
        self, hidden_states: Sequence[Float[Array, "b grid grid width"]]
    ) -> Float[Array, "b grid grid c"]:
        """The image embeddings, from `hidden_states`."""
        x = self.neck(hidden_states[-1])
        if self.early_block is None:
            return x
        return jnp.concatenate([x, hidden_states[self.early_block + 1]], -1)


class Block(nnx.Module):
    """Attention, windowed unless `window` is 0, then the MLP, each with a residual."""

    def __init__(self, vit: ViTConfig, *, grid: int, window: int, dtype, attention, rngs):
        self.norm1 = LayerNorm(vit.embed_dim, eps=vit.layer_norm_eps, dtype=dtype)
        self.attn = Attention(
            vit, grid=grid, window=window, dtype=dtype, implementation=attention, rngs=rngs
        )
        self.norm2 = LayerNorm(vit.embed_dim, eps=vit.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(vit.embed_dim, vit.mlp_dim, gelu, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], drop_path_rate: float = 0.0, keys: Array | None = None
    ) -> Float[Array, "b h w c"]:
        attn_keys, mlp_keys = (None, None) if keys is None else split_keys(keys, 2)
        x = x + drop_path(self.attn(self.norm1(x)), drop_path_rate, attn_keys)
        return x + drop_path(self.mlp(self.norm2(x)), drop_path_rate, mlp_keys)

    def attention_weights(self, x: Float[Array, "b h w c"]) -> Float[Array, "windows heads n n"]:
        """How much each position (third axis) attends to each (last axis); they sum to 1, float32.

        Positions are those of a window of `attn.window` x `attn.window`, row by row, and windows
        follow each other row by row, image by image. A block that attends globally has one window,
        the grid.
        """
        return with_auto_axes(lambda x, block: block.attn.weights(block.norm1(x)), x, self)


class Attention(nnx.Module):
    """Multi-head self-attention with decomposed relative positions.

    Over a grid, or within its windows unless `window` is 0.
    """

    def __init__(self, vit: ViTConfig, *, grid: int, window: int, dtype, implementation, rngs):
        self.qkv = Linear(
            vit.embed_dim, 3 * vit.embed_dim, use_bias=vit.qkv_bias, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(vit.embed_dim, vit.embed_dim, dtype=dtype, rngs=rngs)
        zeros = jnp.zeros((2 * (window or grid) - 1, vit.head_dim))
        self.rel_pos_h = nnx.Param(zeros) if vit.use_rel_pos else None
        self.rel_pos_w = nnx.Param(zeros) if vit.use_rel_pos else None
        self.num_heads = vit.num_heads
        self.window = window
        self.implementation = implementation

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        grid, c = (x.shape[1], x.shape[2]), x.shape[-1]
        q, k, v, rel_pos, (h, w) = self._heads(x)
        out = rel_pos_attention(q, k, v, rel_pos, (h, w), self.implementation)
        out = out.transpose(0, 2, 1, 3).reshape(q.shape[0], h, w, c)
        return self.proj(join_windows(out, grid) if self.window else out)

    def weights(self, x: Float[Array, "b h w c"]) -> Float[Array, "windows heads n n"]:
        """What the values are averaged with; see `Block.attention_weights`."""
        q, k, _, rel_pos, grid = self._heads(x)
        return attention_weights(q, k, rel_pos, grid)

    def _heads(self, x):
        """Queries, keys and values [windows, heads, n, d], the tables, and (h, w) of a window."""
        c = x.shape[-1]
        qkv = narrow(self.qkv(x))
        if self.window:  # the reference pads its input with zeros
            bias = jnp.zeros(3 * c) if self.qkv.bias is None else self.qkv.bias[...]
            qkv = partition_windows(qkv, self.window, bias.astype(qkv.dtype))
        b, h, w, _ = qkv.shape
        qkv = qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        rel_pos = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            rel_pos = self.rel_pos_h[...].astype(q.dtype), self.rel_pos_w[...].astype(q.dtype)
        return q, k, v, rel_pos, (h, w)
