"""Pictures and prompts to the model's arrays, and its masks back to pictures: `SamProcessor`.

The surface is that of `transformers.SamProcessor`; what Meta's `ResizeLongestSide`,
`Sam.preprocess` and `Sam.postprocess_masks` do is here too, since it is the same.
"""

import os
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from sam_jax.checkpoints import load_config
from sam_jax.config import Preprocessing, SamConfig, with_preprocessing
from sam_jax.image import ImageInput, check_decoder, load_image
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import FOREGROUND, PADDING, check_values, count_bucket, pad_axis
from sam_jax.ops.resize import mask_resize_matrix, resize_masks, size_bucket


class SamProcessor:
    """Makes the arguments of `Sam.__call__` from pictures and prompts, and pictures of its masks.

    processor = SamProcessor.from_pretrained("mobile_sam")
    inputs = processor(image, input_points=[[[450, 600]]])
    outputs = model(**inputs)
    masks = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )

    Args:
        config: the model's, for its image size and how its pictures are prepared. They are resized
            as Meta does, by PIL's bilinear filter, also for MedSAM (trained with a cubic one) and
            LiteMedSAM (with OpenCV's area filter): of a photo of 600 x 400 pixels the values from
            0 to 1 differ from theirs by 0.006 and 0.004 on average.
    """

    def __init__(self, config: SamConfig):
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "mobile_sam",
        *,
        preprocessing: Preprocessing | None = None,
    ) -> "SamProcessor":
        """The processor for a checkpoint; arguments as of `sam_jax.from_pretrained`."""
        return cls(with_preprocessing(load_config(name_or_path), preprocessing))

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        segmentation_maps: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
    ) -> dict[str, np.ndarray]:
        """Arrays for `model(**inputs)`, all numpy; B images, P prompts each, N points each.

        Args:
            images: one picture or a list of them, of any sizes: PIL images, uint8 arrays
                [h, w, 3] (RGB), [h, w], [h, w, 1] or [h, w, 4] (alpha is dropped), or paths.
            segmentation_maps: an integer map [h, w] per picture, to train with.
            input_points: (x, y) in pixels of the pictures, nested `[image][prompt][point][xy]`, or
                `[image][point][xy]` for one prompt per image. Lists may be of different lengths.
            input_labels: 1 foreground, 0 background, nested as the points (`[image][point]` will do
                for one prompt per image); foreground if left out.
            input_boxes: (x0, y0, x1, y1) in pixels of the pictures, nested `[image][box][4]`. Given
                with points, one for each prompt.

        Returns:
            `pixel_values` float32 [B, size, size, 3], channels last; `original_sizes` and
            `reshaped_input_sizes` int64 [B, 2], (h, w); and as far as given `input_points` float32
            [B, P, N, 2], `input_labels` int32 [B, P, N], `input_boxes` float32 [B, P, 4], in pixels
            of the model's input, and `labels` int64 [B, 256, 256], as large as low-resolution
            masks. Shorter lists of points are padded with label -10, which changes nothing. Images
            with fewer prompts are padded with prompts of no points (or boxes of zeros), whose masks
            are to be dropped.

        Raises:
            TypeError, ValueError: for a picture or a prompt that cannot be used; the message says
                which and why.
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("images is an empty list, expected at least one picture")
        arrays = [load_image(image) for image in images]
        sizes = [array.shape[:2] for array in arrays]
        result = {
            "pixel_values": np.stack([self.preprocess(array) for array in arrays]),
            "original_sizes": np.array(sizes, np.int64),
            "reshaped_input_sizes": np.array([self.input_size(s) for s in sizes], np.int64),
        }
        if input_labels is not None and input_points is None:
            raise ValueError("input_labels are given without input_points")
        if input_points is not None:
            points, labels = _point_lists(input_points, input_labels, len(arrays))
            points = [
                [self.scale_coords(p, size) for p in prompts]
                for prompts, size in zip(points, sizes, strict=True)
            ]
            result["input_points"] = _pad_nested(points, 0, np.float32, (2,))
            result["input_labels"] = _pad_nested(labels, PADDING, np.int32, ())
        if input_boxes is not None:
            boxes = _box_lists(input_boxes, len(arrays))
            if input_points is not None:
                _check_counts(points, boxes)
            boxes = [
                self.scale_coords(b.reshape(-1, 2, 2), size).reshape(-1, 4)
                for b, size in zip(boxes, sizes, strict=True)
            ]
            count = max(len(b) for b in boxes)
            result["input_boxes"] = np.stack([pad_axis(b, count, 0, 0) for b in boxes])
        if segmentation_maps is not None:
            result["labels"] = self._segmentation_labels(segmentation_maps, sizes)
        return result

    def input_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of a picture of that (h, w) once it is resized to the model's image size."""
        return self._fit(original_size, self.config.image_size)

    def _fit(self, original_size: tuple[int, int], side: int) -> tuple[int, int]:
        """(h, w) of a picture of that (h, w) within a square of `side`, which it may fill."""
        if self.config.resize == "square":
            return side, side
        height, width = original_size
        scale = side / max(height, width)
        # At least a pixel, so that a hair-thin picture does not vanish.
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def scale_coords(
        self, coords: Float[np.ndarray, "*batch 2"], original_size: tuple[int, int]
    ) -> Float[np.ndarray, "*batch 2"]:
        """(x, y) in pixels of a picture of (h, w) -> in pixels of the model's input; float32."""
        (height, width), (new_height, new_width) = original_size, self.input_size(original_size)
        scale = np.array([new_width / width, new_height / height])
        return (np.asarray(coords, np.float64) * scale).astype(np.float32)

    def preprocess(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "size size 3"]:
        """Resizes, normalises, then pads with zeros at the bottom and right."""
        height, width = self.input_size(image.shape[:2])
        if (height, width) != image.shape[:2]:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            image = np.asarray(resized)
        return self.normalize(image)

    def normalize(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "size size 3"]:
        """Normalises a picture that fits the model's input, then pads it."""
        height, width = image.shape[:2]
        size = self.config.image_size
        if self.config.normalization == "min_max":
            mean, std = image.min(), max(np.ptp(image), 1)
        else:
            mean, std = self.config.pixel_mean, self.config.pixel_std
        mean, std = np.array(mean, np.float32), np.array(std, np.float32)
        pixels = np.zeros((size, size, 3), np.float32)
        pixels[:height, :width] = (image.astype(np.float32) - mean) / std
        return pixels

    def post_process_masks(
        self,
        masks: Any,
        original_sizes: Any,
        reshaped_input_sizes: Any,
        mask_threshold: float | None = None,
        binarize: bool = True,
    ) -> list[np.ndarray]:
        """Low-resolution logits to masks of the pictures' own sizes.

        Args:
            masks: `pred_masks` [B, P, m, 256, 256], or a list of B arrays [P, m, 256, 256].
            original_sizes: (h, w) of each picture, as from `__call__`.
            reshaped_input_sizes: (h, w) of each picture as the model sees it, likewise.
            mask_threshold: what a logit must exceed; the model's (0) if left out.
            binarize: False for float32 logits instead of booleans.

        Returns:
            For each image its masks [P, m, h, w].

        Raises:
            ValueError: for other shapes, and for numbers of masks and sizes that differ.
        """
        # Iterating over a JAX array would compile a slice for each shape.
        masks = masks if isinstance(masks, (list, tuple)) else np.asarray(masks)
        originals = check_sizes(original_sizes, len(masks), "original_sizes")
        inputs = check_sizes(reshaped_input_sizes, len(masks), "reshaped_input_sizes")
        if max(max(size) for size in inputs) > self.config.image_size:
            raise ValueError(
                f"reshaped_input_sizes are {inputs}, larger than the model's input of "
                f"{self.config.image_size} pixels; are they the original_sizes?"
            )
        threshold = self.config.mask_threshold if mask_threshold is None else mask_threshold
        side = self.config.mask_size
        results = []
        for i, (logits, original, reshaped) in enumerate(
            zip(masks, originals, inputs, strict=True)
        ):
            logits = np.asarray(logits, np.float32)
            if logits.ndim < 3 or logits.shape[-2:] != (side, side):
                raise ValueError(
                    f"masks[{i}] has shape {logits.shape}, expected (prompts, masks, {side}, "
                    f"{side}): low-resolution logits, as the model returns them"
                )
            flat = logits.reshape(-1, side, side)
            full = self.resize_masks(flat, original, reshaped, threshold if binarize else None)
            results.append(full.reshape(*logits.shape[:-2], *original))
        return results

    def resize_masks(
        self,
        masks: Float[np.ndarray, "n side side"],
        original_size: tuple[int, int],
        input_size: tuple[int, int],
        threshold: float | None,
        device: jax.Device | None = None,
    ) -> Bool[np.ndarray, "n h w"] | Float[np.ndarray, "n h w"]:
        """Low-resolution logits to one picture's size; above `threshold`, or the logits if None.

        Compiles once for each bucket of counts, heights and widths. Computes on `device`, or JAX's
        default.
        """
        side, image_size = masks.shape[-1], self.config.image_size
        rows, columns = (
            mask_resize_matrix(side, image_size, inp, orig, size_bucket(orig))
            for inp, orig in zip(input_size, original_size, strict=True)
        )
        padded = jax.device_put(pad_axis(masks, count_bucket(len(masks)), 0, 0), device)
        if threshold is None:
            full = _resized_logits(padded, rows, columns)
        else:
            full = _resized_masks(padded, rows, columns, np.float32(threshold))
        height, width = original_size
        # A copy, which may be written to and holds no padding in memory.
        return np.array(np.asarray(full)[: len(masks), :height, :width])

    def _segmentation_labels(self, maps, sizes) -> Int[np.ndarray, "b side side"]:
        if not isinstance(maps, (list, tuple)):
            maps = [maps]
        if len(maps) != len(sizes):
            raise ValueError(f"there are {len(sizes)} images, but {len(maps)} segmentation_maps")
        for given in maps:
            if isinstance(given, Image.Image):
                check_decoder(given)
        side = self.config.mask_size
        labels = np.zeros((len(maps), side, side), np.int64)
        for i, (given, size) in enumerate(zip(maps, sizes, strict=True)):
            array = np.asarray(given)
            # They are resized as int32.
            if array.dtype.kind in "iu" and (far := array[array != array.astype(np.int32)]).size:
                raise ValueError(
                    f"segmentation_maps[{i}] holds {far[0]}, expected -2^31 to 2^31 - 1"
                )
            if array.shape != size or array.dtype.kind not in "iub":
                raise ValueError(
                    f"segmentation_maps[{i}] is {array.dtype} of shape {array.shape}, expected "
                    f"integers of its picture's shape {size}"
                )
            height, width = self._fit(size, side)
            resized = Image.fromarray(array.astype(np.int32)).resize(
                (width, height), Image.Resampling.NEAREST
            )
            labels[i, :height, :width] = np.asarray(resized)
        return labels


