"""Points, boxes and masks to tokens (paper, appendix A; reference `PromptEncoder`).

Written for one prompt of one image, without batch axes: `jax.vmap` adds them.

`join_prompts` makes a prompt's points and boxes one list of labeled points. Their tokens:

    label 0 to 3   encoding + point_embeddings[label]
    label -1       not_a_point_embed
    label -10      zeros, and no attention sees it
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sam_jax.config import SamConfig
from sam_jax.idioms import WithAdvice
from sam_jax.models.layers import Buffer, LayerNorm, PatchConv, align, gelu, normal
from sam_jax.ops.prompts import NOT_A_POINT, PADDING


class PromptEncoder(WithAdvice, nnx.Module):
    """Embeds one prompt. Everything but the mask's convolutions is float32, whatever `dtype` is."""

    def __init__(self, config: SamConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        dim = config.prompt_embed_dim
        self.pe_layer = PositionEmbeddingRandom(dim // 2, rngs=rngs)
        self.point_embeddings = nnx.List(
            nnx.Param(normal(rngs.params(), (1, dim))) for _ in range(4)
        )
        self.not_a_point_embed = nnx.Param(normal(rngs.params(), (1, dim)))
        self.no_mask_embed = nnx.Param(normal(rngs.params(), (1, dim)))
        self.mask_downscaling = MaskDownscaling(config, dtype=dtype, rngs=rngs)
        self.image_size = config.image_size
        self.grid = config.image_embedding_size

    def __call__(
        self, points: Float[Array, "n 2"], labels: Int[Array, " n"]
    ) -> tuple[Float[Array, "n c"], Bool[Array, " n"]]:
        """Tokens of labeled points, and which of them are real rather than padding.

        Args:
            points: (x, y) in pixels of the model's padded input; the center of the first pixel is
                (0, 0).
            labels: of the points, 0 to 3, -1 or -10.
        """
        encoding = self.pe_layer((points.astype(jnp.float32) + 0.5) / self.image_size)
        kinds = jnp.concatenate([p[...] for p in self.point_embeddings]).astype(jnp.float32)
        # Selected by a matmul, whose gradient is one, too; labels -1 and -10 select none.
        chosen = labels[:, None] == jnp.arange(len(kinds))[None]
        # HIGHEST: full float32, on a GPU and a TPU as well.
        chosen = chosen.astype(jnp.float32)
        tokens = encoding + jnp.matmul(chosen, kinds, precision=jax.lax.Precision.HIGHEST)
        label, not_a_point = labels[:, None], self.not_a_point_embed[...].astype(jnp.float32)
        tokens = jnp.where(label == NOT_A_POINT, not_a_point, tokens)
        return jnp.where(label == PADDING, 0.0, tokens), labels != PADDING

    def embed_mask(self, mask: Float[Array, "side side"] | None) -> Float[Array, "*grid c"]:
        """The dense embedding: [g, g, c] of a mask of logits, or [c] for no mask.

        Without a mask it is the same everywhere and for every prompt. It stays unbatched then, so
        that what depends on the image alone is computed once for all prompts.
        """
        if mask is None:
            return self.no_mask_embed[0]
        return self.mask_downscaling(mask[..., None])

    def get_dense_pe(self) -> Float[Array, "g g c"]:
        """The positional encoding of the image embedding's grid."""
        centers = (jnp.arange(self.grid, dtype=jnp.float32) + 0.5) / self.grid
        return self.pe_layer.of_grid(centers, centers)


class PositionEmbeddingRandom(nnx.Module):
    """Random Fourier features of positions in [0, 1]^2, always float32."""

    def __init__(self, num_pos_feats: int, *, rngs: nnx.Rngs):
        self.positional_encoding_gaussian_matrix = Buffer(normal(rngs.params(), (2, num_pos_feats)))

    def __call__(self, coords: Float[Array, "*batch 2"]) -> Float[Array, "*batch c"]:
        # Multiplied and added, not a matmul: float32 on every device.
        angles = self._angles(coords[..., :1], 0) + self._angles(coords[..., 1:], 1)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def of_grid(self, x: Float[Array, " w"], y: Float[Array, " h"]) -> Float[Array, "h w c"]:
        """The features of all positions (x, y), from the sines and cosines of x and y alone.

        sin(a + b) = sin a cos b + cos a sin b, and likewise the cosine. It is as exact; on a CPU,
        sines of all positions would take a tenth of a click's time.
        """
        a, b = self._angles(x[None, :, None], 0), self._angles(y[:, None, None], 1)
        sin_a, cos_a, sin_b, cos_b = jnp.sin(a), jnp.cos(a), jnp.sin(b), jnp.cos(b)

        def join(sines, cosines):
            # Joined before they are multiplied: otherwise XLA computes them for every position.
            return jnp.concatenate([sines, cosines], axis=-1)

        return join(sin_a, cos_a) * join(cos_b, cos_b) + join(cos_a, -sin_a) * join(sin_b, sin_b)

    def _angles(self, coords: Float[Array, "*batch 1"], axis: int) -> Float[Array, "*batch half"]:
        gaussian = self.positional_encoding_gaussian_matrix[...].astype(jnp.float32)
        return 2 * jnp.pi * ((2 * coords - 1) * align(gaussian[axis], coords))


class MaskDownscaling(nnx.Module):
    """A mask of logits, four times the grid's size, to the grid's dense embedding."""

    def __init__(self, config: SamConfig, *, dtype, rngs):
        chans, eps = config.prompt_encoder.mask_in_chans, config.prompt_encoder.layer_norm_eps
        self.conv1 = PatchConv(1, chans // 4, 2, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(chans // 4, eps=eps, dtype=dtype)
        self.conv2 = PatchConv(chans // 4, chans, 2, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(chans, eps=eps, dtype=dtype)
        self.conv3 = PatchConv(chans, config.prompt_embed_dim, 1, dtype=dtype, rngs=rngs)

    def __call__(self, mask: Float[Array, "side side 1"]) -> Float[Array, "side//4 side//4 c"]:
        x = gelu(self.norm1(self.conv1(mask)))
        x = gelu(self.norm2(self.conv2(x)))
        return self.conv3(x)
