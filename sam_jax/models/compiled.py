"""The model's functions, compiled: pure functions of `nnx.split(model)` and arrays.

They are module-level, so that all models of one kind and size share the compiled programs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree


@jax.jit
def encode_image(
    graphdef: nnx.GraphDef, params: PyTree, pixel_values: Float[Array, "b h w rgb"]
) -> Float[Array, "b g g c"]:
    """`Sam.encode_image` of `nnx.merge(graphdef, params)`, compiled."""
    return nnx.merge(graphdef, params).encode_image(pixel_values)


@jax.jit
def encode_prompts(
    graphdef: nnx.GraphDef,
    params: PyTree,
    points: Float[Array, "b p n 2"] | None,
    labels: Int[Array, "b p n"] | None,
    masks: Float[Array, "b m side side"] | None,
) -> tuple[Float[Array, "b p n c"] | None, Float[Array, "_ c g g"]]:
    """The prompt encoder of `nnx.merge(graphdef, params)` over all prompts, compiled.

    Takes what `join_prompts` gives. The sparse embeddings are None without points; the dense ones
    are channels first, one for each mask [b * m, c, g, g], or without masks [1, c, g, g].
    """
    encoder = nnx.merge(graphdef, params).prompt_encoder
    sparse = None
    if points is not None:
        sparse, _ = jax.vmap(jax.vmap(encoder))(points, labels)
    if masks is None:
        dense = encoder.embed_mask(None)[:, None, None]
        return sparse, jnp.broadcast_to(dense, (1, len(dense), encoder.grid, encoder.grid))
    dense = jax.vmap(encoder.embed_mask)(masks.reshape(-1, *masks.shape[2:]))
    return sparse, jnp.moveaxis(dense, -1, 1)


@jax.jit
def encode_positions(graphdef: nnx.GraphDef, params: PyTree) -> Float[Array, "1 c g g"]:
    """The positional encoding of the image embedding's grid, channels first, compiled."""
    positions = nnx.merge(graphdef, params).prompt_encoder.get_dense_pe()
    return jnp.moveaxis(positions, -1, 0)[None]


@functools.partial(
    jax.jit, static_argnames=("multimask_output", "hq_token_only", "prompts_chunk_size")
)
def decode(
    graphdef: nnx.GraphDef,
    params: PyTree,
    image_embeddings: Float[Array, "b g g c"],
    points: Float[Array, "b p n 2"],
    labels: Int[Array, "b p n"],
    masks: Float[Array, "b #p 4*g 4*g"] | None,
    attention_similarity: Float[Array, "b p #heads #t g*g"] | None = None,
    target_embedding: Float[Array, "b p #t c"] | None = None,
    *,
    multimask_output: bool,
    hq_token_only: bool = False,
    prompts_chunk_size: int | None = None,
) -> tuple[Float[Array, "b p m 4*g 4*g"], Float[Array, "b p m"]]:
    """`Sam.decode` of `nnx.merge(graphdef, params)`, compiled."""
    return nnx.merge(graphdef, params).decode(
        image_embeddings,
        points,
        labels,
        masks=masks,
        multimask_output=multimask_output,
        attention_similarity=attention_similarity,
        target_embedding=target_embedding,
        hq_token_only=hq_token_only,
        prompts_chunk_size=prompts_chunk_size,
    )


def chunk_size_for(image_embeddings: Float[Array, "b g g c"], prompts: int) -> int | None:
    """`prompts_chunk_size` of `decode` for the embeddings' device: no other platform is traced."""
    if isinstance(image_embeddings, Tracer):
        return None
    (device, *_) = image_embeddings.devices()
    return fastest_chunk_size(device.platform, len(image_embeddings), prompts)


def fastest_chunk_size(platform: str, images: Any, prompts: Any) -> int | None:
    """How many prompts of each image `Sam.decode` computes together on a platform; None for all.

    On a CPU it is one, which fits its cache. Elsewhere it is 64 prompts of all images (0.4 GB in
    bfloat16 on an NVIDIA GPU), but at least two of each, and all if `jax.export` leaves their
    number open.
    """
    if platform == "cpu":
        return 1
    if not isinstance(images, int) or not isinstance(prompts, int):
        return None
    return max(2, 64 // max(images, 1))
