"""One mesh for everything: data parallel, or with the parameters spread over it too (FSDP).

The compiler adds the communication; a step is the same function on one device and on many hosts.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sam_jax.arrays import Device
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
"""All parameters on every device, or each device its share."""

# Smaller parameters stay whole on every device: gathering them would cost more than it saves.
_MIN_SIZE = 2**12


def make_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """Devices, all of all hosts if left out, along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def shardings(tree: PyTree, mesh: Mesh, *, parallelism: Parallelism) -> PyTree:
    """Where each array of a state belongs.

    With "fsdp" the longest axis of an array that the devices can share is spread over them, with
    "data" every device has a copy.
    """

    def of(array):
        spec = [None] * array.ndim
        fits = [n for n in array.shape if n % mesh.size == 0]
        if parallelism == "fsdp" and fits and array.size >= _MIN_SIZE:
            spec[array.shape.index(max(fits))] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, tree)


def shard_tree(tree: PyTree, mesh: Mesh, *, parallelism: Parallelism) -> PyTree:
    """The tree on the devices; every host must have the same arrays."""

    def place(array, sharding):
        array = jax.device_get(array)
        parts = sharding.addressable_devices_indices_map(array.shape).items()
        parts = [jax.device_put(array[index], device) for device, index in parts]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(place, tree, shardings(tree, mesh, parallelism=parallelism))


def init_sharded(
    function: Callable[..., PyTree], *args: PyTree, mesh: Mesh, parallelism: Parallelism
) -> PyTree:
    """`function(*args)` of arrays that are placed, made where it belongs: no device holds it whole.

    For the state of an optimizer, which with FSDP may be more than fits one device:

        params = shard_tree(params, mesh, parallelism="fsdp")
        state = init_sharded(partial(init_state, tx=tx), params, mesh=mesh, parallelism="fsdp")
    """
    places = shardings(jax.eval_shape(function, *args), mesh, parallelism=parallelism)
    return jax.jit(function, out_shardings=places)(*args)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each host's part of a batch -> the batch of all, spread over the devices.

    Raises:
        ValueError: if the devices cannot share it.
    """
    size, count = len(batch["valid"]), len(mesh.local_devices)
    if size % count:
        raise ValueError(
            f"a batch of {size} cannot be shared by {count} devices; choose a batch size that is a "
            f"multiple of {mesh.size}, all devices together"
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
    """Whether it is true on any host; all hosts must call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """The whole tree as numpy arrays, on every host; all hosts must call it together."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    copies = jax.jit(_identity, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda x: jax.device_get(x.addressable_data(0)), copies)


def merge_on_host(params: PyTree, rest: Rest, *, mesh: Mesh) -> Sam:
    """The model of parameters that are spread over devices, whole on this host's first device."""
    return combine(*jax.device_put(fetch((params, rest), mesh)))


def _identity(x):
    return x
