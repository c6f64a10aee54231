"""`SamProcessor`: converts images and prompts to the model's arrays, and its masks to full size.

The API is that of `transformers.SamProcessor`. It also covers Meta's `ResizeLongestSide`,
`Sam.preprocess` and `Sam.postprocess_masks`, which compute the same.
"""

import math
import os
import reprlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from sam_jax.arrays import ArrayLike, PromptsLike, as_numpy, entries, on_accelerator
from sam_jax.checkpoints import load_config
from sam_jax.config import Preprocessing, SamConfig, check_config, with_preprocessing
from sam_jax.errors import NonFiniteError, check_bool, check_number
from sam_jax.idioms import WithAdvice, unknown_attribute, with_advice
from sam_jax.image import ImageInput, image_list, load_image
from sam_jax.models.preprocessing import fit
from sam_jax.ops.prompts import (
    PADDING,
    count_bucket,
    is_numeric,
    pad_axis,
    warn_outside,
)
from sam_jax.ops.resize import area_resize_matrix, mask_resize_matrix, resize_masks, size_bucket
from sam_jax.validation import (
    box_lists,
    check_counts,
    check_sizes,
    pad_nested,
    point_lists,
    to_numbers,
)


class SamProcessor(WithAdvice):
    """Makes the arguments of `Sam.__call__` from images and prompts, and resizes its masks.

    processor = SamProcessor.from_pretrained("mobile_sam")
    inputs = processor(image, input_points=[[[450, 600]]])
    outputs = model(**inputs)
    masks = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )

    Args:
        config: the model's configuration, for its image size and preprocessing. Images are resized
            as in Meta's code, by PIL's bilinear filter, also for MedSAM (trained with a cubic
            filter) and LiteMedSAM (with OpenCV's area filter). For a photo of 600 x 400 pixels,
            values from 0 to 1 differ from those models' own by 0.006 and 0.004 on average.
    """

    def __init__(self, config: SamConfig):
        check_config(config)
        self.config = config

    @property
    def image_processor(self) -> "SamProcessor":
        """The processor itself; in `transformers`, its methods belong to another object."""
        return self

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "mobile_sam",
        *,
        preprocessing: Preprocessing | None = None,
    ) -> "SamProcessor":
        """The processor for a checkpoint; arguments and errors as for `sam_jax.from_pretrained`."""
        return cls(with_preprocessing(load_config(name_or_path), preprocessing))

    @with_advice
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        segmentation_maps: ArrayLike | None = None,
        input_points: PromptsLike | None = None,
        input_labels: PromptsLike | None = None,
        input_boxes: PromptsLike | None = None,
        return_tensors: str | None = None,
    ) -> "SamInputs":
        """Numpy arrays for `model(**inputs)`: B images, P prompts each, N points each.

        Coordinates outside an image are allowed, but cause a warning.

        Args:
            images: one image or a list of images, of any sizes: PIL images, uint8 arrays
                [h, w, 3] (RGB), [h, w], [h, w, 1] or [h, w, 4] (alpha is dropped), or paths.
            segmentation_maps: an integer map [h, w] per image, for training.
            input_points: (x, y) in pixels of the images, nested `[image][prompt][point][xy]`, or
                `[image][point][xy]` for one prompt per image. Lists may have different lengths;
                None stands for an image without points.
            input_labels: 1 foreground, 0 background, nested like the points (or `[image][point]`
                for one prompt per image); foreground if left out.
            input_boxes: (x0, y0, x1, y1) in pixels of the images, nested `[image][box][4]`; None
                for an image without boxes. With points, one box for each prompt.
            return_tensors: "np" or None; the arrays are numpy arrays in both cases.

        Returns:
            `pixel_values` float32 [B, size, size, 3], channels last; `original_sizes` and
            `reshaped_input_sizes` int64 [B, 2], (h, w); and, if given, `input_points` float32
            [B, P, N, 2], `input_labels` int32 [B, P, N], `input_boxes` float32 [B, P, 4], in pixels
            of the model's input, and `labels` int64 [B, 256, 256], at the size of low-resolution
            masks. Shorter lists of points are padded with label -10, which has no effect. Images
            with fewer prompts are padded with prompts without points (or boxes of zeros); drop
            their masks.

        Raises:
            TypeError, ValueError: for an invalid image or prompt; the message names it.
        """
        if return_tensors not in (None, "np"):
            raise ValueError(
                f"return_tensors is {return_tensors!r}, expected 'np' or nothing: the model takes "
                "numpy arrays"
            )
        arrays = [load_image(image) for image in image_list(images)]
        if not arrays:
            raise ValueError("images is an empty list, expected at least one image")
        sizes = [array.shape[:2] for array in arrays]
        result = SamInputs(
            pixel_values=np.stack([self.preprocess(array) for array in arrays]),
            original_sizes=np.array(sizes, np.int64),
            reshaped_input_sizes=np.array([self.input_size(s) for s in sizes], np.int64),
        )
        if input_labels is not None and input_points is None:
            raise ValueError("input_labels are given without input_points")
        points = None
        if input_points is not None:
            points, labels = point_lists(input_points, input_labels, len(arrays))
            for i, (size, of_image, kinds) in enumerate(zip(sizes, points, labels, strict=True)):
                if of_image:
                    every = np.concatenate(of_image), np.concatenate(kinds)
                    warn_outside(*every, None, size, f"input_points[{i}]")
            points = [
                [self.scale_coords(p, size) for p in prompts]
                for prompts, size in zip(points, sizes, strict=True)
            ]
            result["input_points"] = pad_nested(points, 0, np.float32, (2,))
            result["input_labels"] = pad_nested(labels, PADDING, np.int32, ())
        if input_boxes is not None:
            boxes = box_lists(input_boxes, len(arrays))
            if points is not None:
                check_counts(points, boxes)
            for i, (of_image, size) in enumerate(zip(boxes, sizes, strict=True)):
                warn_outside(None, None, of_image, size, f"input_boxes[{i}]")
            boxes = [
                self.scale_coords(b.reshape(-1, 2, 2), size).reshape(-1, 4)
                for b, size in zip(boxes, sizes, strict=True)
            ]
            count = max(len(b) for b in boxes)
            result["input_boxes"] = np.stack([pad_axis(b, count, 0, 0) for b in boxes])
        if segmentation_maps is not None:
            result["labels"] = self._segmentation_labels(segmentation_maps, sizes)
        return result

    def input_size(self, original_size: ArrayLike) -> tuple[int, int]:
        """(h, w) of an image of size `original_size` (h, w) after resizing for the model.

        Raises:
            ValueError: if `original_size` is not two positive integers.
        """
        (size,) = check_sizes([original_size], 1, "original_size")
        return fit(size, self.config.image_size, self.config)

    def scale_coords(
        self, coords: ArrayLike, original_size: ArrayLike
    ) -> Float[np.ndarray, "*batch 2"]:
        """Scales (x, y) from pixels of an image of size (h, w) to pixels of the model's input.

        Raises:
            TypeError, ValueError: if the coordinates are not numbers in pairs, or the size is
                invalid.
        """
        coords = to_numbers(coords, "coords")
        if coords.shape[-1:] != (2,):
            raise ValueError(f"coords have shape {coords.shape}, expected (..., 2): x and y")
        ((height, width),) = check_sizes([original_size], 1, "original_size")
        new_height, new_width = self.input_size((height, width))
        scale = np.array([new_width / width, new_height / height])
        return (coords * scale).astype(np.float32)

    def preprocess(self, image: ImageInput) -> Float[np.ndarray, "size size 3"]:
        """Resizes, normalizes, then pads with zeros at the bottom and right; float32."""
        return self.normalize(self.resize(image))

    def resize(self, image: ImageInput) -> UInt8[np.ndarray, "height width 3"]:
        """Resizes an image to its `input_size` with PIL's bilinear filter."""
        image = load_image(image)
        height, width = self.input_size(image.shape[:2])
        if (height, width) == image.shape[:2]:
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def normalize(self, image: ImageInput) -> Float[np.ndarray, "size size 3"]:
        """Normalizes a resized image, then pads it with zeros at the bottom and right.

        Raises:
            ValueError: if the image is larger than the model's input.
        """
        image = load_image(image)
        height, width = image.shape[:2]
        size = self.config.image_size
        if max(height, width) > size:
            raise ValueError(
                f"the image is {width} x {height} pixels, expected at most {size} x {size}: resize "
                "it first, or call preprocess"
            )
        if self.config.normalization == "min_max":
            mean, std = image.min(), max(np.ptp(image), 1)
        else:
            mean, std = self.config.pixel_mean, self.config.pixel_std
        mean, std = np.array(mean, np.float32), np.array(std, np.float32)
        pixels = np.zeros((size, size, 3), np.float32)
        pixels[:height, :width] = (image.astype(np.float32) - mean) / std
        return pixels

    @with_advice
    def post_process_masks(
        self,
        masks: ArrayLike,
        original_sizes: ArrayLike,
        reshaped_input_sizes: ArrayLike,
        mask_threshold: float | None = None,
        binarize: bool = True,
    ) -> list[np.ndarray]:
        """Converts low-resolution logits to masks of the images' own sizes.

        Args:
            masks: `pred_masks` [B, P, m, 256, 256], or a list of B arrays [P, m, 256, 256].
            original_sizes: (h, w) of each image, as returned by `__call__`.
            reshaped_input_sizes: (h, w) of each resized image, as returned by `__call__`.
            mask_threshold: threshold of the logits; the model's (0) if left out.
            binarize: False for float32 logits instead of booleans.

        Returns:
            Masks [P, m, h, w] for each image.

        Raises:
            TypeError: if `binarize` is not a bool.
            ValueError: for other shapes, dtypes and sizes.
            NonFiniteError: for NaN and infinity; masks on an accelerator are not checked.
        """
        masks = entries(masks, "masks")
        originals = check_sizes(original_sizes, len(masks), "original_sizes")
        inputs = check_sizes(reshaped_input_sizes, len(masks), "reshaped_input_sizes")
        expected = [self.input_size(size) for size in originals]
        if inputs != expected:
            raise ValueError(
                f"reshaped_input_sizes are {inputs}, expected {expected} for original_sizes "
                f"{originals}, as the processor returns both: (h, w) after and before resizing"
            )
        check_bool("binarize", binarize)
        threshold = self.config.mask_threshold if mask_threshold is None else mask_threshold
        check_number("mask_threshold", threshold)
        side = self.config.mask_size
        results = []
        for i, (logits, original, reshaped) in enumerate(
            zip(masks, originals, inputs, strict=True)
        ):
            if not on_accelerator(logits):
                logits = as_numpy(logits, f"masks[{i}]")
                if not is_numeric(logits.dtype, ("real floating",)):
                    raise ValueError(f"masks[{i}] are {logits.dtype}, expected logits, floats")
                if not np.isfinite(logits).all():
                    raise NonFiniteError(f"masks[{i}] has logits that are NaN or infinite")
            if logits.ndim < 3 or logits.shape[-2:] != (side, side):
                raise ValueError(
                    f"masks[{i}] has shape {logits.shape}, expected (prompts, masks, {side}, "
                    f"{side}): low-resolution logits, as the model returns them"
                )
            full = self.resize_masks(
                logits.astype(np.float32),
                original,
                input_size=reshaped,
                threshold=threshold if binarize else None,
            )
            results.append(full.reshape(*logits.shape[:-2], *original))
        return results

    def resize_masks(
        self,
        masks: Float[np.ndarray | Array, "*batch side side"],
        original_size: tuple[int, int],
        *,
        input_size: tuple[int, int],
        threshold: float | None,
        count: int | None = None,
    ) -> Bool[np.ndarray, "n h w"] | Float[np.ndarray, "n h w"]:
        """Resizes low-resolution logits to one image's size; boolean, or logits without threshold.

        If `count` is given, only the first `count` masks are computed. JAX arrays are processed on
        their device. XLA compiles once for each bucket of heights and widths, and, without `count`,
        for each power of two masks. (JAX arrays are padded to it by a small program of their own.)
        """
        side, image_size = masks.shape[-1], self.config.image_size
        rows, columns = (
            mask_resize_matrix(
                side,
                image_size,
                input_size=inp,
                original_size=orig,
                padded_size=size_bucket(orig),
            )
            for inp, orig in zip(input_size, original_size, strict=True)
        )
        if count is None:
            count = math.prod(masks.shape[:-2])
            pad = _pad_to_bucket if isinstance(masks, np.ndarray) else _pad_on_device
            masks = pad(masks)
        device = None if isinstance(masks, np.ndarray) else masks.device
        limit = None if threshold is None else np.float32(threshold)
        arrays = jax.device_put((masks, rows, columns, limit, np.int32(count)), device)
        full = _resize_first(*arrays)
        height, width = original_size
        # A copy, which is writable and does not keep the padding in memory.
        return np.array(jax.device_get(full)[:count, :height, :width])

    def mask_to_logits(self, mask: ArrayLike) -> Float[np.ndarray, "*batch 1 side side"]:
        """Converts a mask of the image's size to low-resolution logits for use as a mask prompt.

        `predictor.predict(mask_input=processor.mask_to_logits(mask))`. The mask is resized and
        padded like an image. Logits range from -20 to 20, in proportion to how much of a pixel the
        mask covers. The model's own logits are mostly 3 to 11 inside an object and -5 to -16
        outside (MobileSAM on photos), but it follows a mask prompt more closely at 20 than at 10,
        and not more closely at 30.

        Args:
            mask: [h, w], or several as [..., h, w]: booleans, integers (0 outside, 1 or 255
                inside), or probabilities, floats from 0 to 1.

        Returns:
            float32 [..., 1, 256, 256], positive inside: `mask_input` of `predict` for one mask, of
            `predict_batch` for several, and `input_masks` of the model for one per image.

        Raises:
            ValueError: for other shapes and values.
        """
        inside, array = to_numbers(mask, "mask"), as_numpy(mask, "mask")
        if inside.ndim < 2 or inside.size == 0:
            raise ValueError(f"mask has shape {inside.shape}, expected (h, w) or several of them")
        if array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[1] >= 16:
            raise ValueError(
                f"mask has shape {array.shape}, which looks like (h, w, channels), expected (h, w) "
                "or several of them; use mask[..., 0]"
            )
        whole = array.dtype.kind in "iu"
        if whole and inside.max() == 255:
            inside = inside / 255
        if not ((inside >= 0) & (inside <= 1)).all() or (whole and (inside % 1).any()):
            raise ValueError(
                f"mask has the values {reprlib.repr(np.unique(inside).tolist())}, expected "
                "booleans, 0 and 1, 0 and 255, or probabilities; for a map of labels give "
                "map == label, for logits give logits > 0; low-resolution logits need no conversion"
            )
        size, config = inside.shape[-2:], self.config
        rows, columns = (
            area_resize_matrix(config.mask_size, config.image_size, inp, orig)
            for inp, orig in zip(self.input_size(size), size, strict=True)
        )
        covered = rows @ inside @ columns.T
        return (20 * (2 * covered - 1)).astype(np.float32)[..., None, :, :]

    def _segmentation_labels(self, maps, sizes) -> Int[np.ndarray, "b side side"]:
        if not isinstance(maps, (list, tuple)):
            maps = [maps]
        if len(maps) != len(sizes):
            raise ValueError(f"there are {len(sizes)} images, but {len(maps)} segmentation_maps")
        side = self.config.mask_size
        labels = np.zeros((len(maps), side, side), np.int64)
        for i, (given, size) in enumerate(zip(maps, sizes, strict=True)):
            array = as_numpy(given, f"segmentation_maps[{i}]")
            # Maps are resized as int32.
            if array.dtype.kind in "iu" and (far := array[array != array.astype(np.int32)]).size:
                raise ValueError(
                    f"segmentation_maps[{i}] has the value {far[0]}, expected -2^31 to 2^31 - 1"
                )
            if array.shape != size or array.dtype.kind not in "iub":
                raise ValueError(
                    f"segmentation_maps[{i}] is {array.dtype} of shape {array.shape}, expected "
                    f"integers of its image's shape {size}"
                )
            height, width = fit(size, side, self.config)
            resized = Image.fromarray(array.astype(np.int32)).resize(
                (width, height), Image.Resampling.NEAREST
            )
            labels[i, :height, :width] = np.asarray(resized)
        return labels


@jax.tree_util.register_pytree_with_keys_class
class SamInputs(dict):
    """What `SamProcessor` returns: a dictionary whose entries are also attributes."""

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self[name]
        except KeyError:
            raise unknown_attribute(self, name) from None

    def tree_flatten_with_keys(self):
        """For `jax.tree`."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, values):
        """For `jax.tree`."""
        return cls(zip(names, values, strict=True))


def _pad_to_bucket(masks):
    masks = masks.reshape(-1, *masks.shape[-2:])
    return pad_axis(masks, count_bucket(len(masks)), 0, 0)


_pad_on_device = jax.jit(_pad_to_bucket)


@jax.jit
def _resize_first(masks, rows, columns, threshold, count):
    """The first `count` masks at full size, then zeros; thresholded if there is a threshold."""
    masks = masks.reshape(-1, *masks.shape[-2:])
    dtype = jnp.float32 if threshold is None else bool
    result = jnp.zeros((len(masks), len(rows), len(columns)), dtype)

    # One at a time, so that only one mask's logits are in memory at full size.
    def add(i, result):
        logits = resize_masks(masks[i], rows, columns)
        return result.at[i].set(logits if threshold is None else logits > threshold)

    return jax.lax.fori_loop(0, count, add, result)
