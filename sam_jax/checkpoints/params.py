"""A model's parameters as a flat dictionary: `{"image_encoder.neck.conv1.kernel": array, ...}`."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sam_jax.config import SamConfig, ViTConfig
from sam_jax.errors import CheckpointError, clip, listed
from sam_jax.models.sam import Sam
from sam_jax.ops.attention import Implementation
from sam_jax.ops.resize import linear_resize_matrix


@functools.cache
def abstract_model(
    config: SamConfig,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation = "portable",
) -> Sam:
    """A model whose parameters are only shapes, which takes no time and memory at any size.

    Do not modify it: calls share the same object.
    """
    return nnx.eval_shape(lambda: Sam(config, dtype=dtype, attention=attention, rngs=_NoKeys()))


class _NoKeys(nnx.Rngs):
    """Replaces `nnx.Rngs` where only shapes matter; splitting keys takes seconds."""

    def __init__(self):
        pass

    def params(self) -> None:
        return None


def flat_params(model: Sam) -> dict[str, jax.Array]:
    """The model's parameters and buffers by path, such as `image_encoder.neck.conv1.kernel`."""
    _, state = nnx.split(model)
    return {_path(key): variable[...] for key, variable in nnx.to_flat_state(state)}


def params_sha256(params: Mapping[str, np.ndarray | jax.Array]) -> str:
    """The SHA-256 of parameters, in hexadecimal; equal if and only if all bits are equal."""
    found = hashlib.sha256()
    for name, array in sorted(params.items()):
        array = np.asarray(array)
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def param_shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters and buffers of a model with this configuration, by path."""
    # With all arguments, so that `build_model` finds it in the cache.
    _, state = nnx.split(abstract_model(config, jnp.float32, "portable"))
    return {_path(key): variable.shape for key, variable in nnx.to_flat_state(state)}


def build_model(
    params: dict[str, np.ndarray] | dict[str, np.ndarray | jax.Array],
    config: SamConfig,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation = "portable",
) -> Sam:
    """A model with these parameters, whose paths and shapes must be exactly the model's.

    They are copied to the device one by one and removed from `params`, so that a large model is
    not in memory twice.
    """

    def to_device(path):
        array = params.pop(path)
        if isinstance(array, jax.Array):
            return jnp.array(array)
        # A copy: the array may be a view of a file that is modified later, and on a CPU
        # `device_put` may alias it. (`jnp.array` would compile a program for each shape.)
        return jax.device_put(np.array(array))

    return with_params(abstract_model(config, dtype, attention), to_device)


def with_params(model: Sam, of_path: Callable[[str], Any]) -> Sam:
    """The model with other arrays: `of_path` returns each by its path, one after the other."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = [(key, variable.replace(of_path(_path(key)))) for key, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def check_tensors(
    found: Mapping[str, np.ndarray | jax.Array | jax.ShapeDtypeStruct],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Compares named tensors with the names and shapes of a model.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected, has the wrong shape, or is
            not a float. More than ten below a part that the model does not have, such as `ema.`,
            are one line.
    """
    own = {_part(name) for name in expected}
    foreign = collections.Counter(part for name in found if (part := _part(name)) not in own)
    foreign = {part: count for part, count in foreign.items() if count > 10}
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            if _part(name) not in foreign:
                problems.append(f"unexpected: {clip(name)} {tensor.shape}")
        elif tensor.shape != expected[name]:
            problems.append(f"wrong shape: {name} is {tensor.shape}, expected {expected[name]}")
        elif not _is_float(tensor) and not name.endswith("num_batches_tracked"):
            problems.append(f"wrong dtype: {name} is {tensor.dtype}, expected floats")
    problems += [
        f"unexpected: {count} tensors whose names begin with '{clip(part)}.', which is not a part "
        "of the model"
        for part, count in foreign.items()
    ]
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise CheckpointError(
            "\n  ".join([f"the tensors do not match the model ({count}):", *problems])
        )


def _part(name: str) -> str:
    return name.partition(".")[0]


def check_finite(params: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Rejects parameters that would make every result NaN.

    Raises:
        CheckpointError: names the parameters that have NaN or infinity.
    """
    bad = [k for k, v in params.items() if _is_float(v) and not np.isfinite(v).all()]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(params)} parameters have NaN or infinity: {listed(bad)}. "
            "The training may have diverged; use an earlier checkpoint"
        )


def _is_float(tensor: np.ndarray | jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating)


def check_depth(config: SamConfig, count: int) -> None:
    """Rejects, before building the model, a configuration with more layers than the tensors.

    Raises:
        CheckpointError: if the configuration needs more than `count` tensors.
    """
    encoder, decoder = config.image_encoder, config.mask_decoder
    blocks = encoder.depth if isinstance(encoder, ViTConfig) else sum(encoder.depths)
    least = 10 * blocks + 20 * decoder.transformer_depth  # slightly fewer than each has
    least += 2 * decoder.iou_head_depth + 6 * decoder.num_multimask_outputs
    if least > count:
        raise CheckpointError(
            f"the configuration has {blocks} blocks, {decoder.transformer_depth} decoder layers "
            f"and {decoder.num_multimask_outputs} outputs, which need more than {least} tensors, "
            f"but there are only {count}"
        )


def resize_positions(
    params: Mapping[str, np.ndarray], config: SamConfig, image_size: int
) -> tuple[dict[str, np.ndarray], SamConfig]:
    """Adapts parameters and configuration to another image size, in pixels.

    Absolute position embeddings are resized bilinearly, relative ones of the global blocks
    linearly.
    """
    old_grid = config.image_embedding_size
    config = dataclasses.replace(config, image_size=image_size)
    grid = config.image_embedding_size
    params = dict(params)
    if grid == old_grid or not isinstance(config.image_encoder, ViTConfig):
        return params, config
    if (name := "image_encoder.pos_embed") in params:
        matrix = linear_resize_matrix(old_grid, grid)
        table = np.asarray(params[name])
        resized = np.einsum("yh,bhwc,xw->byxc", matrix, table.astype(np.float64), matrix)
        params[name] = resized.astype(table.dtype)
    matrix = linear_resize_matrix(2 * old_grid - 1, 2 * grid - 1)
    for block in config.image_encoder.global_attn_indexes:
        for axis in "hw":
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            if name in params:
                table = np.asarray(params[name])
                params[name] = (matrix @ table.astype(np.float64)).astype(table.dtype)
    return params, config


def _path(key: tuple) -> str:
    return ".".join(map(str, key))
