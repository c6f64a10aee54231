"""Names by which exports recognize a function, whatever its name in Python."""

import inspect
from collections.abc import Callable


def operation(name: str) -> Callable[[Callable], Callable]:
    """Names a function in jaxprs, so that `sam_jax.export.onnx_graph` translates it as a whole.

    Apply it below `jax.jit` and `jax.custom_jvp`.
    """

    def named(function: Callable) -> Callable:
        inspect.unwrap(function).__name__ = name  # JAX uses this name
        return function

    return named
