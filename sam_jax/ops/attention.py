"""Attention with decomposed relative positions: one definition, several ways to compute it.

The logits of query (i, j) and key (k, l) of an h x w grid are

    scale * q[i, j] . k[k, l]  +  q[i, j] . rel_pos_h[i - k]  +  q[i, j] . rel_pos_w[j - l]

with the *unscaled* query in both position terms (Meta's `add_decomposed_rel_pos`).
"""

import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sam_jax.ops.barrier import narrow
from sam_jax.ops.operation import operation
from sam_jax.ops.resize import linear_resize_matrix

Implementation = Literal["portable", "xla", "folded", "chunked", "cudnn", "pallas"]
"""How attention is computed; "portable" chooses by platform. See the design notes on attention."""

# Rows of logits in one step of the chunked implementation: 512 x 4096 in float32 is 8 MB, which
# fits in a CPU's cache.
_QUERY_BLOCK = 512


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@operation("sam.softmax")
def softmax(logits: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
    """`jax.nn.softmax` with a derivative that keeps float32's precision.

    The derivative's entries sum to zero. In float32 this holds only up to rounding errors, which
    the gradient of queries multiplies by the mean of all keys: with hundreds of keys, gradients by
    `jax.nn.softmax` have errors of up to 1e-4. Subtracting the mean twice removes them.
    """
    return jax.nn.softmax(logits, axis=axis)


@softmax.defjvp
def _softmax_jvp(axis, primals, tangents):
    weights, tangent = softmax(*primals, axis), tangents[0]
    for _ in range(2):
        tangent = tangent - (weights * tangent).sum(axis, keepdims=True)
    return weights, weights * tangent


def relative_positions(
    table: Float[Array, "length d"], size: int
) -> Float[Array, "{size} {size} d"]:
    """Position embeddings by query and key row: `out[i, k] = table[i - k + size - 1]`.

    A table made for another grid (length != 2 * size - 1) is resized linearly first, as in Meta's
    `get_rel_pos`.
    """
    length = 2 * size - 1
    if table.shape[0] != length:
        matrix = linear_resize_matrix(table.shape[0], length)
        table = jnp.asarray(matrix, table.dtype) @ table
    offsets = jnp.arange(size)[:, None] - jnp.arange(size)[None, :] + size - 1
    return table[offsets]


def rel_pos_attention(
    q: Float[Array, "b heads n d"],
    k: Float[Array, "b heads n d"],
    v: Float[Array, "b heads n d"],
    rel_pos: tuple[Float[Array, "lh d"], Float[Array, "lw d"]] | None,
    grid: tuple[int, int],
    implementation: Implementation = "portable",
) -> Float[Array, "b heads n d"]:
    """Softmax attention over the h x w = n positions of `grid`, with relative positions.

    Args:
        q: queries, unscaled, in row-major order of the grid.
        k: keys.
        v: values.
        rel_pos: tables for rows and columns (`rel_pos_h`, `rel_pos_w`), or None for none.
        grid: (h, w).
        implementation:
            * "portable" is "folded" for windows and "chunked" for large grids;
            * "folded" puts the positions into wider queries and keys (`fold_positions`);
            * "chunked" materializes the logits of one block of queries at a time, on a CPU of one
              head and elsewhere of all heads of an image, which takes less memory;
            * "xla" materializes all logits and adds the position terms to them;
            * "cudnn" is the flash attention of NVIDIA's library, folded, which materializes no
              logits. It needs bfloat16 or float16, and `jax.export` does not take it;
            * "pallas" is a flash kernel of sam_jax (`sam_jax.ops.flash`), likewise.

            "cudnn" and "pallas" have never run on a GPU, so they run only if you name them.

    "cudnn" and "pallas" only have first derivatives, in reverse mode (`jax.grad`); the others have
    all derivatives.

    Logits and softmax are float32 whatever the inputs' dtype ("folded", "cudnn" and "pallas" round
    the position terms to the inputs' dtype); the result has the inputs' dtype.

    Raises:
        ValueError: if the implementation is unknown or does not support the inputs.
    """
    check_implementation(implementation)
    return _IMPLEMENTATIONS[implementation](q, k, v, _tables(rel_pos, grid), grid)


def attention_weights(
    q: Float[Array, "b heads n d"],
    k: Float[Array, "b heads n d"],
    rel_pos: tuple[Float[Array, "lh d"], Float[Array, "lw d"]] | None,
    grid: tuple[int, int],
) -> Float[Array, "b heads n n"]:
    """The weights of `rel_pos_attention`, float32: for each query, the weight of each key."""
    return softmax(_logits(q, k, _tables(rel_pos, grid), grid))


def check_implementation(name: str) -> None:
    """Raises ValueError unless `name` is an implementation."""
    if name not in _IMPLEMENTATIONS:
        known = get_args(Implementation)
        raise ValueError(f"unknown attention implementation {name!r}; known: {list(known)}")


def _tables(rel_pos, grid):
    if rel_pos is None:
        return None
    return tuple(relative_positions(*pair) for pair in zip(rel_pos, grid, strict=True))


def _portable(q, k, v, tables, grid):
    # XLA fuses a softmax into one kernel, but not the sum before it that "xla" has
    # (benchmarks/compiled.py).
    function = _chunked if grid[0] * grid[1] > _QUERY_BLOCK else _folded
    return function(q, k, v, tables, grid)


@functools.partial(jax.jit, static_argnames=("grid", "cpu", "default"))
def _by_platform(*arrays, grid, **functions):
    """Compiled, so that the arrays' platform decides instead of JAX's default."""
    functions = {name: functools.partial(f, grid=grid) for name, f in functions.items()}
    return jax.lax.platform_dependent(*arrays, **functions)


def _xla(q, k, v, tables, grid):
    weights = softmax(_logits(q, k, tables, grid)).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v)


