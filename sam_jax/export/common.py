"""Helpers of both kinds of export."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sam_jax.models.sam import Sam
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.attention import Implementation


def write_config(folder: Path, model: Sam, **more: Any) -> None:
    """Writes `config.json`: the settings that programs need to use the model."""
    names = (
        *("image_size", "mask_size", "mask_threshold"),
        *("resize", "normalization", "pixel_mean", "pixel_std"),
    )
    values = {name: getattr(model.config, name) for name in names}
    values["dtype"] = str(jnp.dtype(model.mask_decoder.dtype))
    (folder / "config.json").write_text(json.dumps(values | more, indent=2) + "\n")


def vit_blocks(model: Sam) -> list:
    """The blocks whose attention can be chosen; only a ViT has them."""
    encoder = model.image_encoder
    return list(encoder.blocks) if isinstance(encoder, ImageEncoderViT) else []


def with_attention(model: Sam, implementation: Implementation) -> Sam:
    """The model with another implementation of a ViT's attention."""
    model = nnx.merge(*nnx.split(model))
    for block in vit_blocks(model):
        block.attn.implementation = implementation
    return model
