"""Names by which exports know a function, whatever it is called in Python."""

import inspect
from collections.abc import Callable


def operation(name: str) -> Callable[[Callable], Callable]:
    """Names a function in jaxprs, by which `sam_jax.export.onnx_graph` translates it as a whole.

    Goes below `jax.jit` and `jax.custom_jvp`.
    """

    def named(function: Callable) -> Callable:
        inspect.unwrap(function).__name__ = name  # which JAX looks for
        return function

    return named
