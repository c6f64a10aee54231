"""A model for programs without sam_jax: `jax.export` artefacts, or ONNX.

An artefact of `jax.export` is a program, not an archive: JAX promises to run it with its releases
of the next six months (and of the three weeks before). Keep the checkpoint.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sam_jax.checkpoints.params import flat_params
from sam_jax.checkpoints.torch_file import write_safetensors
from sam_jax.models.sam import Sam
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.attention import Implementation, fastest

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


def check_new(path: str | os.PathLike) -> None:
    """Refuses a path at which there is something already.

    Raises:
        FileExistsError: if there is.
    """
    if os.path.lexists(Path(path).expanduser()):
        raise FileExistsError(f"{path} exists already; choose another folder or remove it first")


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
    check_new(path)
    if vjp_order < 0:
        raise ValueError(f"vjp_order is {vjp_order}, expected 0 or more")
    known = get_args(Platform)
    if not platforms or not set(platforms) <= set(known) or len({*platforms}) < len(platforms):
        raise ValueError(
            f"platforms are {list(platforms)}, expected some of {list(known)}, each once"
        )
    config = model.config
    for block in _blocks(model):
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
    with _appearing(path) as folder:
        for name, (function, arrays) in programs.items():
            program = jax.jit(_by_platform(model, function, platforms))
            exported = jax.export.export(program, platforms=platforms)(params, *arrays)
            (folder / f"{name}.jax").write_bytes(exported.serialize(vjp_order=vjp_order))
        write_safetensors(folder / "params.safetensors", jax.tree.map(np.asarray, params))
        _write_config(
            folder,
            model,
            platforms=list(platforms),
            vjp_order=vjp_order,
            jax=jax.__version__,
        )


def export_onnx(model: Sam, path: str | os.PathLike, *, single_mask: bool = False) -> None:
    """Writes a folder with the encoder and the decoder in ONNX, which need ONNX Runtime alone.

    `examples/load_onnx.py` shows how to use them. Names and shapes are those that programs for SAM
    in ONNX expect, all float32 and channels first:

    * `encoder.onnx`: `input_image` [height, width, 3], a picture resized to the longest side, red,
      green and blue from 0 to 255, to `image_embeddings` [1, c, g, g]. (As `samexporter` has it;
      Meta exports no encoder.) All logits of a ViT's global attention are held at once;
    * `decoder.onnx`: the inputs and outputs of Meta's `SamOnnxModel`. `image_embeddings`;
      `point_coords` [1, n, 2], in pixels of the resized picture, and `point_labels` [1, n], for any
      n (a box is two points labelled 2 and 3; a list without one ends with (0, 0) labelled -1);
      `mask_input` [1, 1, 4 g, 4 g] and `has_mask_input` [1], 1 or 0; `orig_im_size` [2], (height,
      width) of the picture. To the logits `masks` [1, m, height, width], their `iou_predictions`
      [1, m], and `low_res_masks` [1, m, 4 g, 4 g];
    * `config.json`: the model's `image_size` and `mask_threshold` besides others.

    Args:
        model: computing in float32.
        path: of the new folder, which appears whole or not at all.
        single_mask: m is 1, Meta's `return_single_mask`: the mask for unambiguous prompts if
            `point_coords` has three points or more, else the best of the candidates. Otherwise m is
            4, the one for unambiguous prompts first.

    Raises:
        FileExistsError: if there is something at `path` already.
        ValueError: if the model computes in another dtype, if it prepares pictures in another way
            than SAM, or if the package `onnx` is not installed.
    """
    check_new(path)
    if (dtype := jnp.dtype(model.mask_decoder.dtype)) != jnp.float32:
        raise ValueError(
            f"the model computes in {dtype}, but ONNX is written in float32; load it with "
            "dtype=jnp.float32"
        )
    prepared = model.config.resize, model.config.normalization
    if prepared != ("longest_side", "statistics"):
        raise ValueError(
            f"resize and normalization are {prepared}, but the encoder in ONNX normalises by mean "
            "and deviation; export for JAX instead"
        )
    try:
        from sam_jax.onnx_graph import Graph
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ValueError("onnx is not installed; install sam_jax with its extra `onnx`") from error
    # Without a loop; of those the one that took ONNX Runtime the least time and memory.
    model = _with_attention(model, lambda named, grid: "folded")
    with _appearing(path) as folder:
        _write_onnx_encoder(Graph(), model, folder / "encoder.onnx")
        _write_onnx_decoder(Graph(), model, folder / "decoder.onnx", single_mask)
        _write_config(folder, model, single_mask=single_mask)


@contextlib.contextmanager
def _appearing(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write to, which takes its place if nothing is raised."""
    path = Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        check_new(path)
        folder.rename(path)


def _write_config(folder: Path, model: Sam, **more: Any) -> None:
    names = (
        *("image_size", "mask_size", "mask_threshold"),
        *("resize", "normalization", "pixel_mean", "pixel_std"),
    )
    values = {name: getattr(model.config, name) for name in names}
    values["dtype"] = str(jnp.dtype(model.mask_decoder.dtype))
    (folder / "config.json").write_text(json.dumps(values | more, indent=2) + "\n")


def _encode(model, platform, pixel_values):
    return model.encode_image(pixel_values)


def _decode(model, platform, embeddings, points, labels, masks=None):
    return model.decode(embeddings, points, labels, masks, None, platform=platform)


