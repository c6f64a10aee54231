"""Prompts as one padded list of labeled points: pure functions on numpy or JAX arrays.

The functions use the array's own namespace, so users' prompts stay numpy arrays until the compiled
call, and traced prompts stay traced.
"""

import reprlib
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from sam_jax.arrays import AnyArray, as_array

# Labels of points; models/prompt_encoder.py has their embeddings.
BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3
NOT_A_POINT, PADDING = -1, -10

MASK_HINT = "SamProcessor.mask_to_logits(mask) converts a mask of the image's size"

_PACKAGE = str(Path(__file__).parents[1])


def join_prompts(
    points: Num[AnyArray, "*batch n 2"] | None,
    labels: Int[AnyArray, "*batch n"] | None,
    boxes: Num[AnyArray, "*batch 4"] | None,
) -> tuple[Float[np.ndarray | Array, "*batch m 2"], Int[np.ndarray | Array, "*batch m"]]:
    """Joins points and boxes to one list of labeled points, in the order of the reference's tokens.

    With a box: the points, then the box's two corners. Without a box: the points, then (0, 0) with
    label -1. `points` without `labels` are foreground. The labels:

    * 1: a point on the object;
    * 0: a point off the object;
    * 2 and 3: a box's top-left and bottom-right corner;
    * -1: not a point; ends a list without a box;
    * -10: padding, without effect.

    Raises:
        TypeError: if something is not an array of numbers, and labels of integers.
        ValueError: if there are neither points nor boxes, or shapes do not fit.
    """
    if points is None and boxes is None:
        raise ValueError("there are neither points nor boxes to join")
    arrays = [
        None if array is None else as_array(array, "prompts") for array in (points, labels, boxes)
    ]
    _check_joinable(*arrays)
    xp = _namespace([array for array in arrays if array is not None])
    # An explicit transfer, which `jax.transfer_guard` allows, in contrast to jnp.full's.
    put: Any = np.asarray if xp is np else jax.device_put
    coords, kinds, corners = (None if array is None else put(array) for array in arrays)

    def fill(value, shape):
        return xp.broadcast_to(put(value), shape)

    parts = []
    if coords is not None:
        if kinds is None:
            kinds = fill(np.int32(FOREGROUND), coords.shape[:-1])
        parts.append((xp.astype(coords, xp.float32), xp.astype(kinds, xp.int32)))
        if corners is None:
            last = (*coords.shape[:-2], 1)
            parts.append((fill(np.float32(0), (*last, 2)), fill(np.int32(NOT_A_POINT), last)))
    if corners is not None:
        corners = xp.reshape(xp.astype(corners, xp.float32), (*corners.shape[:-1], 2, 2))
        kinds = np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)
        parts.append((corners, fill(kinds, corners.shape[:-1])))
    return (
        xp.concat([p for p, _ in parts], axis=-2),
        xp.concat([label for _, label in parts], axis=-1),
    )


def _check_joinable(points, labels, boxes) -> None:
    """Checks the dtypes and shapes of points, labels and boxes; None is not given."""
    for name, array in (("points", points), ("labels", labels), ("boxes", boxes)):
        kinds = ("integral",) if name == "labels" else ("real floating", "integral")
        if array is not None and not is_numeric(array.dtype, kinds):
            what = "integers" if name == "labels" else "numbers"
            raise TypeError(f"{name} are {array.dtype}, expected {what}")
    points, labels, boxes = (None if x is None else x.shape for x in (points, labels, boxes))
    given = f"points, labels and boxes have shapes {points}, {labels} and {boxes}"
    if points is not None and (len(points) < 2 or points[-1] != 2):
        raise ValueError(f"{given}, expected points (..., n, 2): x and y")
    if labels is not None and (points is None or labels != points[:-1]):
        raise ValueError(f"{given}, expected one label for each point")
    if boxes is not None and (not boxes or boxes[-1] != 4):
        raise ValueError(f"{given}, expected boxes (..., 4): x0, y0, x1, y1")
    if points is not None and boxes is not None and points[:-2] != boxes[:-1]:
        raise ValueError(f"{given}, expected one box for the points of each prompt")


