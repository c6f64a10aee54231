"""The device programs of automatic mask generation: from points to masks and their statistics."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from sam_jax.models.mask_decoder import output_slice
from sam_jax.models.sam import Sam
from sam_jax.ops.mask_statistics import MaskStatistics, MaskUpsampler, mask_statistics
from sam_jax.ops.prompts import join_prompts, pad_axis


class ChunkSizes(NamedTuple):
    """How many of each are computed together."""

    points: int  # through the transformer
    upscaled: int  # through the upscaling
    measured: int  # masks at full size
    tile: int  # side in pixels of the tiles that masks are measured in


class Frame(NamedTuple):
    """How masks are resized to full size and measured; arrays."""

    full: MaskUpsampler
    limits: Float[Any, "3"]  # predicted IoU, mask threshold, stability score offset


class Points(NamedTuple):
    """A batch of points; arrays."""

    coords: Float[Any, "n 2"]  # in pixels of the model's input
    mask_index: Int[Any, " n"]  # which of a point's masks to decode
    real: Int[Any, ""]  # how many are not padding


class Measured(NamedTuple):
    """For every mask of every point; undefined for masks whose predicted IoU is too low."""

    iou: Float[Array, "n m"]
    statistics: MaskStatistics


def chunk_sizes(points_per_batch: int, platform: str) -> ChunkSizes:
    """The chunk sizes for a platform."""
    if platform == "cpu":
        # Two points fit in a CPU's cache (docs/design/everything-mode.md).
        return ChunkSizes(2, 1, 1, 64)
    return ChunkSizes(points_per_batch, -(-points_per_batch // 4), 3, 256)


def size_to_pad_to(size: int) -> int:
    """4096, or the next power of two."""
    return max(4096, 1 << (size - 1).bit_length())


def _per_image(function: Callable) -> Callable:
    """Compiles `function(model, *arrays, chunks)` for one image on each device of a mesh.

    The arrays of the compiled function have a leading axis of devices.
    """

    @functools.partial(jax.jit, static_argnames=("mesh", "chunks"))
    def compiled(graphdef, params, *arrays, mesh, **static):
        def one_image(params, *arrays):
            arrays = jax.tree.map(lambda x: x[0], arrays)
            result = function(nnx.merge(graphdef, params), *arrays, **static)
            return jax.tree.map(lambda x: x[None], result)

        images = PartitionSpec(mesh.axis_names)
        in_specs = (PartitionSpec(), *[images] * len(arrays))
        # The check rejects loops whose trip counts differ between devices.
        return jax.shard_map(
            one_image, mesh=mesh, in_specs=in_specs, out_specs=images, check_vma=False
        )(params, *arrays)

    return compiled


@_per_image
def encode(model: Sam, pixel_values: Float[Array, "h w rgb"]) -> Float[Array, "g g c"]:
    """The image embedding."""
    return model.encode_image(pixel_values[None])[0]


@_per_image
def measure(
    model: Sam,
    image_embedding: Float[Array, "g g c"],
    frame: Frame,
    points: Points,
    *,
    chunks: ChunkSizes,
) -> Measured:
    """Predicted IoUs and statistics of the points' masks."""
    decoder = model.mask_decoder
    outputs = output_slice(multimask_output=True)
    embedding, hq_features = decoder.image_features(image_embedding)
    iou_limit, threshold, offset = frame.limits

    def measure(mask):
        return mask_statistics(mask, frame.full, threshold, offset)

    def masks_of_point(mask_tokens, keys, wanted):
        masks = decoder.predict_masks(mask_tokens, keys, outputs, hq_features)
        return _for_each_wanted(measure, wanted, (masks,), chunks.measured)

    def some_points(real, coords):
        iou_token, mask_tokens, keys = run_transformer(model, embedding, coords, outputs)
        iou = jax.vmap(decoder.predict_iou)(iou_token)[:, outputs]
        wanted = real[:, None] & ((iou > iou_limit) | (iou_limit <= 0))
        statistics = _for_each_wanted(
            masks_of_point, wanted.any(1), (mask_tokens, keys, wanted), chunks.upscaled
        )
        return Measured(iou, statistics)

    return _for_some_at_a_time(some_points, (points.coords,), points.real, chunks.points)


