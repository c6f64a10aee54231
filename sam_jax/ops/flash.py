"""Flash attention with decomposed relative positions, a Pallas kernel for NVIDIA GPUs.

The algorithm is FlashAttention-2 (Dao, 2023): logits are computed a block at a time, recomputed in
the backward pass, and never written to memory. Here a block of keys is one row of the grid, so that
a block's position terms are one number per query (for the row) plus one row of numbers per query
(for the columns). The gradients of both are computed with the queries'.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# Queries per kernel instance, and its number of warps.
_FORWARD, _BACKWARD = (128, 8), (64, 4)


def flash_attention(
    q: Float[Array, "b heads n d"],
    k: Float[Array, "b heads n d"],
    v: Float[Array, "b heads n d"],
    rel_h: Float[Array, "b heads n h"],
    rel_w: Float[Array, "b heads n w"],
    interpret: bool = False,
) -> Float[Array, "b heads n d"]:
    """Softmax attention over the h x w = n positions of a grid.

    The logits of a query and the key at row i and column j are `q . k + rel_h[i] + rel_w[j]`.
    Logits and sums over keys are float32; the weights, and in the backward pass the derivatives of
    the logits, are rounded to the inputs' dtype. If images or heads are sharded over devices, each
    device computes its own. `flash_unsupported_reason` says which shapes are supported.

    Args:
        q: queries, scaled, in row-major order of the grid.
        k: keys.
        v: values.
        rel_h: position terms of a query's logits, by the key's row.
        rel_w: position terms of a query's logits, by the key's column.
        interpret: run the kernels step by step on any device, for tests.
    """
    n, d = q.shape[2:]
    h, w = rel_h.shape[-1], rel_w.shape[-1]
    # Triton's blocks are powers of two, so a row of keys is padded. Padding columns have logits of
    # -inf, and therefore no weight.
    columns, queries, channels = _columns(w), -n % _FORWARD[0], -d % 16
    k, v = (_pad(x, 0, channels).reshape(*x.shape[:2], h, w, -1) for x in (k, v))
    k, v = (_pad(x, columns - w, 0).reshape(*x.shape[:2], h * columns, -1) for x in (k, v))
    q, rel_h = _pad(q, queries, channels), _pad(rel_h, queries, 0)
    rel_w = _pad(_pad(rel_w, 0, columns - w, -jnp.inf), queries, 0)
    # The decorator loses the type.
    out = cast(Array, _flash_attention(q, k, v, rel_h, rel_w, interpret))
    return out[:, :, :n, :d]


def flash_unsupported_reason(grid: tuple[int, int], d: int) -> str | None:
    """Why a grid (h, w) with heads of d channels is not supported; None if it is."""
    if _columns(grid[1]) * (d + -d % 16) > 64 * 128:  # a row must fit in shared memory
        return f"a row of a grid of {grid[0]} x {grid[1]} is too large with heads {d} wide"
    return None


def _columns(w: int) -> int:
    """The padded length of a row of keys, a power of two."""
    return max(16, 1 << (w - 1).bit_length())


def _pad(x, rows, columns, value: float = 0):
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, rows), (0, columns)), constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash_attention(q, k, v, rel_h, rel_w, interpret) -> Array:
    return _forward(interpret)(q, k, v, rel_h, rel_w)[0]


def _vjp_forward(q, k, v, rel_h, rel_w, interpret):
    out, lse = _forward(interpret)(q, k, v, rel_h, rel_w)
    return out, (q, k, v, rel_h, rel_w, out, lse)


def _vjp_backward(interpret, residuals, d_out):
    *inputs, out, lse = residuals
    # The term of the softmax's normalization in each logit's derivative: the paper's D.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    return _backward(interpret)(*inputs, d_out, lse, delta)


_flash_attention.defvjp(_vjp_forward, _vjp_backward)


def _each_head(kernels):
    """Makes a function of arrays [b, heads, ...] vmappable, and shardable along these two axes.

    JAX does not shard kernels by itself: each device would compute all images.
    """
    sharded = custom_partitioning(kernels)

    def place(mesh, shapes, like):
        first_two = PartitionSpec(*(*like.sharding.spec, None, None)[:2])
        return jax.tree.map(lambda _: NamedSharding(mesh, first_two), shapes)

    def partition(mesh, arguments, results):
        places = (place(mesh, shapes, arguments[0]) for shapes in (results, arguments))
        return mesh, kernels, *places

    def rule(mesh, arguments, results):
        names = [
            " ".join(["b", "heads", *(f"x{i}_{axis}" for axis in range(2, len(x.shape)))])
            for i, x in enumerate((*arguments, *results))
        ]
        return f"{', '.join(names[: len(arguments)])} -> {', '.join(names[len(arguments) :])}"

    sharded.def_partition(partition, sharding_rule=rule)

    @jax.custom_batching.custom_vmap
    def mapped(*arrays):
        return sharded(*arrays)

    @mapped.def_vmap
    def _(size, is_batched, *arrays):
        def merge(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = mapped(*map(merge, arrays, is_batched))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return mapped


@functools.cache
def _forward(interpret):
    """The kernel of (q, k, v, rel_h, rel_w); returns the output and each query's log-sum-exp."""

    def kernels(*arrays):
        q, (block, warps) = arrays[0], _FORWARD
        lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
        return pl.pallas_call(
            functools.partial(_forward_kernel, parts=_parts(q.shape[-1])),
            grid=_grid(q, block),
            in_specs=_specs(arrays, block, whole=(1, 2)),
            out_specs=_specs((q, lse), block),
            out_shape=[q, lse],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpret,
            name="flash_attention",
        )(*arrays)

    return _each_head(kernels)