@jax.jit
def _resized_masks(masks, rows, columns, threshold):
    # One at a time, so that only one mask's logits are ever alive at full size.
    return jax.lax.map(lambda mask: resize_masks(mask, rows, columns) > threshold, masks)


@jax.jit
def _resized_logits(masks, rows, columns):
    return resize_masks(masks, rows, columns)


def check_points(coords: Any, labels: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One prompt's points [n, 2] and labels [n] as float64 and int32.

    Raises:
        ValueError: for shapes that do not fit, coordinates that are not finite, unknown labels.
    """
    coords = to_numbers(coords, where)
    if coords.size == 0:
        coords = coords.reshape(0, 2)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(
            f"{where} have shape {coords.shape}, expected (n, 2): x and y of each point"
        )
    if labels is None:
        labels = np.full(len(coords), FOREGROUND)
    labels = to_numbers(labels, f"the labels of {where}")
    if labels.shape != coords.shape[:1]:
        raise ValueError(
            f"{where} are {len(coords)} points, but their labels have shape {labels.shape}; "
            "expected one label per point"
        )
    check_values(coords, labels, None, where)
    return coords, labels.astype(np.int32)


def check_boxes(boxes: Any, where: str) -> np.ndarray:
    """Boxes [n, 4] as float64.

    Raises:
        ValueError: for another shape, coordinates that are not finite, and boxes inside out.
    """
    boxes = to_numbers(boxes, where)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"{where} have shape {boxes.shape}, expected (n, 4): x0, y0, x1, y1 of each box"
        )
    check_values(None, None, boxes, where)
    return boxes


def check_model(model: Any) -> None:
    """Raises TypeError for what is no model, a checkpoint's name for one."""
    if not isinstance(model, Sam):
        raise TypeError(
            f"the model is {reprlib.repr(model)}, expected a Sam, as from_pretrained gives"
        )


def check_sizes(sizes: Any, images: int, where: str) -> list[tuple[int, int]]:
    """(h, w) of each picture.

    Raises:
        ValueError: for another number of sizes, and for what is no positive integer.
    """
    array = to_numbers(sizes, where)
    whole = np.isfinite(array).all() and (array >= 1).all() and not (array % 1).any()
    if array.shape != (images, 2) or not whole:
        raise ValueError(
            f"{where} are {reprlib.repr(array.tolist())}, expected one positive (h, w) per image, "
            f"{images} in all"
        )
    return [(int(height), int(width)) for height, width in array]


def check_embedding(embedding: Any, config: SamConfig) -> Float[np.ndarray, "g g c"]:
    """An image embedding [1, c, g, g] as saved, float32 with its channels last.

    Raises:
        ValueError: for another shape, and for numbers that are not finite.
    """
    grid = config.image_embedding_size
    expected = (1, config.image_embedding_channels, grid, grid)
    if np.shape(embedding) != expected:
        raise ValueError(f"the embedding has shape {np.shape(embedding)}, expected {expected}")
    embedding = np.asarray(embedding, np.float32)
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds numbers that are not finite")
    return np.moveaxis(embedding[0], 0, -1)


def to_numbers(values: Any, where: str) -> np.ndarray:
    """Numbers in lists of equal lengths, or in an array, as float64.

    Raises:
        ValueError: for anything else.
    """
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex numbers")
        return np.asarray(values, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where} are {reprlib.repr(values)}, expected numbers in lists of equal lengths"
        ) from error


