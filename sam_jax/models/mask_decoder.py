"""Prompt tokens and image embedding to masks (paper, appendix A; reference `MaskDecoder`).

Written for one prompt of one image, without batch axes: `jax.vmap` adds them.
"""

import functools
import itertools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam_jax.config import SamConfig
from sam_jax.idioms import WithAdvice
from sam_jax.models.layers import (
    LayerNorm,
    Linear,
    UpscaleConv,
    align,
    gelu,
    join_pixels,
    lecun_normal,
    normal,
    relu,
)
from sam_jax.models.two_way_transformer import TwoWayTransformer


class MaskDecoder(WithAdvice, nnx.Module):
    """The two-way transformer between output tokens and image, and the heads that read it."""

    def __init__(self, config: SamConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        dim, decoder = config.prompt_embed_dim, config.mask_decoder
        num_mask_tokens = decoder.num_multimask_outputs + 1
        self.iou_token = nnx.Param(normal(rngs.params(), (1, dim)))
        self.mask_tokens = nnx.Param(normal(rngs.params(), (num_mask_tokens, dim)))
        self.transformer = TwoWayTransformer(config, dtype=dtype, rngs=rngs)
        self.output_upscaling = Upscaling(dim, dim // 4, dim // 8, dtype=dtype, rngs=rngs)
        self.output_hypernetworks_mlps = nnx.List(
            Head(dim, dim, dim // 8, 3, dtype=dtype, rngs=rngs) for _ in range(num_mask_tokens)
        )
        self.iou_prediction_head = Head(
            dim,
            decoder.iou_head_hidden_dim,
            num_mask_tokens,
            decoder.iou_head_depth,
            dtype=dtype,
            rngs=rngs,
        )
        self.hq = HQ(config, dtype=dtype, rngs=rngs) if config.hq else None
        self.dtype = dtype

    def __call__(
        self,
        image_embedding: Float[Array, "g g c"],
        image_pe: Float[Array, "g g c"],
        sparse: Float[Array, "n c"],
        sparse_mask: Bool[Array, " n"],
        dense: Float[Array, "*grid c"],
        *,
        multimask_output: bool | None,
        attention_similarity: Float[Array, "*heads_and_t g*g"] | None = None,
        target_embedding: Float[Array, "#t c"] | None = None,
        hq_features: Float[Array, "h w hq"] | None = None,
        hq_token_only: bool = False,
        image_is_shared: bool = False,
        weights: list[Array] | None = None,
    ) -> tuple[Float[Array, "m 4*g 4*g"], Float[Array, " m"]]:
        """Mask logits and predicted IoUs, both float32.

        Args:
            image_embedding: of `image_features`, as are `hq_features`.
            image_pe: of `PromptEncoder.get_dense_pe`.
            sparse: the prompt's tokens.
            sparse_mask: False where a token is padding.
            dense: the mask prompt's embedding, [g, g, c], or [c] for no mask.
            multimask_output: True for the three masks of an ambiguous prompt, False for the one of
                an unambiguous prompt, None for all, the one first.
            attention_similarity: see `TwoWayTransformer`.
            target_embedding: see `TwoWayTransformer`.
            hq_features: SAM-HQ's, else None.
            hq_token_only: see `predict_masks`.
            image_is_shared: see `TwoWayTransformer`.
            weights: see `run_transformer`.
        """
        outputs = output_slice(multimask_output)
        iou_token, mask_tokens, image_embedding = self.run_transformer(
            image_embedding,
            image_pe,
            sparse,
            sparse_mask,
            dense,
            outputs,
            attention_similarity=attention_similarity,
            target_embedding=target_embedding,
            image_is_shared=image_is_shared,
            weights=weights,
        )
        masks = self.predict_masks(
            mask_tokens, image_embedding, outputs, hq_features, hq_token_only=hq_token_only
        )
        return masks, self.predict_iou(iou_token)[outputs]

    def image_features(
        self, image_embedding: Float[Array, "g g all"]
    ) -> tuple[Float[Array, "g g c"], Float[Array, "h w hq"] | None]:
        """What depends on the image alone: its embedding of `Sam.encode_image`, and SAM-HQ's part.

        The latter is None for other models.
        """
        if self.hq is None:
            return image_embedding, None
        dim = self.mask_tokens.shape[-1]
        embedding, early = image_embedding[..., :dim], image_embedding[..., dim:]
        return embedding, self.hq.features(embedding, early)

    def run_transformer(
        self,
        image_embedding: Float[Array, "g g c"],
        image_pe: Float[Array, "g g c"],
        sparse: Float[Array, "n c"],
        sparse_mask: Bool[Array, " n"],
        dense: Float[Array, "*grid c"],
        outputs: slice,
        *,
        attention_similarity: Float[Array, "*heads_and_t g*g"] | None = None,
        target_embedding: Float[Array, "#t c"] | None = None,
        image_is_shared: bool = False,
        weights: list[Array] | None = None,
    ) -> tuple[Float[Array, " c"], Float[Array, "m c"], Float[Array, "g g c"]]:
        """The IoU token, the mask tokens and the image embedding after the two-way transformer.

        The mask tokens are those of `outputs`, and SAM-HQ's the last. For `weights` see
        `TwoWayTransformer`; its tokens are the IoU token, the mask tokens, SAM-HQ's, and the
        prompt's.
        """
        # Token order: IoU, masks, SAM-HQ's, points, box corners.
        own_tokens = [self.iou_token[...], self.mask_tokens[...]]
        if self.hq is not None:
            own_tokens.append(self.hq.token[...])
        output_tokens = jnp.concatenate(own_tokens)
        tokens = jnp.concatenate([output_tokens.astype(self.dtype), sparse.astype(self.dtype)])
        token_mask = jnp.concatenate([jnp.ones(len(output_tokens), bool), sparse_mask])

        masks = range(1, 1 + len(self.mask_tokens))[outputs]
        hq = range(1 + len(self.mask_tokens), len(output_tokens))
        # Without a mask prompt nothing here depends on the prompt, and no vmap batches it.
        grid = image_embedding.shape
        dense = align(dense, image_embedding).astype(self.dtype)
        keys = image_embedding.astype(self.dtype) + dense
        tokens, keys = self.transformer(
            keys.reshape(-1, grid[-1]),
            image_pe.astype(self.dtype).reshape(-1, grid[-1]),
            tokens,
            token_mask,
            outputs=[0, *masks, *hq],
            attention_similarity=attention_similarity,
            target_embedding=target_embedding,
            image_is_shared=image_is_shared,
            weights=weights,
        )
        return tokens[0], tokens[1:], keys.reshape(grid)

    def predict_iou(self, iou_token: Float[Array, " c"]) -> Float[Array, " all"]:
        """The IoU that the model expects of each mask, the single mask's first; needs no mask."""
        return self.iou_prediction_head(iou_token).astype(jnp.float32)

    def predict_masks(
        self,
        mask_tokens: Float[Array, "chosen c"],
        image_embedding: Float[Array, "g g c"],
        outputs: slice,
        hq_features: Float[Array, "h w hq"] | None = None,
        *,
        hq_token_only: bool = False,
    ) -> Float[Array, "m 4*g 4*g"]:
        """Mask logits of the mask tokens of `run_transformer`, to which SAM-HQ adds its own.

        With `hq_token_only`, each mask is that of SAM-HQ alone.
        """
        upscaled = gelu(self.output_upscaling(image_embedding))
        heads = list(self.output_hypernetworks_mlps)[outputs]
        tokens = mask_tokens if self.hq is None else mask_tokens[:-1]
        hyper_in = jnp.stack([h(t) for h, t in zip(heads, tokens, strict=True)])
        masks = jnp.matmul(upscaled, hyper_in.T, preferred_element_type=jnp.float32)
        masks = jnp.moveaxis(join_pixels(masks), -1, 0)
        if self.hq is None:
            return masks
        assert hq_features is not None
        hq_mask = self.hq.mask(mask_tokens[-1], join_pixels(upscaled), hq_features)
        return hq_mask[None] + (jnp.zeros_like(masks) if hq_token_only else masks)


def output_slice(multimask_output: bool | None) -> slice:
    """Which mask tokens count: the first for unambiguous prompts, the others for the rest.

    A function, since `nnx.tabulate` takes methods that return arrays alone.
    """
    if multimask_output is None:
        return slice(None)
    return slice(1, None) if multimask_output else slice(0, 1)


class Upscaling(nnx.Module):
    """Two transposed convolutions to four times the grid; only the first has a norm.

    Each pixel becomes 2 x 2 and these 2 x 2 again: see `join_pixels`.
    """

    def __init__(self, in_chans: int, hidden: int, out_chans: int, *, dtype, rngs):
        self.conv1 = UpscaleConv(in_chans, hidden, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(hidden, eps=1e-6, dtype=dtype)
        self.conv2 = UpscaleConv(hidden, out_chans, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "g g c"]) -> Float[Array, "g g 2 2 2 2 o"]:
        return self.conv2(gelu(self.norm(self.conv1(x))))


class HQ(nnx.Module):
    """What SAM-HQ adds (Ke et al. 2023; reference `MaskDecoderHQ` of `segment-anything-hq`).

    A mask with finer details, from its own token and from the image encoder's first and last
    layers, which is added to each of SAM's masks. The reference returns the best of three masks
    by their predicted IoU, and Hugging Face all three, the best first; here they are all three in
    SAM's order.
    """

    def __init__(self, config: SamConfig, *, dtype, rngs):
        dim, options = config.prompt_embed_dim, {"dtype": dtype, "rngs": rngs}
        self.token = nnx.Param(normal(rngs.params(), (1, dim)))
        self.mlp = Head(dim, dim, dim // 8, 3, **options)
        early_dim = config.image_encoder.early_dim
        self.compress_vit_feat = Upscaling(early_dim, dim, dim // 8, **options)
        self.embedding_encoder = Upscaling(dim, dim // 4, dim // 8, **options)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), kernel_init=lecun_normal, **options)
        self.conv1 = conv(dim // 8, dim // 4)
        self.norm = LayerNorm(dim // 4, eps=1e-6, dtype=dtype)
        self.conv2 = conv(dim // 4, dim // 8)

    def features(
        self, image_embedding: Float[Array, "g g c"], early: Float[Array, "g g e"]
    ) -> Float[Array, "4*g 4*g hq"]:
        """What an image's embedding and its early layer add to the mask's pixels."""
        return join_pixels(self.embedding_encoder(image_embedding) + self.compress_vit_feat(early))

    def mask(
        self,
        token: Float[Array, " c"],
        upscaled: Float[Array, "h w hq"],
        features: Float[Array, "h w hq"],
    ) -> Float[Array, "h w"]:
        """Mask logits, float32, from SAM-HQ's token and the upscaled embedding of the prompt."""
        x = self.conv2(gelu(self.norm(self.conv1(upscaled)))) + features
        return jnp.matmul(x, self.mlp(token), preferred_element_type=jnp.float32)


class Head(nnx.Module):
    """Linear layers with ReLU between them (reference `MLP`); no sigmoid, scores can pass 1."""

    def __init__(self, in_dim, hidden_dim, out_dim, num_layers, *, dtype, rngs):
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nnx.List(
            Linear(i, o, dtype=dtype, rngs=rngs) for i, o in itertools.pairwise(widths)
        )

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = relu(layer(x))
        return last(x)