@_per_image
def decode(
    model: Sam,
    image_embedding: Float[Array, "g g c"],
    points: Points,
    *,
    chunks: ChunkSizes,
) -> Float[Array, "n side side"]:
    """The logits of one mask per point."""
    decoder = model.mask_decoder
    outputs = output_slice(multimask_output=True)
    embedding, hq_features = decoder.image_features(image_embedding)

    def mask_of_point(mask_tokens, keys, mask_index):
        return decoder.predict_masks(mask_tokens, keys, outputs, hq_features)[mask_index]

    def some_points(real, coords, mask_index):
        _, mask_tokens, keys = run_transformer(model, embedding, coords, outputs)
        arrays = mask_tokens, keys, mask_index
        return _for_each_wanted(mask_of_point, real, arrays, chunks.upscaled)

    arrays = points.coords, points.mask_index
    return _for_some_at_a_time(some_points, arrays, points.real, chunks.points)


def run_transformer(
    model: Sam,
    image_embedding: Float[Array, "g g c"],
    coords: Float[Array, "n 2"],
    outputs: slice,
):
    """Runs the two-way transformer on n prompts of one foreground point each."""
    image_pe = model.prompt_encoder.get_dense_pe()
    no_mask = model.prompt_encoder.embed_mask(None)

    def one_prompt(points, labels):
        sparse, sparse_mask = model.prompt_encoder(points, labels)
        return model.mask_decoder.run_transformer(
            image_embedding,
            image_pe,
            sparse,
            sparse_mask,
            no_mask,
            outputs,
            image_is_shared=True,
        )

    return jax.vmap(one_prompt)(*join_prompts(coords[:, None], None, None))


def _for_some_at_a_time(
    function: Callable, arrays: Sequence[Array], count: Int[Array, ""], size: int
) -> PyTree:
    """Maps `function(real, *arrays)` over the first `count` entries, `size` at a time."""
    total = len(arrays[0])
    padded = -(-total // size) * size
    arrays = [pad_axis(x, padded, 0, 0) for x in arrays]

    def call(start):
        some = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in arrays)
        return function(start + jnp.arange(size) < count, *some)

    def step(i, results):
        start = i * size
        return jax.tree.map(
            lambda all, some: jax.lax.dynamic_update_slice_in_dim(all, some, start, 0),
            results,
            call(start),
        )

    some = jax.eval_shape(call, 0)
    results = jax.tree.map(lambda s: jnp.zeros((padded, *s.shape[1:]), s.dtype), some)
    results = jax.lax.fori_loop(0, -(-count // size), step, results)
    return jax.tree.map(lambda x: x[:total], results)


def _for_each_wanted(
    function: Callable, wanted: Bool[Array, " n"], arrays: Sequence[Array], size: int
) -> PyTree:
    """Maps `function` over the wanted entries of the arrays, `size` at a time.

    Other entries of the result are undefined.
    """
    n = len(wanted)
    order = jnp.argsort(~wanted, stable=True)
    one = jax.eval_shape(function, *(x[0] for x in arrays))
    results = jax.tree.map(lambda s: jnp.zeros((n, *s.shape), s.dtype), one)

    def step(k, results):
        if size == 1:
            index = order[k]
            entry = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in arrays)
            found = function(*entry)
        else:
            # Past the end, the last entry is read again and nothing is written.
            index = jnp.where(k * size + jnp.arange(size) < n, 0, n)
            index += jax.lax.dynamic_slice_in_dim(jnp.pad(order, (0, size)), k * size, size)
            found = jax.vmap(function)(*(x[index] for x in arrays))
        return jax.tree.map(lambda all, some: all.at[index].set(some, mode="drop"), results, found)

    return jax.lax.fori_loop(0, -(-wanted.sum() // size), step, results)