def _point_lists(points, labels, images: int) -> tuple[list, list]:
    """Nested points and labels, checked: for each image its prompts' coordinates and labels."""
    points = _per_image("input_points", points, images, "[image][prompt][point][xy]")
    if labels is None:
        labels = [None] * images
    else:
        labels = _per_image("input_labels", labels, images, "[image][prompt][point]")
    all_points, all_labels = [], []
    nested = max(map(_depth, points)) > 2
    for i, (prompts, kinds) in enumerate(zip(points, labels, strict=True)):
        where = f"input_points[{i}]"
        # One prompt: [point][xy]. A list of empty lists are prompts without points, and an empty
        # one among nested ones is no prompt.
        one = not nested
        if len(prompts):
            one = _depth(prompts) <= 2 and any(map(np.size, prompts))
        if one:
            prompts = [prompts]
        if kinds is None:
            kinds = [None] * len(prompts)
        elif _depth(kinds) <= 1 and (one or len(kinds)):  # likewise: [point]
            kinds = [kinds]
        if len(kinds) != len(prompts):
            raise ValueError(
                f"{where} are {len(prompts)} prompts, but input_labels[{i}] are of {len(kinds)}"
            )
        checked = [
            check_points(p, k, f"{where}[{j}]")
            for j, (p, k) in enumerate(zip(prompts, kinds, strict=True))
        ]
        all_points.append([p for p, _ in checked])
        all_labels.append([k for _, k in checked])
    return all_points, all_labels


