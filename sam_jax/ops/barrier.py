"""Keeps XLA on a CPU from computing something again, or in a wider dtype, where it is used."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@jax.jit
def barrier_on_cpu(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, computed once, and rounded to its dtype, before anything that uses it."""
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


def narrow(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """A factor of a product, rounded to its dtype.

    Without the barrier, XLA on a CPU multiplies in float32 what it was before the rounding, which
    is slow (docs/design/attention.md).
    """
    return x if x.dtype == jnp.float32 else barrier_on_cpu(x)
