"""Brings examples into fixed shapes: resizes, augments and pads them."""

import numbers
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from sam_jax.config import SamConfig, check_config
from sam_jax.errors import check_number, check_whole
from sam_jax.image import load_image
from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.prompts import pad_axis
from sam_jax.processing import SamProcessor
from sam_jax.training.datasets import Example, LazyImage

_LARGEST_SCALE = 10  # an image is resized before it is cropped; 0.3 GB for 1024 pixels


@dataclass(frozen=True)
class ExampleTransform:
    """Brings an example into a fixed shape. The result is a dictionary:

    * `pixel_values` float32 [size, size, 3], or `image_embedding` if the example has one;
    * `masks` bool [n, target_size, target_size], covering the whole model input;
    * `boxes` float32 [n, 4], x0, y0, x1, y1 in pixels of the model's input;
    * `valid` float32 [n], 1 for objects, 0 for padding;
    * `dropped` int32 [], number of chosen objects that are left out because they are too small:
      no pixel of them is left at the model's input size, or they cover less than half of every cell
      of the target grid. Objects outside a crop do not count;
    * `index` int32 [], the example's index in its dataset, if it has one.

    Raises:
        ValueError: for invalid numbers.
    """

    config: SamConfig
    """The model's configuration."""
    max_objects: int
    """n above; if an image has more objects, n of them are chosen at random."""
    _: KW_ONLY
    target_size: int
    """Side of the masks, a divisor of the model's input size: `config.mask_size`, the size of the
    model's logits, or `config.image_size`."""
    flip: float = 0.0
    """Probability of mirroring an image."""
    scale_range: tuple[float, float] | None = None
    """Large-scale jitter: the image is scaled by a random factor in this range, relative to the
    size that fits the model (the paper's range is 0.1 to 2.0), and cropped if it is too large. At
    most 10."""

    def __post_init__(self):
        check_config(self.config)
        check_whole("max_objects", self.max_objects, 1)
        check_whole("target_size", self.target_size, 1)
        check_number("flip", self.flip)
        scales = (1, 1) if self.scale_range is None else self.scale_range
        for name, ok, expected in (
            (
                "target_size",
                self.config.image_size % self.target_size == 0,
                f"a divisor of the model's input size {self.config.image_size}",
            ),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            (
                "scale_range",
                _are_scales(scales),
                f"two numbers above 0, the smaller first, at most {_LARGEST_SCALE}",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Transforms an example, with random numbers from `rng`.

        Raises:
            KeyError: if the example has no image or no masks.
            TypeError: if the masks are not a bool array, or `load_image` rejects the image.
            ValueError: if the masks do not have the image's size, or if the image would be
                augmented but its embedding is cached.
        """
        image, masks = checked_example(example)
        chosen: Any = slice(None)
        if len(masks) > self.max_objects:
            chosen = np.sort(rng.choice(len(masks), self.max_objects, replace=False))
        masks = masks[chosen]
        if "image_embedding" in example:
            if self.augments:
                raise ValueError("an image whose embedding is cached cannot be augmented")
        elif rng.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]

        processor, size = SamProcessor(self.config), self.config.image_size
        height, width = processor.input_size(image.shape[:2])
        top = left = 0
        if self.scale_range is not None:
            scale = rng.uniform(*self.scale_range)
            height, width = (max(1, round(n * scale)) for n in (height, width))
            top, left = (int(rng.integers(max(n - size, 0) + 1)) for n in (height, width))
        window = np.s_[top : top + size, left : left + size]

        result = {}
        if "image_embedding" in example:
            result["image_embedding"] = example["image_embedding"]
        else:
            result["pixel_values"] = processor.normalize(_resize(image, (height, width))[window])
        full = [_resize(mask, (height, width)) for mask in masks]
        # A mask without pixels in the window is not too small, but cropped away.
        full = [mask[window] for mask in full if mask[window].any() or not mask.any()]
        targets = [_to_grid(mask, size, self.target_size) for mask in full]
        boxes = [mask_to_box(mask) for mask in full]
        found = [k for k, target in enumerate(targets) if target.any()]
        n, side = self.max_objects, self.target_size
        result["masks"] = _stacked([targets[k] for k in found], n, (side, side), bool)
        result["boxes"] = _stacked([boxes[k] for k in found], n, (4,), np.float32)
        result["valid"] = _stacked([np.float32(1)] * len(found), n, (), np.float32)
        result["dropped"] = np.int32(len(full) - len(found))
        if "index" in example:
            result["index"] = np.int32(example["index"])
        return result

    @property
    def augments(self) -> bool:
        """Whether images are changed at random."""
        return self.flip > 0 or self.scale_range is not None


def checked_example(example: Example) -> tuple[Any, Any]:
    """The image of an example, loaded unless it is a `LazyImage`, and its masks.

    Raises:
        KeyError: if the example has no image or no masks.
        TypeError: if the masks are not a bool array, or `load_image` rejects the image.
        ValueError: if the masks do not have the image's size.
    """
    if missing := [name for name in ("image", "masks") if name not in example]:
        raise KeyError(
            f"the example has {', '.join(map(repr, example)) or 'nothing'}, but not "
            f"{' and '.join(map(repr, missing))}"
        )
    image, masks = example["image"], example["masks"]
    if not isinstance(image, LazyImage):
        image = load_image(image)
    if not hasattr(masks, "dtype"):
        raise TypeError(f"the masks are a {type(masks).__name__}, expected an array, bool")
    if masks.dtype != bool:
        raise TypeError(
            f"the masks are {masks.dtype}, expected bool; compare them, such as masks > 0"
        )
    if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"the masks have shape {masks.shape}, expected masks of the image's size, "
            f"[n, {image.shape[0]}, {image.shape[1]}]"
        )
    return image, masks


def too_small(transform: ExampleTransform) -> str:
    """Explains why objects are dropped, and what to do."""
    cell = transform.config.image_size // transform.target_size
    remedy = "cut the images into crops, or enlarge them at random (--scale-range 1 4)"
    if cell > 1:
        remedy = f"compare masks at --full-resolution; if that is not enough, {remedy}"
    return (
        f"they fill less than half of every cell of the target grid, {cell} x {cell} pixels of the "
        f"model's input, to which an image is resized; {remedy}"
    )


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image or a mask to (h, w), as `SamProcessor` does."""
    if array.shape[:2] == size:
        return array
    is_mask = array.dtype == bool
    image = Image.fromarray(
        array.astype(np.uint8) * 255 if is_mask else np.ascontiguousarray(array)
    )
    height, width = size
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized >= 128 if is_mask else resized


def _to_grid(mask: Bool[np.ndarray, "h w"], size: int, side: int) -> Bool[np.ndarray, "side side"]:
    """Pads the mask to the model's input; a grid cell takes the majority of its pixels."""
    mask = pad_axis(pad_axis(mask, size, 0, 0), size, 1, 0)
    if side == size:
        return mask
    cell = size // side
    return mask.reshape(side, cell, side, cell).mean((1, 3)) >= 0.5


def _are_scales(scales: Any) -> bool:
    are_two = isinstance(scales, Sequence) and len(scales) == 2
    are_numbers = are_two and all(isinstance(scale, numbers.Real) for scale in scales)
    return are_numbers and 0 < scales[0] <= scales[1] <= _LARGEST_SCALE


def _stacked(arrays: list, count: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    return pad_axis(np.array(arrays, dtype).reshape(len(arrays), *shape), count, 0, 0)
