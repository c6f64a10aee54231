"""`pipeline("mask-generation")`: everything mode with the API of `transformers`."""

import os
import re
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from PIL import Image

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.checkpoints import from_pretrained
from sam_jax.errors import check_number
from sam_jax.idioms import ADVICE, WithAdvice
from sam_jax.image import ImageInput, exif_orientation, image_list, load_image, turn
from sam_jax.models.sam import Sam
from sam_jax.ops.rle import rle_decode

# Hugging Face's name -> names of the generator's arguments.
_ARGUMENTS = {
    "points_per_batch": ("points_per_batch",),
    "points_per_crop": ("points_per_side",),
    "pred_iou_thresh": ("pred_iou_thresh",),
    "stability_score_thresh": ("stability_score_thresh",),
    "stability_score_offset": ("stability_score_offset",),
    "crops_n_layers": ("crop_n_layers",),
    "crops_nms_thresh": ("box_nms_thresh", "crop_nms_thresh"),
    "crop_overlap_ratio": ("crop_overlap_ratio",),
    "crop_n_points_downscale_factor": ("crop_n_points_downscale_factor",),
}

_OUTPUTS = ("output_rle_mask", "output_bboxes_mask")


def pipeline(
    task: str = "mask-generation", model: Sam | str | os.PathLike = "mobile_sam", **options: Any
) -> "MaskGenerationPipeline":
    """A pipeline that finds the masks of everything in an image.

    The masks are those of `SamAutomaticMaskGenerator`, which follows Meta. Without crops, Hugging
    Face's pipeline finds the same masks. It differs from sam_jax's as follows:

    * with crops it suppresses duplicates once, by predicted IoU; Meta suppresses them within each
      crop and then between crops, where the smaller crop wins;
    * a mask's stability must exceed the threshold; in Meta's code it may equal it;
    * it fails if no mask survives; sam_jax returns empty lists;
    * its scores and boxes are PyTorch tensors; in sam_jax they are numpy arrays;
    * it also accepts URLs, base64 images and generators; in sam_jax a list or a tuple is a list of
      images, and arrays are accepted too;
    * its calls also take `batch_size`, `num_workers`, `timeout`, and SAM 2's `max_hole_area` and
      `max_sprinkle_area`, which are unknown options in sam_jax;
    * its constructor also takes `device`, `dtype`, `image_processor` and more; in sam_jax, load
      the model with these settings instead.

    Args:
        task: "mask-generation", the only task.
        model: a model, or what `from_pretrained` takes.
        options: defaults for each call; see `MaskGenerationPipeline`.

    Raises:
        ValueError: for another task or an invalid value of an option.
        TypeError: for an unknown option.
    """
    if task != "mask-generation":
        raise ValueError(f"task is {task!r}, expected 'mask-generation'")
    if not isinstance(model, Sam):
        model = from_pretrained(model)
    return MaskGenerationPipeline(model, **options)


class MaskGenerationPipeline(WithAdvice):
    """What `pipeline` returns; call it with an image or a list of images.

    Options, with the defaults of `transformers`: `points_per_batch` (64; None for all at once),
    `points_per_crop` (32, along a side), `pred_iou_thresh` (0.88), `stability_score_thresh` (0.95),
    `stability_score_offset` (1), `mask_threshold` (0), `crops_n_layers` (0), `crops_nms_thresh`
    (0.7), `crop_overlap_ratio` (512 / 1500), `crop_n_points_downscale_factor` (1),
    `output_rle_mask` (False), `output_bboxes_mask` (False). `MaskGenerationOptions` explains them.
    """

    def __init__(self, model: Sam, **options: Any):
        _generator_arguments(options)
        self.model = model
        self.options = options

    @overload
    def __call__(self, image: ImageInput, **options: Any) -> dict[str, Any]: ...
    @overload
    def __call__(self, image: Sequence[ImageInput], **options: Any) -> list[dict[str, Any]]: ...
    def __call__(
        self, image: ImageInput | Sequence[ImageInput], **options: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The masks of an image, or of each image of a list.

        Args:
            image: anything that `sam_jax.load_image` accepts, or a list of them. The EXIF
                orientation of a PIL image is applied.
            options: override those of the constructor.

        Returns:
            A dictionary of `masks`, a list of boolean arrays [h, w]; `scores`, their predicted
            IoUs, float32 [n]; with `output_rle_mask` also `rle_mask`, COCO's uncompressed run
            lengths; with `output_bboxes_mask` also `bounding_boxes`, int64 [n, 4]: x0, y0, x1, y1
            of the first and last pixels.

        Raises:
            TypeError, ValueError: for an invalid option or image.
        """
        options = {**self.options, **options}
        generator = SamAutomaticMaskGenerator(
            self.model, **_generator_arguments(options), output_mode="uncompressed_rle"
        )
        generator.mask_threshold = options.get("mask_threshold", generator.mask_threshold)
        is_list = isinstance(image, (list, tuple))
        images = map(_upright, image_list(image))
        results = [_outputs(records, options) for records in generator.generate_batch(images)]
        return results if is_list else results[0]


def _upright(image: ImageInput) -> ImageInput:
    if not isinstance(image, Image.Image):
        return image
    pixels = load_image(image)  # first, since it rejects formats that must not be decoded
    return turn(pixels, exif_orientation(image))


def _outputs(records: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    result = {
        "masks": [rle_decode(record["segmentation"]) for record in records],
        "scores": np.array([record["predicted_iou"] for record in records], np.float32),
    }
    if options.get("output_rle_mask"):
        result["rle_mask"] = [record["segmentation"] for record in records]
    if options.get("output_bboxes_mask"):
        boxes = np.array([record["bbox"] for record in records], np.int64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        result["bounding_boxes"] = boxes
    return result


def _generator_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The generator's arguments for these options; raises what `pipeline` raises."""
    known = (*_ARGUMENTS, "mask_threshold", *_OUTPUTS)
    if unknown := sorted(set(options) - set(known)):
        advice = "".join(
            f"; {n}: {ADVICE['pipeline'][n]}" for n in unknown if n in ADVICE["pipeline"]
        )
        raise TypeError(f"unknown options {', '.join(unknown)}; known: {', '.join(known)}{advice}")
    side = options.get("points_per_crop", 32)
    if side is None:  # which the generator takes to mean that point_grids are given
        raise ValueError("points_per_crop is None, expected a whole number of at least 1")
    arguments = {
        target: value for name, value in options.items() for target in _ARGUMENTS.get(name, ())
    }
    all_at_once = options.get("points_per_batch", 64) is None
    if all_at_once:
        del arguments["points_per_batch"]
    try:
        MaskGenerationOptions(**arguments)
        check_number("mask_threshold", options.get("mask_threshold", 0.0))
    except ValueError as error:
        message = str(error)
        for name, targets in _ARGUMENTS.items():
            message = re.sub(rf"\b({'|'.join(targets)})\b", name, message)
        raise ValueError(message) from None
    return {**arguments, "points_per_batch": side**2} if all_at_once else arguments
