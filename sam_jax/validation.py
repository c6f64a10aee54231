"""Checks of user input: prompts, sizes and embeddings, also as nested lists."""

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sam_jax.arrays import as_numpy, is_array
from sam_jax.config import SamConfig
from sam_jax.decoders import DecoderError
from sam_jax.models.image_encoder import check_encoder
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import (
    FOREGROUND,
    MASK_HINT,
    PADDING,
    check_logits,
    check_values,
)

_MOST_PIXELS = 2**16  # of a side: 4 GiB for a square mask


class ImagePrompts(NamedTuple):
    """Prompts of one image, in numpy arrays whose values are checked."""

    coords: Float[np.ndarray, "b n 2"] | None
    labels: Int[np.ndarray, "b n"] | None
    boxes: Float[np.ndarray, "b 4"] | None
    masks: Float[np.ndarray, "#b side side"] | None
    """Logits; one mask may be shared by all prompts."""

    @property
    def num_prompts(self) -> int:
        """The number of prompts; one if nothing is given."""
        given = (self.coords, self.boxes, self.masks)
        return next((len(array) for array in given if array is not None), 1)


def parse_prompts(
    point_coords: Any, point_labels: Any, boxes: Any, mask_input: Any, mask_size: int
) -> ImagePrompts:
    """Prompts as `SamPredictor.predict_batch` takes them; None is not given.

    Raises:
        TypeError: if an array cannot be read, or masks are not numbers.
        ValueError: for wrong shapes or values, or if the numbers of prompts differ.
    """
    if (point_coords is None) != (point_labels is None):
        given, missing = "point_coords", "point_labels"
        if point_coords is None:
            given, missing = missing, given
        raise ValueError(f"{given} are given without {missing}")
    given = {
        "point_coords": point_coords,
        "point_labels": point_labels,
        "boxes": boxes,
        "mask_input": mask_input,
    }
    # Iterating over a JAX array would compile a slice for each shape.
    given = {
        name: as_numpy(value, name) if is_array(value) else value
        for name, value in given.items()
        if value is not None
    }
    _check_same_count(given)
    coords = labels = masks = None
    if point_coords is not None:
        pairs = zip(given["point_coords"], given["point_labels"], strict=True)
        checked = [check_points(c, k, "point_coords") for c, k in pairs]
        length = max(len(c) for c, _ in checked)
        coords = np.zeros((len(checked), length, 2))
        labels = np.full((len(checked), length), PADDING, np.int32)
        for i, (c, k) in enumerate(checked):
            coords[i, : len(c)] = c
            labels[i, : len(k)] = k
    if boxes is not None:
        boxes = check_boxes(boxes, "boxes")
    if mask_input is not None:
        masks = as_numpy(mask_input, "mask_input")
        if masks.shape[1:] != (1, mask_size, mask_size):
            hint = MASK_HINT
            if masks.shape[-2:] == (mask_size, mask_size):
                hint = "choose one, such as logits[scores.argmax()][None]"
            raise ValueError(
                f"mask_input has shape {masks.shape[1:]}, expected (1, {mask_size}, {mask_size}): "
                f"low-resolution logits of an earlier prediction; {hint}"
            )
        check_logits(masks, "mask_input")
        masks = masks[:, 0].astype(np.float32)
    return ImagePrompts(coords, labels, boxes, masks)


def _check_same_count(given: dict[str, Any]) -> None:
    """Raises ValueError unless all have one entry per prompt; one mask may be for all."""
    counts = {}
    for name, value in given.items():
        if np.ndim(value) == 0 if is_array(value) else not isinstance(value, Sequence):
            raise ValueError(f"{name} is {value!r}, expected one entry for each prompt")
        counts[name] = len(value)
    if len(counts) > 1 and counts.get("mask_input") == 1:
        del counts["mask_input"]
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers of prompts differ: {counts}; expected the same number")
    if 0 in counts.values():
        raise ValueError(f"there are no prompts: {', '.join(counts)} are empty")


