"""The model as programs of `jax.export`, for any of its platforms."""

import os
from collections.abc import Callable, Sequence
from typing import get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sam_jax.checkpoints.params import flat_params
from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.export.common import vit_blocks, with_attention, write_config
from sam_jax.files import atomic_dir, require_absent
from sam_jax.models.sam import Sam
from sam_jax.ops.attention import fastest
from sam_jax.types import Platform


def export_jax(
    model: Sam,
    path: str | os.PathLike,
    platforms: Sequence[Platform] = ("cpu", "cuda", "tpu"),
    *,
    vjp_order: int = 0,
) -> None:
    """Writes a folder of programs, each for all of the platforms.

    They need jax, flatbuffers (with which JAX reads them) and safetensors (for the parameters).
    `jax.export.deserialize(file.read_bytes()).call(params, ...)` runs one, also under `jax.jit`;
    `examples/load_export.py` shows all of it. `jax.grad` works with `vjp_order=1`; `jax.vmap`
    does not, and the open axes take its place: b, p and n may be any number.

    * `encoder.jax`: pixel_values float32 [b, size, size, 3] (a picture resized to the longest side,
      normalised, then padded with zeros at the bottom and right) to image embeddings [b, g, g, c];
    * `decoder.jax`: image embeddings, points float32 [b, p, n, 2] (x, y in pixels of the resized
      picture) and labels int32 [b, p, n] to mask logits float32 [b, p, 4, 4 g, 4 g] and predicted
      IoUs [b, p, 4]. The first of four masks is meant for unambiguous prompts, the others are the
      candidates for ambiguous ones. For labels see `sam_jax.models.prompt_encoder`: a list without
      a box ends with a point (0, 0) labelled -1, and -10 is padding;
    * `decoder_with_masks.jax`: the same with logits [b, p, 4 g, 4 g] of an earlier answer besides;
    * `params.safetensors`: the programs' first argument, a dictionary;
    * `config.json`: what preparing a picture takes: `image_size`, and `pixel_mean` and `pixel_std`
      for red, green and blue from 0 to 255; a mask is where logits exceed `mask_threshold`.
      (`resize` and `normalization` are other than said above for MedSAM; see `SamConfig`.)

    Each platform gets its own program, with its own attention if the model names none: on a CPU
    prompts one after the other, and never all logits of a ViT's global attention at once; elsewhere
    all together, in ViT-H a gigabyte for each picture (flash attention is not exported). Float32
    products have the precision that `jax_default_matmul_precision` asks for at the time of writing.

    Args:
        model: of any dtype, in which the programs compute.
        path: of the new folder, which appears whole or not at all.
        platforms: to run on.
        vjp_order: how often the programs can be differentiated, as in `jax.export`. With 1,
            `jax.grad` gives the gradient by any input, parameters included; the backward pass
            always computes all of them. Files are three times as large or more.

    Raises:
        FileExistsError: if there is something at `path` already.
        ValueError: for a negative `vjp_order`, for no, unknown or repeated platforms, and for a
            model whose attention is "cudnn" or "pallas", which JAX does not export.
    """
    require_absent(path)
    if vjp_order < 0:
        raise ValueError(f"vjp_order is {vjp_order}, expected 0 or more")
    known = get_args(Platform)
    if not platforms or not set(platforms) <= set(known) or len({*platforms}) < len(platforms):
        raise ValueError(
            f"platforms are {list(platforms)}, expected some of {list(known)}, each once"
        )
    config = model.config
    for block in vit_blocks(model):
        if (named := block.attn.implementation) in ("cudnn", "pallas"):
            raise ValueError(
                f"attention is {named!r}, which JAX does not export; load the model with "
                "attention=None"
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
    programs = {
        "encoder": (_encode, (pixels,)),
        "decoder": (_decode, prompts),
        "decoder_with_masks": (_decode, (*prompts, masks)),
    }
    params = flat_params(model)
    with atomic_dir(path) as folder:
        for name, (function, arrays) in programs.items():
            program = jax.jit(_by_platform(model, function, platforms))
            exported = jax.export.export(program, platforms=platforms)(params, *arrays)
            (folder / f"{name}.jax").write_bytes(exported.serialize(vjp_order=vjp_order))
        write_safetensors(folder / "params.safetensors", jax.tree.map(np.asarray, params))
        write_config(
            folder,
            model,
            platforms=list(platforms),
            vjp_order=vjp_order,
            jax=jax.__version__,
        )


def _encode(model, platform, pixel_values):
    return model.encode_image(pixel_values)


def _decode(model, platform, embeddings, points, labels, masks=None):
    return model.decode(embeddings, points, labels, masks, None, platform=platform)


def _by_platform(model: Sam, function: Callable, platforms: Sequence[Platform]) -> Callable:
    """`function(model, platform, *arrays)` of flat parameters and the arrays, as it is fastest."""

    def on(platform: Platform) -> Callable:
        own = with_attention(model, lambda named, grid: named or fastest(grid, platform))
        graphdef, state = nnx.split(own)
        flat = nnx.to_flat_state(state)

        def run(params, *arrays):
            leaves = [(k, variable.replace(params[".".join(map(str, k))])) for k, variable in flat]
            return function(nnx.merge(graphdef, nnx.from_flat_state(leaves)), platform, *arrays)

        return run

    def program(params, *arrays):
        programs = {platform: on(platform) for platform in platforms}
        return jax.lax.platform_dependent(params, *arrays, **programs)

    return program