def _by_platform(model: Sam, function: Callable, platforms: Sequence[Platform]) -> Callable:
    """`function(model, platform, *arrays)` of flat parameters and the arrays, as it is fastest."""

    def on(platform: Platform) -> Callable:
        own = _with_attention(model, lambda named, grid: named or fastest(grid, platform))
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


def _blocks(model: Sam) -> list:
    encoder = model.image_encoder
    return list(encoder.blocks) if isinstance(encoder, ImageEncoderViT) else []


def _with_attention(
    model: Sam, choose: Callable[[Implementation | None, tuple[int, int]], Implementation]
) -> Sam:
    """The model with another attention, chosen by the one that it names and the grid."""
    model = nnx.merge(*nnx.split(model))
    for block in _blocks(model):
        side = block.attn.window or model.config.image_embedding_size
        block.attn.implementation = choose(block.attn.implementation, (side, side))
    return model


def _write_onnx_encoder(graph, model: Sam, path: Path) -> None:
    config = model.config
    size, grid = config.image_size, config.image_embedding_size
    picture = graph.input("input_image", ("height", "width", 3))
    mean, std = (np.array(v, np.float32) for v in (config.pixel_mean, config.pixel_std))
    normalised = graph.node("Div", graph.node("Sub", picture, mean), std)
    missing = graph.node("Sub", np.array([size, size, 3]), graph.node("Shape", picture))
    # Not negative, which would crop: a picture that is too large then fails to be reshaped.
    missing = graph.node("Max", missing, np.array(0))
    pads = graph.node("Concat", np.zeros(3, np.int64), missing, axis=0)
    padded = graph.node("Pad", normalised, pads, np.array(0, np.float32))
    pixels = graph.node("Reshape", padded, np.array([1, size, size, 3]))
    (embedding,) = graph.call(
        lambda pixels: (jnp.moveaxis(model.encode_image(pixels), -1, 1),),
        (pixels, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)),
    )
    shape = (1, config.image_embedding_channels, grid, grid)
    graph.save(path, {"image_embeddings": (embedding, shape)})


def _write_onnx_decoder(graph, model: Sam, path: Path, single_mask: bool) -> None:
    config = model.config
    grid, side = config.image_embedding_size, config.mask_size
    n = jax.export.symbolic_shape("num_points")[0]
    shapes = {
        "image_embeddings": (1, config.image_embedding_channels, grid, grid),
        "point_coords": (1, n, 2),
        "point_labels": (1, n),
        "mask_input": (1, 1, side, side),
        "has_mask_input": (1,),
    }
    for name, shape in shapes.items():
        graph.input(name, [size if isinstance(size, int) else str(size) for size in shape])
    original_size = graph.input("orig_im_size", (2,))

    def decode(embedding, points, labels, mask, has_mask):
        encoder = model.prompt_encoder
        sparse, real = encoder(points.squeeze(0), labels.squeeze(0).astype(jnp.int32))
        with_mask, without = encoder.embed_mask(mask[0, 0]), encoder.embed_mask(None)
        image = jnp.moveaxis(embedding[0], 0, -1)
        image_embedding, hq_features = model.mask_decoder.image_features(image)
        masks, scores = model.mask_decoder(
            image_embedding,
            encoder.get_dense_pe(),
            sparse,
            real,
            has_mask * with_mask + (1 - has_mask) * without,
            None,
            hq_features=hq_features,
        )
        return masks[None], scores[None]

    inputs = ((k, jax.ShapeDtypeStruct(shape, jnp.float32)) for k, shape in shapes.items())
    masks, scores = graph.call(decode, *inputs)
    count = config.mask_decoder.num_multimask_outputs + 1
    if single_mask:
        masks, scores = _select_mask(graph, masks, scores, count)
        count = 1
    full = _to_original_size(graph, masks, count, original_size, config.image_size)
    outputs = {
        "masks": (full, (1, count, "height", "width")),
        "iou_predictions": (scores, (1, count)),
        "low_res_masks": (masks, (1, count, side, side)),
    }
    graph.save(path, outputs)


def _select_mask(graph, masks: str, scores: str, count: int) -> tuple[str, str]:
    """Meta's `select_masks`: the first from three points on, else the best of the others."""
    points = graph.cast(graph.node("Shape", "point_coords", start=1, end=2), np.float32)
    many = graph.node("Sub", points, np.array([2.5], np.float32))
    first = np.array([[1000] + [0] * (count - 1)], np.float32)
    weighted = graph.node("Add", scores, graph.node("Mul", many, first))
    best = graph.node("ArgMax", weighted, axis=1, keepdims=0)
    return graph.node("Gather", masks, best, axis=1), graph.node("Gather", scores, best, axis=1)


def _to_original_size(graph, masks: str, count: int, original_size: str, image_size: int) -> str:
    """Meta's `mask_postprocessing`: to the padded picture, cropped, to the picture."""

    def resize(x, sizes):
        return graph.node(
            "Resize",
            *(x, "", "", sizes),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )

    padded = resize(masks, np.array([1, count, image_size, image_size]))
    longest = graph.node("ReduceMax", original_size, keepdims=0)
    scale = graph.node("Div", np.array(image_size, np.float32), longest)
    scaled = graph.node("Add", graph.node("Mul", scale, original_size), np.array(0.5, np.float32))
    height_width = graph.cast(graph.node("Floor", scaled), np.int64)
    cropped = graph.node("Slice", padded, np.array([0, 0]), height_width, np.array([2, 3]))
    sizes = graph.cast(original_size, np.int64)
    return resize(cropped, graph.node("Concat", np.array([1, count]), sizes, axis=0))
