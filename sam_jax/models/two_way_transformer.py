"""The mask decoder's two-way transformer (paper, appendix A; reference `TwoWayTransformer`).

Written for one prompt of one image, without batch axes: `jax.vmap` adds them. Prompt tokens
("queries") attend to each other and to the image's positions ("keys"), and those to the tokens.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam_jax.config import SamConfig
from sam_jax.models.layers import MLP, LayerNorm, Linear, align, relu
from sam_jax.ops.attention import softmax

# Logits of one attention that are held together: 256 MB in float32. A prompt of 1,000 points has
# half as many; with 10,000 points all at once would be 9 GB.
_MAX_LOGITS = 2**26


class TwoWayTransformer(nnx.Module):
    """Updates prompt tokens and image positions by each other."""

    def __init__(self, config: SamConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        dim, decoder = config.prompt_embed_dim, config.mask_decoder
        self.layers = nnx.List(
            TwoWayAttentionBlock(config, skip_first_layer_pe=i == 0, dtype=dtype, rngs=rngs)
            for i in range(decoder.transformer_depth)
        )
        self.final_attn_token_to_image = Attention(
            dim, decoder.num_heads, decoder.attention_downsample_rate, dtype=dtype, rngs=rngs
        )
        self.norm_final_attn = LayerNorm(dim, eps=1e-5, dtype=dtype)

    def __call__(
        self,
        image_embedding: Float[Array, "n c"],
        image_pe: Float[Array, "n c"],
        tokens: Float[Array, "t c"],
        token_mask: Bool[Array, " t"],
        *,
        outputs: Sequence[int] | None = None,
        attention_similarity: Float[Array, "*heads_and_t n"] | None = None,
        target_embedding: Float[Array, "#t c"] | None = None,
        image_is_shared: bool = False,
        weights: list[Array] | None = None,
    ) -> tuple[Float[Array, "outputs c"], Float[Array, "n c"]]:
        """Returns the updated tokens and image embedding.

        Args:
            image_embedding: the image's n = h * w positions, dense prompt included.
            image_pe: their positional encoding.
            tokens: output tokens and prompt tokens.
            token_mask: False where a token is padding, which nothing attends to.
            outputs: which tokens are returned, None for all. The last attention is of them alone.
            attention_similarity: added to the blocks' token-to-image logits, whose shape is
                [heads, t, n] (PerSAM's target-guided attention).
            target_embedding: added to the tokens before each block (PerSAM's target-semantic
                prompting). What is added before the first block also becomes part of their
                positional encoding, as in the reference, which adds in place.
            image_is_shared: that several prompts are computed for this image embedding (by a vmap
                or a loop), so that what the first block makes of it alone is computed once.
            weights: a list to which each block appends how much its tokens attend to the image's
                positions, [heads, t, n].
        """
        if target_embedding is not None:
            target_embedding = target_embedding.astype(tokens.dtype)
            tokens = tokens + target_embedding
        queries, keys = tokens, image_embedding
        for i, layer in enumerate(self.layers):
            if target_embedding is not None and i > 0:
                queries = queries + target_embedding
            queries, keys = layer(
                queries,
                keys,
                tokens,
                image_pe,
                token_mask,
                attention_similarity=attention_similarity,
                keys_are_shared=image_is_shared and i == 0,
                weights=weights,
            )
        if outputs is not None:
            queries, tokens = (
                # Slices also where `jax.export` leaves the number open: indexing would gather.
                jnp.concatenate([jax.lax.slice_in_dim(x, i, i + 1) for i in outputs])
                for x in (queries, tokens)
            )
        attended = self.final_attn_token_to_image(queries + tokens, keys + image_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class TwoWayAttentionBlock(nnx.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens."""

    def __init__(self, config: SamConfig, *, skip_first_layer_pe: bool, dtype, rngs):
        dim, decoder = config.prompt_embed_dim, config.mask_decoder
        heads, rate = decoder.num_heads, decoder.attention_downsample_rate
        eps = decoder.layer_norm_eps
        self.self_attn = Attention(dim, heads, 1, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(dim, eps=eps, dtype=dtype)
        self.cross_attn_token_to_image = Attention(dim, heads, rate, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=eps, dtype=dtype)
        self.mlp = MLP(dim, decoder.mlp_dim, relu, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(dim, eps=eps, dtype=dtype)
        self.cross_attn_image_to_token = Attention(dim, heads, rate, dtype=dtype, rngs=rngs)
        self.norm4 = LayerNorm(dim, eps=eps, dtype=dtype)
        self.skip_first_layer_pe = skip_first_layer_pe

    def __call__(
        self,
        queries: Float[Array, "t c"],
        keys: Float[Array, "n c"],
        query_pe: Float[Array, "t c"],
        key_pe: Float[Array, "n c"],
        token_mask: Bool[Array, " t"],
        *,
        attention_similarity: Float[Array, "*heads_and_t n"] | None = None,
        keys_are_shared: bool = False,
        weights: list[Array] | None = None,
    ) -> tuple[Float[Array, "t c"], Float[Array, "n c"]]:
        # Padded tokens may attend, but are never attended to.
        padding_bias = jnp.where(token_mask, 0.0, -jnp.inf)
        if self.skip_first_layer_pe:  # the first layer: neither positions nor a residual
            queries = self.self_attn(queries, queries, queries, padding_bias)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, padding_bias)
        queries = self.norm1(queries)

        k = keys + key_pe
        regroup = not keys_are_shared
        to_image, q = self.cross_attn_token_to_image, queries + query_pe
        if weights is not None:
            weights.append(to_image.weights(q, k, attention_similarity))
        attended = to_image(q, k, keys, attention_similarity, regroup=regroup)
        queries = self.norm2(queries + attended)

        queries = self.norm3(queries + self.mlp(queries))

        q = queries + query_pe
        keys = keys + self.cross_attn_image_to_token(k, q, queries, padding_bias, regroup=regroup)
        return queries, self.norm4(keys)


class Attention(nnx.Module):
    """Multi-head attention whose inner width is that of its inputs over `downsample_rate`."""

    def __init__(self, dim: int, num_heads: int, downsample_rate: int, *, dtype, rngs):
        inner = dim // downsample_rate
        if inner % num_heads:
            raise ValueError(f"the inner width {inner} is not a multiple of num_heads {num_heads}")
        self.q_proj = Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(dim, inner, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(inner, dim, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def __call__(
        self,
        q: Float[Array, "q c"],
        k: Float[Array, "k c"],
        v: Float[Array, "k c"],
        bias: Float[Array, "*heads_and_q k"] | None = None,
        *,
        regroup: bool = True,
    ) -> Float[Array, "q c"]:
        """`bias` is added to the logits [heads, q, k] by the rules of broadcasting.

        Between a few tokens and thousands of positions, the positions' projections are most of the
        work. As matrix products are associative, they can be regrouped: the tokens' side is
        multiplied with those weights instead, for the same numbers with a fraction of the work.
        Without `regroup` the projections of what is given as positions are computed themselves,
        which is less work if they serve several prompts.
        """
        inner = self.q_proj.out_features
        if regroup and self._regroups(q.shape[0], k.shape[0]):
            return self._few_queries(q, k, v, bias)
        if self._regroups(k.shape[0], q.shape[0]):
            return self._few_keys(q, k, v, bias, regroup)
        q = self._heads_of_queries(q)
        k, v = self._heads_of_keys(self.k_proj, k), self._heads_of_keys(self.v_proj, v)

        def attend(q):
            return jnp.einsum("hqk,hdk->qhd", self._softmax(q, k, bias).astype(v.dtype), v)

        chunk_size = self._queries_chunk_size(q.shape[0], k.shape[-1])
        if chunk_size is None or (bias is not None and bias.ndim > 1):
            out = attend(q)
        else:
            out = jax.lax.map(lambda one: attend(one[None])[0], q, batch_size=chunk_size)
        return self.out_proj(out.reshape(out.shape[0], inner))

    def weights(
        self,
        q: Float[Array, "q c"],
        k: Float[Array, "k c"],
        bias: Float[Array, "*heads_and_q k"] | None = None,
    ) -> Float[Array, "heads q k"]:
        """How much each query attends to each key, float32."""
        return self._softmax(self._heads_of_queries(q), self._heads_of_keys(self.k_proj, k), bias)

    def _softmax(self, q, k, bias):
        logits = jnp.einsum("qhd,hdk->hqk", q, k, preferred_element_type=jnp.float32)
        return softmax(logits if bias is None else logits + align(bias, logits))

    def _heads_of_queries(self, q):
        return self._scaled(self.q_proj(q)).reshape(q.shape[0], self.num_heads, -1)

    def _heads_of_keys(self, linear, x):
        """Keys or values with positions last, as they are multiplied: nothing to transpose."""
        return self._transposed(linear, x).reshape(self.num_heads, -1, x.shape[0])

    def _queries_chunk_size(self, queries, keys):
        """How many queries' logits are held together; None for all, as but for thousands of points.

        `jax.export` may leave the number of tokens open, too.
        """
        if not (isinstance(queries, int) and isinstance(keys, int)):
            return None
        chunk_size = _MAX_LOGITS // (self.num_heads * keys)
        return None if queries <= chunk_size else max(chunk_size, 1)

    def _regroups(self, few, many):
        """Whether so few tokens and so many positions are worth it."""
        inner = self.q_proj.out_features
        # `jax.export` may leave the number of tokens open. A prompt's are few.
        few_enough = not isinstance(few, int) or few * self.num_heads <= inner
        return few_enough and isinstance(many, int) and inner < many

    def _few_queries(self, q, k, v, bias):
        q = self._rows_per_head(self._scaled(self.q_proj(q)))
        # The bias of k_proj would add the same to every key's logit, which softmax does not see.
        back = self._project_back(self.k_proj, q)
        logits = jnp.dot(back, k.astype(q.dtype).T, preferred_element_type=jnp.float32)
        logits = logits.reshape(-1, self.num_heads, k.shape[0])
        if bias is not None:
            bias = jnp.broadcast_to(bias, (self.num_heads, logits.shape[0], k.shape[0]))
            logits = logits + bias.transpose(1, 0, 2)
        weights = softmax(logits).astype(q.dtype).reshape(q.shape[0], k.shape[0])
        out = self.v_proj(weights @ v.astype(q.dtype)).reshape(-1, self.num_heads, q.shape[-1])
        return self.out_proj((out * self._own_channels()[None]).sum(1))

    def _few_keys(self, q, k, v, bias, regroup):
        k = self._rows_per_head(self._scaled(self.k_proj(k)))
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        if regroup:
            logits = dot(q.astype(k.dtype), self._project_back(self.q_proj, k).T)
            logits = logits + dot(k, self._bias(self.q_proj))[None]
        else:
            logits = dot(self.q_proj(q), k.T)
        logits = logits.reshape(q.shape[0], -1, self.num_heads)
        if bias is not None:
            bias = jnp.broadcast_to(bias, (self.num_heads, q.shape[0], logits.shape[1]))
            logits = logits + bias.transpose(1, 2, 0)
        weights = softmax(logits, 1).astype(k.dtype).reshape(q.shape[0], k.shape[0])
        v = self._rows_per_head(self.v_proj(v))
        out = weights @ (v @ self.out_proj.weight().astype(k.dtype))
        return out + self._bias(self.out_proj)[None]

    def _transposed(self, linear, x):
        """`linear(x).T`."""
        kernel, x = linear.weight().astype(linear.dtype), x.astype(linear.dtype)
        return jnp.einsum("ci,nc->in", kernel, x) + self._bias(linear)[:, None]

    def _scaled(self, x):
        return x * (x.shape[-1] // self.num_heads) ** -0.5

    def _own_channels(self):
        """[heads, inner]: 1 where a channel belongs to the head."""
        inner = self.q_proj.out_features
        channels = jnp.repeat(jnp.arange(self.num_heads), inner // self.num_heads)
        return (jnp.arange(self.num_heads)[:, None] == channels[None]).astype(self.q_proj.dtype)

    def _rows_per_head(self, x):
        """[n, inner] -> [n * heads, inner]: a row for each head, zero in the others' channels."""
        return (x[:, None] * self._own_channels()[None]).reshape(-1, x.shape[-1])

    def _project_back(self, linear, x):
        """`x @ W.T`: then `_project_back(linear, x) @ y.T` is `x @ linear(y).T` less its bias."""
        return x @ linear.weight().astype(x.dtype).T

    def _bias(self, linear):
        return linear.bias[...].astype(linear.dtype)
