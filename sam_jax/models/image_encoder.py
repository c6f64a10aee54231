"""What an image encoder is to the rest of the model, so that yours can take its place.

    model = from_pretrained("mobile_sam")
    model.image_encoder = MyEncoder(...)

`SamPredictor`, everything mode and training then use it. The prompt encoder and the mask decoder
stay those of the checkpoint.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sam_jax.config import SamConfig
from sam_jax.models.layers import Remat


@runtime_checkable
class ImageEncoder(Protocol):
    """An `nnx.Module` that can be called so. (`flax.nnx.bridge` makes one of a Linen module.)"""

    def __call__(
        self, pixel_values: Float[Array, "b size size 3"], *, remat: Remat = False
    ) -> Float[Array, "b grid grid c"]:
        """Image embeddings of normalized pixels.

        Args:
            pixel_values: images normalized and padded as `SamProcessor` does it; `size` is
                `config.image_size`.
            remat: see `Sam.encode_image`. You can leave this argument out if you do not use it.

        Returns:
            Floats; `grid` is `config.image_embedding_size` and c `config.image_embedding_channels`.
        """
        ...


def call_encoder(
    encoder: ImageEncoder, config: SamConfig, pixel_values: Float[Array, "b h w 3"], **options: Any
) -> Float[Array, "b grid grid c"]:
    """The encoder's embeddings, checked.

    Raises:
        TypeError: if the encoder cannot be called so, or does not return an array of floats.
        ValueError: if the embeddings have another shape than the model's.
    """
    check_encoder(encoder, *options)
    embeddings = encoder(pixel_values, **options)
    grid, channels = config.image_embedding_size, config.image_embedding_channels
    expected = pixel_values.shape[0], grid, grid, channels
    shape, dtype = getattr(embeddings, "shape", None), getattr(embeddings, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        given = type(embeddings).__name__ if dtype is None else dtype
        raise TypeError(
            f"{_name(encoder)} returned {given}, expected an array of floats {expected}"
        )
    if shape != expected:
        raise ValueError(
            f"{_name(encoder)} returned embeddings of shape {shape}, expected {expected}: (images, "
            "rows, columns, channels)"
        )
    return embeddings


def check_encoder(encoder: Any, *options: str) -> None:
    """Raises TypeError unless it can be called as an `ImageEncoder` can, with these options."""
    if not isinstance(encoder, nnx.Module) or not callable(encoder):
        raise TypeError(
            f"{_name(encoder)} is not a flax.nnx.Module that can be called; sam_jax.ImageEncoder "
            "says what one must have"
        )
    signature = inspect.signature(encoder)
    try:
        signature.bind(None, **dict.fromkeys(options))
    except TypeError as error:
        raise TypeError(
            f"{_name(encoder)} takes {signature}, but is called with "
            f"{', '.join(('pixel_values', *options))}: {error}"
        ) from None


def _name(encoder):
    return f"the image encoder ({type(encoder).__name__})"
