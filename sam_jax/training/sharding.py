"""Data parallel training on one mesh, optionally with sharded parameters (FSDP).

The compiler adds the communication; a step is the same function on one device and on many hosts.
"""

from collections.abc import Callable, Sequence
from reprlib import repr as short
from typing import Literal, get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sam_jax.arrays import Device, check_mesh
from sam_jax.models.sam import Sam
from sam_jax.training.rules import Rest, combine

__all__ = [
    "Parallelism",
    "any_host",
    "fetch",
    "init_sharded",
    "make_mesh",
    "merge_on_host",
    "put_batch",
    "shard_tree",
    "shardings",
]

Parallelism = Literal["data", "fsdp"]
""""data": all parameters on every device; "fsdp": a share of them on each device."""

# Smaller parameters are replicated: gathering them would cost more than it saves.
_MIN_SIZE = 2**12


def make_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of the devices, by default all of all hosts, along one axis, `data`.

    Raises:
        TypeError: for anything but devices, such as their number.
    """
    devices = jax.devices() if devices is None else devices
    if not hasattr(devices, "__len__") or not all(isinstance(x, jax.Device) for x in devices):
        raise TypeError(f"devices are {short(devices)}, expected some of jax.devices()")
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shardings(tree: PyTree, mesh: Mesh, *, parallelism: Parallelism) -> PyTree:
    """The sharding of each array of a state.

    With "fsdp", an array's longest axis that is divisible by the number of devices is sharded; with
    "data", every device has a copy.

    Raises:
        ValueError: for another `parallelism`.
    """
    check_mesh(mesh)
    if parallelism not in get_args(Parallelism):
        raise ValueError(
            f"parallelism is {parallelism!r}, expected {' or '.join(get_args(Parallelism))}"
        )

    def of(array):
        spec = [None] * array.ndim
        fits = [n for n in array.shape if n % mesh.size == 0]
        if parallelism == "fsdp" and fits and array.size >= _MIN_SIZE:
            spec[array.shape.index(max(fits))] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, tree)


def shard_tree(tree: PyTree, mesh: Mesh, *, parallelism: Parallelism) -> PyTree:
    """Places a tree on the devices; every host must have the same arrays."""

    def place(array, sharding):
        array = jax.device_get(array)
        parts = sharding.addressable_devices_indices_map(array.shape).items()
        parts = [jax.device_put(array[index], device) for device, index in parts]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(place, tree, shardings(tree, mesh, parallelism=parallelism))


def init_sharded(
    function: Callable[..., PyTree], *args: PyTree, mesh: Mesh, parallelism: Parallelism
) -> PyTree:
    """Computes `function(*args)` of placed arrays in sharded form; no device has all of it.

    For the optimizer's state, which with FSDP may not fit on one device:

        params = shard_tree(params, mesh, parallelism="fsdp")
        state = init_sharded(partial(init_state, tx=tx), params, mesh=mesh, parallelism="fsdp")
    """
    places = shardings(jax.eval_shape(function, *args), mesh, parallelism=parallelism)
    return jax.jit(function, out_shardings=places)(*args)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins each host's part of a batch to the global batch, sharded over the devices.

    Raises:
        ValueError: if the batch cannot be split among the devices, or its arrays do not have the
            same number of entries.
    """
    sizes, count = {name: len(array) for name, array in batch.items()}, len(mesh.local_devices)
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the batch's arrays have {sizes} entries, expected one number of images")
    (size,) = set(sizes.values())
    if size % count:
        raise ValueError(
            f"a batch of {size} cannot be split among {count} devices; choose a batch size that is "
            f"a multiple of {mesh.size}, the number of all devices"
        )
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def place(array):
        shape = size * mesh.size // count, *array.shape[1:]
        places = sharding.addressable_devices_indices_map(shape)
        starts = {device: index[0].start or 0 for device, index in places.items() if index}
        devices = sorted(starts, key=starts.__getitem__)
        parts = map(jax.device_put, np.split(array, count), devices)
        return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))

    return {name: place(array) for name, array in batch.items()}


def any_host(flag: bool) -> bool:
    """Whether the flag is true on any host; all hosts must call this together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """The whole tree as numpy arrays on every host; all hosts must call this together."""
    check_mesh(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    copies = jax.jit(_identity, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda x: jax.device_get(x.addressable_data(0)), copies)


def merge_on_host(params: PyTree, rest: Rest, *, mesh: Mesh) -> Sam:
    """The model of sharded parameters, gathered on this host's first device."""
    return combine(*jax.device_put(fetch((params, rest), mesh)))


def _identity(x):
    return x