def check_points(coords: Any, labels: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """One prompt's points, float64 [n, 2], and labels, int32 [n].

    Raises:
        ValueError: for wrong shapes, coordinates that are not finite, or unknown labels.
    """
    coords = to_numbers(coords, where)
    if coords.size == 0:
        coords = coords.reshape(0, 2)
    if coords.ndim != 2 or coords.shape[1] != 2:
        hint = ""
        if coords.ndim == 1 and coords.size == 2:
            hint = "; one point is [[x, y]]"
        if coords.ndim == 3:
            hint = "; for several prompts use predict_batch, or input_points of the processor"
        raise ValueError(
            f"{where} have shape {coords.shape}, expected (n, 2): x and y of each point{hint}"
        )
    if labels is None:
        labels = np.full(len(coords), FOREGROUND)
    labels = to_numbers(labels, f"the labels of {where}")
    if labels.shape != coords.shape[:1]:
        raise ValueError(
            f"{where} are {len(coords)} points, but their labels have shape {labels.shape}; "
            "expected one label for each point"
        )
    check_values(coords, labels, None, where)
    return coords, labels.astype(np.int32)


def check_boxes(boxes: Any, where: str) -> np.ndarray:
    """Boxes, float64 [n, 4].

    Raises:
        ValueError: for another shape, coordinates that are not finite, or boxes with x0 > x1 or
            y0 > y1.
    """
    boxes = to_numbers(boxes, where)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        hint = "; one box is [[x0, y0, x1, y1]]" if boxes.shape == (4,) else ""
        raise ValueError(
            f"{where} have shape {boxes.shape}, expected (n, 4): x0, y0, x1, y1 of each box{hint}"
        )
    check_values(None, None, boxes, where)
    return boxes


def check_model(model: Any) -> None:
    """Raises TypeError if it is not a `Sam`, or if its image encoder lacks the encoder's API."""
    if not isinstance(model, Sam):
        raise TypeError(
            f"the model is {reprlib.repr(model)}, expected a Sam, such as from_pretrained returns"
        )
    check_encoder(model.image_encoder)


def check_sizes(sizes: Any, images: int, where: str) -> list[tuple[int, int]]:
    """The size (h, w) of each image.

    Raises:
        ValueError: for another number of sizes, or if a size is not a positive integer.
    """
    array = to_numbers(sizes, where)
    # XLA ends the process when memory for a mask is lacking.
    whole = ((array >= 1) & (array <= _MOST_PIXELS)).all() and not (array % 1).any()
    if array.shape != (images, 2) or not whole:
        raise ValueError(
            f"{where} are {reprlib.repr(array.tolist())}, expected one positive (h, w) per image, "
            f"{images} in all, each side at most {_MOST_PIXELS} pixels"
        )
    return [(int(height), int(width)) for height, width in array]


def check_embedding(embedding: Any, config: SamConfig) -> Float[np.ndarray, "g g c"]:
    """A saved image embedding [1, c, g, g] as float32 [g, g, c].

    Raises:
        ValueError: for another shape, or numbers that are not finite.
    """
    grid, channels = config.image_embedding_size, config.image_embedding_channels
    embedding = to_numbers(embedding, "the embedding").astype(np.float32)
    if embedding.shape != (1, channels, grid, grid):
        hint = ""
        if embedding.shape == (1, grid, grid, channels):
            hint = "; it is channels last, as from encode_image: use np.moveaxis(embedding, -1, 1)"
        if embedding.shape == (channels, grid, grid):
            hint = "; use embedding[None]"
        raise ValueError(
            f"the embedding has shape {embedding.shape}, expected {(1, channels, grid, grid)}{hint}"
        )
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding has numbers that are not finite")
    return np.moveaxis(embedding[0], 0, -1)


def to_numbers(values: Any, where: str) -> np.ndarray:
    """Numbers in lists of equal lengths, or in an array, as a float64 array.

    Raises:
        TypeError: if an array cannot be read; see `as_numpy`.
        ValueError: if the values are not numbers in lists of equal lengths.
    """
    hint = ""
    try:
        array = as_numpy(values, where)
        if array.dtype.kind == "O":  # numpy would make NaN of None
            hint = "; None is not a number" if None in array.flat else ""
            raise ValueError("objects")
        if array.dtype.kind in "USc":
            hint = "; convert strings with float" if array.dtype.kind in "US" else ""
            raise ValueError(array.dtype.name)
        return array.astype(np.float64)
    except DecoderError:
        raise
    except (ValueError, OverflowError) as error:
        verb = "is" if where in ("the embedding", "box", "mask", "original_size") else "are"
        raise ValueError(
            f"{where} {verb} {reprlib.repr(values)}, expected numbers in lists of equal lengths"
            f"{hint}"
        ) from error


def point_lists(points, labels, images: int) -> tuple[list, list]:
    """Checks nested points and labels; returns each image's coordinates and labels by prompt."""
    points = _per_image("input_points", points, images, "[image][prompt][point][xy]")
    points = _without_none("input_points", points)
    if labels is None:
        labels = [None] * images
    else:
        labels = _per_image("input_labels", labels, images, "[image][prompt][point]")
    all_points, all_labels = [], []
    nested = max(map(_depth, points)) > 2
    for i, (prompts, kinds) in enumerate(zip(points, labels, strict=True)):
        where = f"input_points[{i}]"
        # One prompt: [point][xy]. A list of empty lists means prompts without points; an empty
        # list among nested ones means an image without prompts.
        one = not nested
        if len(prompts):
            one = _depth(prompts) <= 2 and any(as_numpy(p, where).size for p in prompts)
        if one:
            prompts = [prompts]
        if kinds is None:
            kinds = [None] * len(prompts)
        elif _depth(kinds) <= 1 and (one or len(kinds)):  # likewise: [point]
            kinds = [kinds]
        if len(kinds) != len(prompts):
            raise ValueError(
                f"{where} are {len(prompts)} prompts, but input_labels[{i}] are for {len(kinds)}"
            )
        checked = [
            check_points(p, k, f"{where}[{j}]")
            for j, (p, k) in enumerate(zip(prompts, kinds, strict=True))
        ]
        all_points.append([p for p, _ in checked])
        all_labels.append([k for _, k in checked])
    return all_points, all_labels


def box_lists(boxes, images: int) -> list[np.ndarray]:
    """Checks nested boxes; returns each image's boxes [n, 4]."""
    boxes = _without_none(
        "input_boxes", _per_image("input_boxes", boxes, images, "[image][box][4]")
    )
    lists = [check_boxes(b, f"input_boxes[{i}]") for i, b in enumerate(boxes)]
    if not any(map(len, lists)):
        raise ValueError("input_boxes are empty; leave them out if there are no boxes")
    return lists


def check_counts(points: list, boxes: list) -> None:
    """Raises ValueError unless each image has one box for each prompt's points."""
    for i, (prompts, rows) in enumerate(zip(points, boxes, strict=True)):
        if len(prompts) != len(rows):
            raise ValueError(
                f"input_points[{i}] are {len(prompts)} prompts, but there are {len(rows)} boxes in "
                f"input_boxes[{i}]; expected one box for each prompt"
            )


def _per_image(name: str, values, images: int, nesting: str) -> list:
    if not isinstance(values, (list, tuple)):
        values = as_numpy(values, name)
    if _depth(values) < 1 or len(values) != images:
        raise ValueError(
            f"{name} are for {len(values) if _depth(values) else 'no'} images, but there are "
            f"{images}; expected them nested {nesting}"
        )
    return list(values)


def _without_none(name: str, values: list) -> list:
    """Replaces None, for an image without prompts, by an empty tuple.

    Raises:
        ValueError: if no image has prompts.
    """
    if all(value is None for value in values):
        raise ValueError(f"{name} are None for all images; leave them out")
    return [() if value is None else value for value in values]


def _depth(values) -> int:
    """The largest nesting depth of lists or arrays."""
    if isinstance(values, np.ndarray) or hasattr(values, "ndim"):
        return values.ndim
    if not isinstance(values, (list, tuple)):
        return 0
    return 1 + max((_depth(v) for v in values), default=0)


def pad_nested(lists: list[list[np.ndarray]], value, dtype, shape) -> np.ndarray:
    """Joins each image's arrays [n, *shape] into one array [images, prompts, points, *shape]."""
    prompts = max(len(p) for p in lists)
    points = max((len(a) for p in lists for a in p), default=0)
    result = np.full((len(lists), prompts, points, *shape), value, dtype)
    for i, arrays in enumerate(lists):
        for j, array in enumerate(arrays):
            result[i, j, : len(array)] = array
    return result