def _logits(q, k, tables, grid):
    h, w = grid
    b, heads, n, d = q.shape
    logits = jnp.einsum("bnqd,bnkd->bnqk", q * d**-0.5, k, preferred_element_type=jnp.float32)
    if tables is None:
        return logits
    rel_h, rel_w = position_terms(q, tables)
    logits = logits.reshape(b, heads, n, h, w) + rel_h[..., :, None] + rel_w[..., None, :]
    return logits.reshape(b, heads, n, n)


def _folded(q, k, v, tables, grid):
    q, k = map(narrow, fold_positions(q, k, tables))
    return _average(jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32), v)


def _chunked(q, k, v, tables, grid):
    return _by_platform(q, k, v, tables, grid=grid, cpu=_one_head_at_a_time, default=_all_heads)


def _one_head_at_a_time(q, k, v, tables, grid):
    return _in_chunks(q, k, v, tables, grid, None)


def _all_heads(q, k, v, tables, grid):
    return _in_chunks(q, k, v, tables, grid, q.shape[1])


def _in_chunks(q, k, v, tables, grid, heads_chunk_size):
    h, w = grid
    b, heads, n, d = q.shape
    rows = _rows_per_block(h, w)

    # Recomputed in the backward pass; otherwise the scan would keep every block's logits. Keys and
    # values are transposed, since gradients of [n, d] would be products with the transposed logits,
    # whose copies would take a third of the backward pass on a CPU.
    @jax.checkpoint
    def block(q, k_t, v_t, table_h):  # q: [rows * w, d]; k_t, v_t: [d, n]; table_h: [rows, h, d]
        logits = jnp.dot(q * d**-0.5, k_t, preferred_element_type=jnp.float32)
        if tables is not None:
            rel_h, rel_w = position_terms(q, (table_h, tables[1]))
            logits = logits.reshape(-1, h, w) + rel_h[..., :, None] + rel_w[..., None, :]
        return _average(logits.reshape(-1, n), v_t.T)

    def one_head(qkv):
        q, k_t, v_t = qkv[0], qkv[1].T, qkv[2].T
        blocks = q.reshape(h // rows, rows * w, d)
        table_h = None if tables is None else tables[0].reshape(h // rows, rows, h, d)
        out = jax.lax.map(lambda x: block(x[0], k_t, v_t, x[1]), (blocks, table_h))
        return out.reshape(n, d)

    flat = jax.tree.map(lambda x: x.reshape(b * heads, n, d), (q, k, v))
    return jax.lax.map(one_head, flat, batch_size=heads_chunk_size).reshape(b, heads, n, d)


@jax.custom_jvp
@operation("sam.average")
def _average(
    logits: Float[Array, "*batch q k"], v: Float[Array, "*batch k d"]
) -> Float[Array, "*batch q d"]:
    """The values averaged with softmax weights, in the values' dtype."""
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = narrow(weights.astype(v.dtype))
    # Dividing the d columns of the result is cheaper than the k columns of the weights.
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    return (out / weights.astype(jnp.float32).sum(-1, keepdims=True)).astype(v.dtype)


@_average.defjvp
def _average_jvp(primals, tangents):
    def with_weights(logits, v):
        return jnp.matmul(softmax(logits).astype(v.dtype), v)

    return jax.jvp(with_weights, primals, tangents)  # uses softmax's own derivative


def position_terms(
    q: Float[Array, "*batch hw d"], tables: tuple[Float[Array, "h kh d"], Float[Array, "w kw d"]]
) -> tuple[Float[Array, "*batch hw kh"], Float[Array, "*batch hw kw"]]:
    """The relative position terms of each query's logits, by the keys' rows and columns."""
    (h, w), (*batch, n, d) = (len(table) for table in tables), q.shape
    # The axes shared with the tables come first; elsewhere they are slow on a CPU.
    grid = q.reshape(math.prod(batch), h, w, d).transpose(1, 2, 0, 3)
    rel_h = jnp.einsum("hwnd,hkd->hwnk", grid, tables[0], preferred_element_type=jnp.float32)
    grid = grid.swapaxes(0, 1)
    rel_w = jnp.einsum("whnd,wkd->whnk", grid, tables[1], preferred_element_type=jnp.float32)
    return (
        rel_h.transpose(2, 0, 1, 3).reshape(*batch, n, tables[0].shape[1]),
        rel_w.transpose(2, 1, 0, 3).reshape(*batch, n, tables[1].shape[1]),
    )


def fold_positions(
    q: Float[Array, "b heads n d"],
    k: Float[Array, "b heads n d"],
    tables: tuple[Float[Array, "h h d"], Float[Array, "w w d"]] | None,
) -> tuple[Float[Array, "b heads n _"], Float[Array, "b heads n _"]]:
    """Folds scale and relative positions into the head dimension of queries and keys.

    A query's h + w position terms are additional channels, of which a key's additional channels
    select those of its row and column:

        [scale * q, rel_h, rel_w] . [k, onehot(row), onehot(column)]

    These products are the logits, so attention needs no bias, and neither does its gradient. This
    is exact in float32; in lower precision, position terms are rounded like the queries. Without
    tables there are no position terms.
    """
    scaled = q * q.shape[-1] ** -0.5
    if tables is None:
        return scaled, k
    h, w = (len(table) for table in tables)
    terms = [term.astype(q.dtype) for term in position_terms(q, tables)]
    rows = jnp.repeat(jnp.eye(h, dtype=k.dtype), w, axis=0)
    columns = jnp.tile(jnp.eye(w, dtype=k.dtype), (h, 1))
    picks = jnp.concatenate([rows, columns], -1)
    picks = jnp.broadcast_to(picks, (*k.shape[:-1], h + w))
    return jnp.concatenate([scaled, *terms], -1), jnp.concatenate([k, picks], -1)


def _cudnn(q, k, v, tables, grid):
    d = q.shape[-1]
    if wrong := _cudnn_unsupported_reason(q, tables is not None, grid, _nvidia_gpu()):
        raise ValueError(
            "attention is 'cudnn', which needs an NVIDIA GPU of compute capability 8.0 or more, or "
            "9.x (Hopper) for heads wider than 128, bfloat16 or float16, and an even number of "
            f"positions, but {wrong}; leave it out, or name another"
        )
    q, k = fold_positions(q, k, tables)
    # cuDNN needs the same width for all three.
    width = _cudnn_width(d, tables is not None, grid)
    q, k, v = (_widen(x, width).transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
    return out.transpose(0, 2, 1, 3)[..., :d]


def _widen(x, width):
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


def _cudnn_width(d: int, has_positions: bool, grid: tuple[int, int]) -> int:
    """Width of heads with the positions folded into them: a multiple of eight."""
    return -(-(d + has_positions * sum(grid)) // 8) * 8


def _nvidia_gpu() -> str | None:
    """The compute capability of this process's NVIDIA GPU, such as "9.0"; None without a GPU.

    It determines which CUDA programs can be compiled here, not where a model runs.
    """
    try:
        return jax.local_devices(backend="cuda")[0].compute_capability
    except RuntimeError:
        return None


def _cudnn_unsupported_reason(
    q: Float[Array, "b heads n d"], has_positions: bool, grid: tuple[int, int], gpu: str | None
) -> str | None:
    """Why cuDNN's flash attention, forward or backward, does not support this; None if it does."""
    width = _cudnn_width(q.shape[-1], has_positions, grid)
    size = f"{grid[0]} x {grid[1]}"
    lacks = _flash_unsupported_reason(q, gpu)
    if gpu is None or lacks:
        return lacks
    if width > 256:
        return f"a grid of {size} makes the heads {width} wide, and the limit is 256"
    if width > 128 and not 9 <= float(gpu) < 10:
        return (
            f"this one has compute capability {gpu}, and heads are {width} wide with the "
            f"positions of a grid of {size}"
        )
    if grid[0] * grid[1] % 2:
        return f"a grid of {size} has an odd number of positions"
    return None


def _pallas(q, k, v, tables, grid):
    from sam_jax.ops.flash import flash_attention  # imports Pallas

    if wrong := _pallas_unsupported_reason(q, tables is not None, grid, _nvidia_gpu()):
        raise ValueError(
            "attention is 'pallas', which needs an NVIDIA GPU of compute capability 8.0 or more, "
            "bfloat16 or float16, relative positions, and rows of up to 64 positions (of heads up "
            f"to 128 wide), but {wrong}; leave it out, or name another"
        )
    rel_h, rel_w = (term.astype(q.dtype) for term in position_terms(q, tables))
    return flash_attention(q * q.shape[-1] ** -0.5, k, v, rel_h, rel_w)


def _pallas_unsupported_reason(
    q: Float[Array, "b heads n d"], has_positions: bool, grid: tuple[int, int], gpu: str | None
) -> str | None:
    """Why the Pallas kernel does not support this; None if it does."""
    from sam_jax.ops.flash import flash_unsupported_reason

    if lacks := _flash_unsupported_reason(q, gpu):
        return lacks
    return flash_unsupported_reason(grid, q.shape[-1]) if has_positions else "there are none"


def _flash_unsupported_reason(q: Float[Array, "b heads n d"], gpu: str | None) -> str | None:
    """Why the GPU does not support any flash attention in the dtype; None if it does."""
    if gpu is None:
        return "JAX has none here"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the model computes in {q.dtype}; give it dtype=jnp.bfloat16"
    return f"this one has compute capability {gpu}" if float(gpu) < 8 else None


def _rows_per_block(h: int, w: int) -> int:
    """The largest divisor of h whose rows hold at most `_QUERY_BLOCK` queries, at least 1."""
    return max(r for r in range(1, h + 1) if h % r == 0 and (r * w <= _QUERY_BLOCK or r == 1))


_IMPLEMENTATIONS = {
    "portable": _portable,
    "xla": _xla,
    "folded": _folded,
    "chunked": _chunked,
    "cudnn": _cudnn,
    "pallas": _pallas,
}