def is_numeric(
    dtype: np.dtype, kinds: tuple[str, ...] = ("bool", "real floating", "integral")
) -> bool:
    """Whether a dtype of numpy or JAX is one of these kinds of numbers, not text or objects."""
    return dtype.kind not in "OSU" and jnp.isdtype(dtype, kinds)


def check_values(
    points: Num[Any, "*batch n 2"] | None,
    labels: Num[Any, "*batch n"] | None,
    boxes: Num[Any, "*batch 4"] | None,
    where: str = "prompts",
) -> None:
    """Checks the values of prompts in numpy arrays.

    Raises:
        ValueError: for coordinates that are not finite, unknown labels, or boxes with x0 > x1 or
            y0 > y1.
    """
    for array in (points, boxes):
        # Values out of float32's range would become infinite later.
        if array is None:
            continue
        fine = abs(array.astype(np.float64)) < 1e30
        if not fine.all():
            rows = array[~fine.all(axis=-1)]
            raise ValueError(
                f"{where} have numbers that are not finite or too large: {rows[0].tolist()}"
                + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
            )
    known = {PADDING, NOT_A_POINT, BACKGROUND, FOREGROUND}
    if labels is not None and (unknown := sorted(set(np.unique(labels).tolist()) - known)):
        hint = "give each object its own prompt"
        if {BOX_TOP_LEFT, BOX_BOTTOM_RIGHT} & set(unknown):
            hint = "if they are a box's corners, give the box as a box (box, boxes, input_boxes); "
            hint += "if they number objects, give each object its own prompt"
        raise ValueError(
            f"{where} have labels {reprlib.repr(unknown)}; known are 1 (foreground), 0 "
            f"(background), -1 (not a point) and -10 (padding); {hint}"
        )
    if boxes is not None:
        wrong = (boxes[..., 2] < boxes[..., 0]) | (boxes[..., 3] < boxes[..., 1])
        if wrong.any():
            raise ValueError(
                f"{where} have {boxes[wrong][0].tolist()}, expected x0, y0, x1, y1 with x0 <= x1 "
                "and y0 <= y1; if they are x, y, width, height, add x and y to the last two"
            )


def warn_outside(
    points: Num[Any, "*batch n 2"] | None,
    labels: Num[Any, "*batch n"] | None,
    boxes: Num[Any, "*batch 4"] | None,
    size: tuple[int, int],
    where: str,
    frame: str = "image",
) -> None:
    """Warns of valid coordinates in numpy arrays that are probably mistakes.

    They are more than a pixel outside the image, or all of them are fractions of its size, or they
    belong to a point with label -1, which stands for no point.

    Args:
        points: x and y.
        labels: the points' labels; None for foreground.
        boxes: x0, y0, x1, y1.
        size: (h, w) of the frame.
        where: name of the coordinates in messages.
        frame: name of the frame of the coordinates.
    """
    height, width = size
    parts = []
    if points is not None and labels is not None:
        if ((labels == NOT_A_POINT) & (points != 0).any(-1)).any():
            _warn(f"{where} have label -1, which is not a point; 0 is background")
        points = points[labels >= 0]
    for array in (points, boxes):
        if array is not None:
            parts.append(np.reshape(array, (-1, 2)))
    coords = np.concatenate(parts) if parts else np.zeros((0, 2))
    outside = ((coords < -1) | (coords > (width + 1, height + 1))).any(1)
    pixels = f"x and y in pixels of the {frame}, of width {width} and height {height}"
    if outside.any():
        x, y = coords[outside][0].tolist()
        more = f" and {outside.sum() - 1} more" if outside.sum() > 1 else ""
        swapped = "; are they y, x?" if (coords[:, ::-1] <= (width, height)).all() else ""
        _warn(f"{where} have ({x:g}, {y:g}){more}, outside; expected {pixels}{swapped}")
    fractions = (coords >= 0) & (coords <= 1)
    if len(coords) and fractions.all() and (coords % 1).any() and min(size) > 16:
        x, y = coords[0].tolist()
        _warn(f"{where} have ({x:g}, {y:g}): are they fractions? Expected {pixels}")