def _box_lists(boxes, images: int) -> list[np.ndarray]:
    """Nested boxes, checked: for each image its boxes [n, 4]."""
    boxes = _per_image("input_boxes", boxes, images, "[image][box][4]")
    lists = [check_boxes(b, f"input_boxes[{i}]") for i, b in enumerate(boxes)]
    if not any(map(len, lists)):
        raise ValueError("input_boxes hold no box; leave them out if there is none")
    return lists


def _check_counts(points: list, boxes: list) -> None:
    for i, (prompts, rows) in enumerate(zip(points, boxes, strict=True)):
        if len(prompts) != len(rows):
            raise ValueError(
                f"input_points[{i}] are {len(prompts)} prompts, but there are {len(rows)} boxes in "
                f"input_boxes[{i}]; expected one for each prompt"
            )


def _per_image(name: str, values, images: int, nesting: str) -> list:
    if not isinstance(values, (list, tuple)):
        values = np.asarray(values)
    if _depth(values) < 1 or len(values) != images:
        raise ValueError(
            f"{name} are for {len(values) if _depth(values) else 'no'} images, but there are "
            f"{images}; expected them nested {nesting}"
        )
    return list(values)


def _depth(values) -> int:
    """How deep lists or arrays are nested, where they are deepest."""
    if isinstance(values, np.ndarray) or hasattr(values, "ndim"):
        return values.ndim
    if not isinstance(values, (list, tuple)):
        return 0
    return 1 + max((_depth(v) for v in values), default=0)


def _pad_nested(lists: list[list[np.ndarray]], value, dtype, shape) -> np.ndarray:
    """Per image a list of arrays [n, *shape] -> one array [images, prompts, points, *shape]."""
    prompts = max(len(p) for p in lists)
    points = max((len(a) for p in lists for a in p), default=0)
    result = np.full((len(lists), prompts, points, *shape), value, dtype)
    for i, arrays in enumerate(lists):
        for j, array in enumerate(arrays):
            result[i, j, : len(array)] = array
    return result
