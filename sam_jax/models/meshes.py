"""Functions of images on meshes with Explicit axes, JAX's default."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def with_auto_axes(function: Callable, array: Array, *others: Any) -> Any:
    """`function(array, *others)`, on a mesh with Explicit axes, too.

    Its results are spread over images as `array` is. Inside, these axes are Auto: windows join the
    axis of images with others, which Explicit axes do not allow.
    """
    sharding = jax.typeof(array).sharding
    if set(sharding.mesh.axis_types) <= {AxisType.Auto, AxisType.Manual}:
        return function(array, *others)
    spread = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return jax.sharding.auto_axes(function, out_sharding=spread)(array, *others)