def _warn(message: str) -> None:
    """Warns at the line outside the package that calls it."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, "<")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def check_logits(masks: Any, where: str) -> None:
    """Checks that masks are logits.

    Always checks the dtype. Checks values of numpy arrays, and of JAX arrays up to one MiB (four of
    SAM's masks), since larger ones should not be fetched from a device.

    Raises:
        TypeError: for complex numbers and values that are not numbers.
        ValueError: for binary masks, and numbers that are not finite.
    """
    if not is_numeric(masks.dtype):
        raise TypeError(f"{where} are {masks.dtype}, expected floats; {MASK_HINT}")
    values = np.zeros(0)
    traced = isinstance(masks, Tracer)
    if isinstance(masks, np.ndarray) or (not traced and masks.nbytes <= 2**20):
        values = jax.device_get(masks)
    top = values.max(initial=0)
    if masks.dtype.kind in "biu" or (top in (1, 255) and ((values == 0) | (values == top)).all()):
        raise ValueError(
            f"{where} ({masks.dtype}) looks like a binary mask, expected low-resolution logits as "
            f"from an earlier prediction; {MASK_HINT}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{where} has logits that are not finite")


def check_joined(
    points: Num[np.ndarray, "*b n 2"] | None, labels: Int[np.ndarray, "*b n"] | None
) -> None:
    """Checks that lists of labeled points are as `join_prompts` makes them; None is not checked.

    Raises:
        ValueError: for coordinates that are not finite, unknown labels, one corner of a box without
            the other, boxes with x0 > x1 or y0 > y1, and lists of points that do not end with a box
            or a point labeled -1, as in SAM's training.
    """
    check_values(points, None, None, "points")
    if labels is None:
        return
    labels = labels.astype(np.int64)  # unsigned labels cannot be compared with -10
    first, second = labels == BOX_TOP_LEFT, labels == BOX_BOTTOM_RIGHT
    check_values(None, np.where(first | second, PADDING, labels), None, "labels")
    if (first.sum(-1) != second.sum(-1)).any():
        raise ValueError(
            "labels have one corner of a box (2 or 3) without the other; join_prompts(points, "
            "labels, boxes) of sam_jax makes both"
        )
    if points is not None:
        check_values(None, None, np.concatenate([points[first], points[second]], -1), "points")
    inside = np.isin(labels, (BACKGROUND, FOREGROUND)).any(-1)
    ends = np.isin(labels, (NOT_A_POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)).any(-1)
    if (inside & ~ends).any():
        raise ValueError(
            "the points of a prompt lack the end that SAM expects: a point labeled -1, or a box's "
            "corners; make them with sam_jax.join_prompts(points, labels, boxes)"
        )


def concrete(array: Any) -> np.ndarray | None:
    """The array's values, or None if the array is None or traced."""
    if array is None or isinstance(array, Tracer):
        return None
    return jax.device_get(array)


def _namespace(arrays: list) -> Any:
    """numpy if all arrays are numpy arrays, else jax.numpy."""
    namespaces = [array.__array_namespace__() for array in arrays]
    return next((xp for xp in namespaces if xp.__name__ != "numpy"), namespaces[0])


def pad_axis(array, size: int, axis: int, value: int | float):
    """The array with `value` appended along `axis` until it has `size` entries."""
    missing = size - array.shape[axis]
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return array.__array_namespace__().pad(array, widths, constant_values=value)


def count_bucket(count: int) -> int:
    """The smallest power of two that is at least `count`: 1, 2, 4, 8, ..."""
    return 1 << max(count - 1, 0).bit_length()


def pad_prompts(
    points: Float[Any, "b p n 2"],
    labels: Int[Any, "b p n"],
    masks: Float[Any, "b m side side"] | None,
) -> tuple[Any, Any, Any]:
    """Pads prompts to the next power of two in number (axis 1) and in length (axis 2).

    Padding points have label -10 and no effect. Drop the results of padding prompts.
    """
    length = count_bucket(points.shape[2])
    count = count_bucket(points.shape[1])
    points = pad_axis(pad_axis(points, length, 2, 0), count, 1, 0)
    labels = pad_axis(pad_axis(labels, length, 2, PADDING), count, 1, PADDING)
    if masks is not None and masks.shape[1] > 1:
        masks = pad_axis(masks, count, 1, 0)
    return points, labels, masks