@functools.cache
def _backward(interpret):
    """The kernel of (q, k, v, rel_h, rel_w, d_out, lse, delta); returns the first 5 gradients."""

    def kernels(*arrays):
        q, k, v, rel_h, rel_w, *_ = arrays
        (block, warps), w, parts = _BACKWARD, rel_w.shape[-1], _parts(q.shape[-1])
        call = functools.partial(
            pl.pallas_call,
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpret,
        )
        d_q, d_rel_h, d_rel_w = call(
            functools.partial(_backward_queries_kernel, parts=parts),
            grid=_grid(q, block),
            in_specs=_specs(arrays, block, whole=(1, 2)),
            out_specs=_specs((q, rel_h, rel_w), block),
            out_shape=[q, rel_h, rel_w],
            name="flash_attention_backward_queries",
        )(*arrays)
        d_k, d_v = call(
            functools.partial(_backward_keys_kernel, parts=parts, block=block),
            grid=_grid(k, w),
            in_specs=_specs(arrays, w, whole=(0, 3, 4, 5, 6, 7)),
            out_specs=_specs((k, v), w),
            out_shape=[k, v],
            name="flash_attention_backward_keys",
        )(*arrays)
        return d_q, d_k, d_v, d_rel_h, d_rel_w

    return _each_head(kernels)


def _grid(x, block):
    b, heads, n, _ = x.shape
    return n // block, heads, b


def _specs(arrays, block, whole=()):
    """Block specs: for each array of a head, a block of positions, or the whole array."""

    def spec(x, whole):
        rest, size = x.shape[3:], x.shape[2] if whole else block
        return pl.BlockSpec(
            (None, None, size, *rest),
            lambda i, head, b: (b, head, 0 if whole else i, *(0 for _ in rest)),
        )

    return [spec(x, i in whole) for i, x in enumerate(arrays)]


def _forward_kernel(q_ref, k_ref, v_ref, rel_h_ref, rel_w_ref, out_ref, lse_ref, *, parts):
    q = _load(q_ref, parts)
    rel_w = plgpu.load(rel_w_ref)

    def row(i, carry):
        out, top, total = carry
        keys = pl.ds(i * rel_w.shape[1], rel_w.shape[1])
        logits = _logits(q, _load(k_ref, parts, keys), plgpu.load(rel_h_ref.at[:, i]), rel_w)
        new_top = jnp.maximum(top, logits.max(-1))
        weights, shrink = jnp.exp(logits - new_top[:, None]), jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        values = _load(v_ref, parts, keys)
        out = tuple(
            old * shrink[:, None] + plgpu.dot(weights.astype(value.dtype), value)
            for old, value in zip(out, values, strict=True)
        )
        return out, new_top, total

    queries = q_ref.shape[0]
    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in q)
    start = nothing, jnp.full(queries, -jnp.inf, jnp.float32), jnp.zeros(queries, jnp.float32)
    out, top, total = jax.lax.fori_loop(0, rel_h_ref.shape[1], row, start)
    _store(out_ref, parts, tuple(x / total[:, None] for x in out))
    plgpu.store(lse_ref, top + jnp.log(total))


