"""A model's parameters as one flat dictionary, `{"image_encoder.neck.conv1.kernel": array, ...}`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sam_jax.config import SamConfig
from sam_jax.models.sam import Sam
from sam_jax.ops.attention import Implementation


def abstract_model(
    config: SamConfig,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation | None = None,
) -> Sam:
    """A model whose parameters are shapes only: made at once, whatever its size."""
    return nnx.eval_shape(lambda: Sam(config, dtype=dtype, attention=attention, rngs=_OneKey()))


class _OneKey(nnx.Rngs):
    """Stands for `nnx.Rngs` where keys do not matter; splitting real ones takes seconds."""

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def flat_params(model: Sam) -> dict[str, jax.Array]:
    """Every parameter and buffer of the model by its path."""
    _, state = nnx.split(model)
    return {_path(key): variable[...] for key, variable in nnx.to_flat_state(state)}


def param_shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer of such a model by its path."""
    _, state = nnx.split(abstract_model(config))
    return {_path(key): variable.shape for key, variable in nnx.to_flat_state(state)}


def build_model(
    params: Mapping[str, np.ndarray | jax.Array],
    config: SamConfig,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation | None = None,
) -> Sam:
    """A model with these parameters, which must be exactly its own; they are put on the device."""
    graphdef, state = nnx.split(abstract_model(config, dtype, attention))
    flat = nnx.to_flat_state(state)
    leaves = [(key, variable.replace(jnp.asarray(params[_path(key)]))) for key, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _path(key: tuple) -> str:
    return ".".join(map(str, key))
