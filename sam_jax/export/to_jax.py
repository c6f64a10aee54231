"""Exports a model as programs of `jax.export`, for any of its platforms."""

import os
from collections.abc import Sequence
from typing import get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from sam_jax.checkpoints.params import flat_params, with_params
from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.errors import check_whole
from sam_jax.export.common import vit_blocks, write_config
from sam_jax.files import atomic_dir, require_absent
from sam_jax.models.sam import Sam
from sam_jax.types import Platform
from sam_jax.validation import check_model


def export_jax(
    model: Sam,
    path: str | os.PathLike,
    *,
    platforms: Platform | Sequence[Platform] = ("cpu", "cuda", "tpu"),
    vjp_order: int = 0,
) -> None:
    """Writes a folder of programs, each for all of the platforms.

    Running them needs jax, flatbuffers (with which JAX reads them) and safetensors (for the
    parameters). `jax.export.deserialize(file.read_bytes()).call(params, ...)` runs a program, also
    under `jax.jit`; `examples/load_export.py` is a complete example. `jax.grad` works with
    `vjp_order=1`. `jax.vmap` does not work, but the sizes b, p and n are arbitrary.

    * `encoder.jax`: pixel_values float32 [b, size, size, 3] (images resized to the longest side,
      normalized, then padded with zeros at the bottom and right) to image embeddings [b, g, g, c];
    * `decoder.jax`: image embeddings, points float32 [b, p, n, 2] (x, y in pixels of the resized
      image) and labels int32 [b, p, n] to mask logits float32 [b, p, 4, 4 g, 4 g] and predicted
      IoUs [b, p, 4]. The first of the four masks is for unambiguous prompts, the others are the
      candidates for ambiguous ones. `sam_jax.join_prompts` explains labels: a list without a box
      ends with a point (0, 0) labeled -1, and -10 is padding;
    * `decoder_with_masks.jax`: the same, with logits [b, p, 4 g, 4 g] of an earlier prediction as
      an additional input;
    * `params.safetensors`: the programs' first argument, a dictionary;
    * `config.json`: settings for preprocessing: `image_size`, and `pixel_mean` and `pixel_std` for
      red, green and blue from 0 to 255; and `mask_threshold`, which logits inside a mask exceed.
      (MedSAM has other `resize` and `normalization` than described above; see `SamConfig`.)

    Each platform has its own program. On a CPU prompts are decoded one by one, elsewhere all at
    once. The precision of float32 products is that of `jax_default_matmul_precision` during the
    export.

    Args:
        model: the model; the programs compute in its dtype.
        path: the folder to create, atomically.
        platforms: platforms to run on, or one.
        vjp_order: how often the programs can be differentiated, as in `jax.export`. With 1,
            `jax.grad` works with respect to any input, parameters included; the backward pass
            always computes all gradients. Files are at least three times as large.

    Raises:
        FileExistsError: if the path exists already.
        ValueError: for a negative `vjp_order`, for no, unknown or repeated platforms, or if the
            model's attention is "cudnn" or "pallas", which JAX cannot export.
    """
    check_model(model)
    require_absent(path)
    check_whole("vjp_order", vjp_order, 0)
    known = get_args(Platform)
    chosen = [platforms] if isinstance(platforms, str) else list(platforms)
    if not chosen or not set(chosen) <= set(known) or len({*chosen}) < len(chosen):
        raise ValueError(f"platforms are {chosen}, expected some of {list(known)}, each once")
    config = model.config
    named = {block.attn.implementation for block in vit_blocks(model)}
    if refused := named & {"cudnn", "pallas"}:
        raise ValueError(
            f"attention is {refused.pop()!r}, which JAX cannot export; load the model without it"
        )
    size, grid, side = config.image_size, config.image_embedding_size, config.mask_size
    channels = config.image_embedding_channels
    b, p, n = jax.export.symbolic_shape("b, p, n")
    pixels = jax.ShapeDtypeStruct((b, size, size, 3), jnp.float32)
    prompts = (
        jax.ShapeDtypeStruct((b, grid, grid, channels), model.mask_decoder.dtype),
        jax.ShapeDtypeStruct((b, p, n, 2), jnp.float32),
        jax.ShapeDtypeStruct((b, p, n), jnp.int32),
    )
    masks = jax.ShapeDtypeStruct((b, p, side, side), jnp.float32)

    def encode(params, pixel_values):
        return with_params(model, params.__getitem__).encode_image(pixel_values)

    def decode(params, embeddings, points, labels, masks=None):
        sam = with_params(model, params.__getitem__)
        return tuple(sam.decode(embeddings, points, labels, masks=masks, multimask_output=None))

    programs = {
        "encoder": (encode, (pixels,)),
        "decoder": (decode, prompts),
        "decoder_with_masks": (decode, (*prompts, masks)),
    }
    params = flat_params(model)
    with atomic_dir(path) as folder:
        for name, (function, arrays) in programs.items():
            exported = jax.export.export(jax.jit(function), platforms=chosen)(params, *arrays)
            (folder / f"{name}.jax").write_bytes(exported.serialize(vjp_order=vjp_order))
        write_safetensors(folder / "params.safetensors", jax.tree.map(np.asarray, params))
        write_config(
            folder,
            model,
            platforms=chosen,
            vjp_order=vjp_order,
            jax=jax.__version__,
        )
