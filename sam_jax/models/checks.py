"""Checks of the model's arguments; an error says what was given and what was expected."""

import contextlib
from reprlib import repr as short
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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

JOIN_HINT = "sam_jax.join_prompts(points, labels, boxes) makes points and labels"


class Prompts(NamedTuple):
    """Prompts as the model takes them; leading axes are images, then prompts.

    Each prompt, or each image, has one mask or one dense embedding.
    """

    points: Float[Array, "b p n 2"] | None = None
    labels: Int[Array, "b p n"] | None = None
    masks: Float[Array, "b #p 4*g 4*g"] | None = None
    sparse_embeddings: Float[Array, "b p s c"] | None = None
    dense_embeddings: Float[Array, "b #p g g c"] | None = None
    attention_similarity: Float[Array, "b p #heads #t g*g"] | None = None
    target_embedding: Float[Array, "b p #t c"] | None = None

    @property
    def count(self) -> Any:
        """How many prompts each image has."""
        tokens = self.sparse_embeddings if self.labels is None else self.labels
        assert tokens is not None  # as `check_prompts` made sure
        return tokens.shape[1]


def check_rngs(rngs: Any) -> None:
    """Raises TypeError for anything but random numbers of Flax."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs is {short(rngs)}, expected nnx.Rngs, such as nnx.Rngs(0)")


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for anything but a dtype that models compute in."""
    given: Any = short(dtype)
    with contextlib.suppress(TypeError):  # the name of no dtype
        given = jnp.dtype(dtype)
    if given not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype is {given}, expected float32, bfloat16 or float16")


def check_multimask(multimask_output: Any) -> None:
    """Raises TypeError for anything but a bool, or None; a compiled program has one of them."""
    if not isinstance(multimask_output, bool | np.bool | None):
        raise TypeError(f"multimask_output is {multimask_output!r}, expected a bool or None")


def check_prompts(config: SamConfig, images: Any, prompts: Prompts) -> Prompts:
    """The prompts of `Sam.decode` for so many images, as arrays of JAX."""
    points, labels, masks, sparse, dense, similarity, target = prompts
    tokens, count = 0, None
    if (points is None) != (labels is None):
        raise ValueError(f"points and labels belong together; {JOIN_HINT}")
    if points is not None:
        points, labels = _check_points(images, points, labels)
        _, count, tokens = labels.shape
    if sparse is not None:
        shape = images, count, None, config.prompt_embed_dim
        sparse = _check_floats("sparse_embeddings", sparse, shape)
        count, tokens = sparse.shape[1], tokens + sparse.shape[2]
    if count is None or tokens == 0:
        raise ValueError(
            "there are neither points nor sparse_embeddings; for a mask alone, give one point "
            "(0, 0) with label -10, which is padding"
        )
    if masks is not None and dense is not None:
        raise ValueError(
            "masks and dense_embeddings are both given, but the embeddings take the place of the "
            "masks'; leave one out"
        )
    if masks is not None:
        shape = images, None, config.mask_size, config.mask_size
        masks = check_shape("masks", masks, shape, MASK_HINT)
        check_logits(masks, "masks")
        masks = _check_count("masks", to_device(masks), count)
    if dense is not None:
        grid = config.image_embedding_size
        shape = images, None, grid, grid, config.prompt_embed_dim
        dense = _check_floats("dense_embeddings", dense, shape)
        dense = _check_count("dense_embeddings", dense, count)
    if similarity is not None:
        heads, tokens_in_all, pixels = guidance_shape(config, tokens)
        shape = images, count, None, None, pixels
        similarity = _check_floats("attention_similarity", similarity, shape)
        shape = images, count, heads, tokens_in_all, pixels
        similarity = check_broadcast("attention_similarity", similarity, shape)
    if target is not None:
        _, tokens_in_all, _ = guidance_shape(config, tokens)
        shape = images, count, None, config.prompt_embed_dim
        target = _check_floats("target_embedding", target, shape)
        target = check_broadcast("target_embedding", target, (*shape[:2], tokens_in_all, shape[3]))
    return Prompts(points, labels, masks, sparse, dense, similarity, target)


def _check_points(images, points, labels):
    points = check_shape("points", points, (images, None, None, 2), JOIN_HINT)
    labels = check_shape("labels", labels, points.shape[:-1], JOIN_HINT)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}, expected integers; {JOIN_HINT}")
    if not jnp.isdtype(points.dtype, ("real floating", "integral")):
        raise TypeError(f"points are {points.dtype}, expected floats; {JOIN_HINT}")
    check_joined(concrete(points), concrete(labels))
    return to_device(points, jnp.float32), to_device(labels, jnp.int32)


def _check_floats(name, array, shape):
    array = check_shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} are {array.dtype}, expected floats")
    return to_device(array)


def _check_count(name, array, prompts):
    if array.shape[1] not in (1, prompts):
        raise ValueError(
            f"{name} have shape {array.shape}: expected one per image, or one for each of "
            f"its {prompts} prompts"
        )
    return array


def check_pixels(size: int, pixel_values: Any) -> Array:
    """The pixels of `Sam.encode_image`, of a model whose input has sides of `size` pixels."""
    pixel_values = check_shape("pixel_values", pixel_values, (None, size, size, 3))
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise TypeError(
            f"pixel_values are {pixel_values.dtype}, expected floats, normalized as by "
            "SamProcessor or sam_jax.preprocess"
        )
    return to_device(pixel_values)


def check_keys(keys: Any, images: int) -> None:
    """Checks that there is a key of `jax.random` for each image, of the new or the old kind."""
    is_new = hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    shape = getattr(keys, "shape", None)
    if shape not in ([(images,)] if is_new else [(images, 2), (images, 4)]):
        raise ValueError(
            f"keys have shape {shape}, expected one for each of the {images} images; make them "
            f"with jax.random.split(key, {images})"
        )


def check_embeddings(config: SamConfig, image_embeddings: Any) -> Array:
    """The image embeddings of `Sam.decode`."""
    grid, channels = config.image_embedding_size, config.image_embedding_channels
    return _check_floats("image_embeddings", image_embeddings, (None, grid, grid, channels))


def guidance_shape(config: SamConfig, prompt_tokens: int) -> tuple[int, int, int]:
    """PerSAM's heads, tokens and pixels for a prompt of so many tokens."""
    decoder, grid = config.mask_decoder, config.image_embedding_size
    tokens = 1 + (decoder.num_multimask_outputs + 1) + config.hq + prompt_tokens
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
    """A numpy array on JAX's default device; put explicitly, as `jax.transfer_guard` demands."""
    if dtype is not None:
        array = array.astype(dtype)
    return jax.device_put(array) if isinstance(array, np.ndarray) else array
