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
    """A factor that was rounded: XLA on a CPU would multiply what it was before, which is slow."""
    return x if x.dtype == jnp.float32 else barrier_on_cpu(x)
