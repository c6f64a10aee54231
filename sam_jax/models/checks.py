"""What the model refuses, with a message that says what was expected."""

from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sam_jax.arrays import as_array
from sam_jax.config import SamConfig
from sam_jax.ops.prompts import (
    MASK_HINT,
    check_joined,
    check_logits,
    concrete,
)

JOIN_HINT = "join_prompts(points, labels, boxes) of sam_jax.ops.prompts makes points and labels"


class Prompts(NamedTuple):
    """Prompts as the model takes them; leading axes are images, then prompts."""

    points: Float[Array, "b p n 2"]
    labels: Int[Array, "b p n"]
    masks: Float[Array, "b #p 4*g 4*g"] | None  # one for each prompt, or for each image
    attention_similarity: Float[Array, "b p #heads #t g*g"] | None
    target_embedding: Float[Array, "b p #t c"] | None


def check_prompts(config: SamConfig, images, points, labels, masks, similarity, target) -> Prompts:
    """The prompts of `Sam.decode` for so many images, as arrays of numpy or JAX."""
    points = check_shape("points", points, (images, None, None, 2), JOIN_HINT)
    labels = check_shape("labels", labels, points.shape[:-1], JOIN_HINT)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}, expected integers; {JOIN_HINT}")
    if not jnp.isdtype(points.dtype, ("real floating", "integral")):
        raise TypeError(f"points are {points.dtype}, expected floats; {JOIN_HINT}")
    check_joined(concrete(points), concrete(labels))
    points, labels = to_device(points, jnp.float32), to_device(labels, jnp.int32)
    prompts, side = points.shape[1], config.mask_size
    if masks is not None:
        masks = check_shape("masks", masks, (images, None, side, side), MASK_HINT)
        check_logits(masks, "masks")
        masks = to_device(masks)
        if masks.shape[1] not in (1, prompts):
            raise ValueError(
                f"masks have shape {masks.shape}: expected one per image, or one for each of "
                f"its {prompts} prompts"
            )
    if similarity is not None:
        heads, tokens, pixels = guidance_shape(config, points.shape[2])
        shape = images, prompts, None, None, pixels
        similarity = check_shape("attention_similarity", similarity, shape)
        shape = images, prompts, heads, tokens, pixels
        similarity = check_broadcast("attention_similarity", similarity, shape)
    if target is not None:
        _, tokens, _ = guidance_shape(config, points.shape[2])
        shape = images, prompts, None, config.prompt_embed_dim
        target = check_shape("target_embedding", target, shape)
        target = check_broadcast("target_embedding", target, (*shape[:2], tokens, shape[3]))
    return Prompts(points, labels, masks, similarity, target)


def guidance_shape(config: SamConfig, points: int) -> tuple[int, int, int]:
    """PerSAM's heads, tokens and pixels for so many points, a box's corners included."""
    decoder, grid = config.mask_decoder, config.image_embedding_size
    tokens = 1 + (decoder.num_multimask_outputs + 1) + config.hq + points
    return decoder.num_heads, tokens, grid * grid


@overload
def check_shape(name: str, array: Array, expected: tuple[Any, ...], hint: str = "") -> Array: ...
@overload
def check_shape(
    name: str, array: Any, expected: tuple[Any, ...], hint: str = ""
) -> np.ndarray | Array: ...
def check_shape(
    name: str, array: Any, expected: tuple[Any, ...], hint: str = ""
) -> np.ndarray | Array:
    """The array as numpy's or JAX's, if it has the shape; None is any size."""
    array = as_array(array, name)

    def fits(shape):
        return len(shape) == len(expected) and all(
            e is None or e == a for a, e in zip(shape, expected, strict=True)
        )

    shape = tuple(array.shape)
    if not fits(shape):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        if len(shape) == 4 and fits((shape[0], *shape[2:], shape[1])):
            hint = "they are channels first: use np.moveaxis(array, 1, -1)"
        elif len(shape) == 4 and fits((shape[0], shape[3], *shape[1:3])):
            hint = "they are channels last: use np.moveaxis(array, -1, 1)"
        elif fits((1, *shape)):
            hint = "one alone is array[None]"
        raise ValueError(
            f"{name} have shape {shape}, expected ({wanted}){f'; {hint}' if hint else ''}"
        )
    return array


def check_broadcast(name: str, array: Any, shape: tuple[int, ...]) -> Array:
    """The array with leading axes of one up to the number of `shape`, which it broadcasts to."""
    array = to_device(as_array(array, name))
    full = (1,) * (len(shape) - array.ndim) + array.shape
    if len(full) != len(shape) or any(a not in (1, n) for a, n in zip(full, shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, expected one that broadcasts to {shape}")
    return array.reshape(full)


def to_device(array: Any, dtype: DTypeLike | None = None) -> Any:
    """numpy's arrays on JAX's default device: explicitly, as `jax.transfer_guard` asks for."""
    if dtype is not None:
        array = array.astype(dtype)
    return jax.device_put(array) if isinstance(array, np.ndarray) else array
