"""Converts arrays of any library with `__array__` or DLPack, and lists of them, to numpy arrays."""

import contextlib
from collections.abc import Sequence
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from PIL import Image

from sam_jax.decoders import check_decoder

# JAX declares it as a variable, which type checkers do not accept as a type.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]

# Only for type checkers. At run time, functions check values themselves and give advice.
if TYPE_CHECKING:

    class _HasArray(Protocol):
        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...

    class _HasDLPack(Protocol):
        def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    # An array of any library: numpy's, JAX's, PyTorch's on a CPU, or another with one of these.
    AnyArray: TypeAlias = np.ndarray | jax.Array | _HasArray | _HasDLPack
    # Such an array, or numbers or such arrays in nested lists.
    ArrayLike: TypeAlias = AnyArray | float | Sequence["ArrayLike"]
    # Nested lists that have None for an image without prompts.
    PromptsLike: TypeAlias = AnyArray | Sequence[ArrayLike | None]
else:
    AnyArray = ArrayLike = PromptsLike = Any


def is_array(value: Any) -> bool:
    """Whether the value is an array of some library, with `__array__` or DLPack."""
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def as_numpy(value: Any, name: str) -> np.ndarray:
    """Converts an array, or nested lists of numbers or arrays, to a numpy array of the same dtype.

    PyTorch tensors are detached. PIL images count as arrays.

    Raises:
        TypeError: if the array cannot be read, such as a PyTorch tensor on a GPU.
        ValueError: if lists have different lengths, or as in `check_decoder`.
    """
    if isinstance(value, jax.Array):
        return jax.device_get(value)  # an explicit transfer, which `jax.transfer_guard` allows
    if isinstance(value, Image.Image):
        check_decoder(value)  # numpy would decode it, and so might run a program
        return np.asarray(value)
    if _is_list(value):
        return np.asarray([as_numpy(v, name) if _holds_array(v) else v for v in value])
    if not is_array(value):
        return np.asarray(value)
    try:
        value = value.detach() if hasattr(value, "detach") else value
        return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError) as error:
        if hasattr(value, "__dlpack__"):  # its dtype may be bfloat16, which JAX has and numpy lacks
            with contextlib.suppress(Exception):
                value = value.contiguous() if hasattr(value, "contiguous") else value
                return jax.device_get(jnp.from_dlpack(value))
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__name__} that cannot be read as "
            f"a numpy array: {error}"
        ) from error


def on_accelerator(array: Any) -> bool:
    """Whether it is an array of JAX on one device whose memory is not the host's."""
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return False
    device, *others = array.devices()
    return not others and device.platform != "cpu"


def entries(value: Any, name: str) -> list:
    """What a list or an array holds along its first axis; an accelerator's array stays there.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    array = value if on_accelerator(value) else as_numpy(value, name)
    if not array.ndim:
        raise ValueError(f"{name} are {short(value)}, expected a list or an array")
    if isinstance(array, np.ndarray):
        return list(array)
    # An index on the device: a number would be part of the program.
    return [_entry(array, jax.device_put(np.int32(i), array.device)) for i in range(len(array))]


@jax.jit
def _entry(array, i):
    return array[i]


def check_mesh(mesh: Any) -> None:
    """Raises TypeError for anything but a mesh of JAX."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh is {short(mesh)}, expected a jax.sharding.Mesh, as of jax.make_mesh")


def as_array(value: Any, name: str) -> np.ndarray | jax.Array:
    """The array itself if it is a numpy or JAX array (also traced); others as numpy arrays.

    Raises:
        TypeError: if it is not an array; lists are not accepted.
    """
    if isinstance(value, (np.ndarray, jax.Array)):
        return value
    if not is_array(value):
        raise TypeError(
            f"{name} are a {type(value).__name__}, expected an array of numpy, JAX, PyTorch (on a "
            "CPU), or another library with __array__ or DLPack"
        )
    return as_numpy(value, name)


def _holds_array(value: Any) -> bool:
    if _is_list(value):
        return any(map(_holds_array, value))
    return is_array(value) or isinstance(value, Image.Image)


def _is_list(value: Any) -> bool:
    """Whether numpy would iterate over it to find numbers, arrays and images."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
