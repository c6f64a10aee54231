"""Exports a model to ONNX."""

import os
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from sam_jax.errors import needs_extra
from sam_jax.export.common import with_attention, write_config
from sam_jax.files import atomic_dir, require_absent
from sam_jax.models.sam import Sam
from sam_jax.validation import check_model


def export_onnx(model: Sam, path: str | os.PathLike, *, single_mask: bool = False) -> None:
    """Writes a folder with the encoder and the decoder in ONNX, which need only ONNX Runtime.

    `examples/load_onnx.py` shows how to use them. Names and shapes are those that programs for SAM
    in ONNX expect, all float32 and channels first:

    * `encoder.onnx`: `input_image` [height, width, 3], an image resized to the longest side, red,
      green and blue from 0 to 255, to `image_embeddings` [1, c, g, g]. (As in `samexporter`; Meta
      does not export the encoder.) All logits of a ViT's global attention are in memory at once;
    * `decoder.onnx`: the inputs and outputs of Meta's `SamOnnxModel`. Inputs: `image_embeddings`;
      `point_coords` [1, n, 2], in pixels of the resized image, and `point_labels` [1, n], for any
      n (a box is two points labeled 2 and 3; a list without a box ends with (0, 0) labeled -1);
      `mask_input` [1, 1, 4 g, 4 g] and `has_mask_input` [1], 1 or 0; `orig_im_size` [2], (height,
      width) of the image. Outputs: the logits `masks` [1, m, height, width], their
      `iou_predictions` [1, m], and `low_res_masks` [1, m, 4 g, 4 g];
    * `config.json`: the model's `image_size`, `mask_threshold` and other settings.

    Args:
        model: a model that computes in float32.
        path: the folder to create, atomically.
        single_mask: True for one mask, as Meta's `return_single_mask`: the one for unambiguous
            prompts if `point_coords` has at least three points, else the best candidate. False for
            m = 4, with the mask for unambiguous prompts first.

    Raises:
        FileExistsError: if the path exists already.
        ValueError: if the model computes in another dtype, or its preprocessing is not SAM's.
        MissingExtra: without the extra `onnx`.
    """
    check_model(model)
    require_absent(path)
    preprocessing = model.config.resize, model.config.normalization
    if preprocessing != ("longest_side", "statistics"):
        raise ValueError(
            f"resize and normalization are {preprocessing}, but the ONNX encoder normalizes by "
            "mean and standard deviation; export for JAX instead"
        )
    with needs_extra("onnx"):
        from sam_jax.export.onnx_graph import Graph
    # The implementation without a loop that takes ONNX Runtime the least memory.
    model = with_attention(model, "folded")
    with atomic_dir(path) as folder:
        _write_onnx_encoder(Graph(), model, folder / "encoder.onnx")
        _write_onnx_decoder(Graph(), model, folder / "decoder.onnx", single_mask)
        write_config(folder, model, single_mask=single_mask)


def _write_onnx_encoder(graph, model: Sam, path: Path) -> None:
    config = model.config
    size, grid = config.image_size, config.image_embedding_size
    image = graph.input("input_image", ("height", "width", 3))
    mean, std = (np.array(v, np.float32) for v in (config.pixel_mean, config.pixel_std))
    normalized = graph.node("Div", graph.node("Sub", image, mean), std)
    missing = graph.node("Sub", np.array([size, size, 3]), graph.node("Shape", image))
    # Not negative, which would crop: for an image that is too large, the reshape below then fails.
    missing = graph.node("Max", missing, np.array(0))
    pads = graph.node("Concat", np.zeros(3, np.int64), missing, axis=0)
    padded = graph.node("Pad", normalized, pads, np.array(0, np.float32))
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
            multimask_output=None,
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
    """Meta's `select_masks`: the first mask for three or more points, else the best other one."""
    points = graph.cast(graph.node("Shape", "point_coords", start=1, end=2), np.float32)
    many = graph.node("Sub", points, np.array([2.5], np.float32))
    first = np.array([[1000] + [0] * (count - 1)], np.float32)
    weighted = graph.node("Add", scores, graph.node("Mul", many, first))
    best = graph.node("ArgMax", weighted, axis=1, keepdims=0)
    return graph.node("Gather", masks, best, axis=1), graph.node("Gather", scores, best, axis=1)


def _to_original_size(graph, masks: str, count: int, original_size: str, image_size: int) -> str:
    """Meta's `mask_postprocessing`: resizes to the padded image, crops, resizes to the image."""

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