def _backward_queries_kernel(
    q_ref, k_ref, v_ref, rel_h_ref, rel_w_ref, d_out_ref, lse_ref, delta_ref, *outputs, parts
):
    d_q_ref, d_rel_h_ref, d_rel_w_ref = outputs
    q, d_out = _load(q_ref, parts), _load(d_out_ref, parts)
    rel_w, lse, delta = plgpu.load(rel_w_ref), plgpu.load(lse_ref), plgpu.load(delta_ref)

    def row(i, carry):
        d_q, d_rel_w = carry
        keys = pl.ds(i * rel_w.shape[1], rel_w.shape[1])
        k = _load(k_ref, parts, keys)
        logits = _logits(q, k, plgpu.load(rel_h_ref.at[:, i]), rel_w)
        _, d_logits = _derivatives(logits, _load(v_ref, parts, keys), d_out, lse, delta)
        plgpu.store(d_rel_h_ref.at[:, i], d_logits.sum(-1).astype(d_rel_h_ref.dtype))
        low = d_logits.astype(q_ref.dtype)
        d_q = tuple(old + plgpu.dot(low, x) for old, x in zip(d_q, k, strict=True))
        return d_q, d_rel_w + d_logits

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in q)
    start = nothing, jnp.zeros(rel_w.shape, jnp.float32)
    d_q, d_rel_w = jax.lax.fori_loop(0, rel_h_ref.shape[1], row, start)
    _store(d_q_ref, parts, d_q)
    plgpu.store(d_rel_w_ref, d_rel_w.astype(d_rel_w_ref.dtype))


def _backward_keys_kernel(
    q_ref, k_ref, v_ref, rel_h_ref, rel_w_ref, d_out_ref, lse_ref, delta_ref, *outputs, parts, block
):
    d_k_ref, d_v_ref = outputs
    i = pl.program_id(0)  # the keys' row
    k, v = _load(k_ref, parts), _load(v_ref, parts)

    def some_queries(j, carry):
        d_k, d_v = carry
        queries = pl.ds(j * block, block)
        q, d_out = _load(q_ref, parts, queries), _load(d_out_ref, parts, queries)
        rel_h, rel_w = plgpu.load(rel_h_ref.at[queries, i]), plgpu.load(rel_w_ref.at[queries, :])
        lse, delta = plgpu.load(lse_ref.at[queries]), plgpu.load(delta_ref.at[queries])
        weights, d_logits = _derivatives(_logits(q, k, rel_h, rel_w), v, d_out, lse, delta)
        weights, d_logits = (x.astype(q_ref.dtype).T for x in (weights, d_logits))
        d_v = tuple(old + plgpu.dot(weights, x) for old, x in zip(d_v, d_out, strict=True))
        d_k = tuple(old + plgpu.dot(d_logits, x) for old, x in zip(d_k, q, strict=True))
        return d_k, d_v

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in k)
    steps = q_ref.shape[0] // block
    d_k, d_v = jax.lax.fori_loop(0, steps, some_queries, (nothing, nothing))
    _store(d_k_ref, parts, d_k)
    _store(d_v_ref, parts, d_v)


def _logits(q, k, rel_h, rel_w):
    """Logits [queries, keys of a row], from parts of queries and keys and the position terms."""
    positions = rel_h.astype(jnp.float32)[:, None] + rel_w.astype(jnp.float32)
    return sum((plgpu.dot(a, b.T) for a, b in zip(q, k, strict=True)), positions)


def _derivatives(logits, v, d_out, lse, delta):
    """The weights of a block and the derivatives of its logits."""
    weights = jnp.exp(logits - lse[:, None])
    d_weights = sum(plgpu.dot(a, b.T) for a, b in zip(d_out, v, strict=True))
    return weights, weights * (d_weights - delta[:, None])


def _parts(d: int) -> list[slice | pl.Slice]:
    """Slices of d in powers of two, the only sizes of Triton's blocks."""
    sizes = [1 << bit for bit in reversed(range(d.bit_length())) if d >> bit & 1]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [pl.ds(start, size) for start, size in zip(starts, sizes, strict=True)]


def _load(ref, parts, rows: slice | pl.Slice = slice(None)):
    return tuple(plgpu.load(ref.at[rows, part]) for part in parts)


def _store(ref, parts, values):
    for part, value in zip(parts, values, strict=True):
        plgpu.store(ref.at[:, part], value.astype(ref.dtype))
