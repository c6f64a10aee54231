"""Prompts as one padded list of labelled points: pure functions on numpy or JAX arrays alike.

The functions use the array's own namespace, so that prompts that come from a picture stay in numpy
until the one compiled call, and traced prompts stay traced.
"""

import reprlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

# Labels of points; see models/prompt_encoder.py for what each becomes.
BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 0, 1, 2, 3
NOT_A_POINT, PADDING = -1, -10
LABELS = (PADDING, NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)


def join_prompts(
    points: Num[Any, "*batch n 2"] | None,
    labels: Int[Any, "*batch n"] | None,
    boxes: Num[Any, "*batch 4"] | None,
) -> tuple[Float[Any, "*batch m 2"], Int[Any, "*batch m"]]:
    """Points and boxes as one list, in the order of the reference's tokens.

    With a box: the points, then the box's two corners. Without: the points, then one that is
    (0, 0) with label -1. `points` without `labels` are foreground.

    Raises:
        TypeError: for what is no array.
        ValueError: if there are neither points nor boxes.
    """
    given = [array for array in (points, labels, boxes) if array is not None]
    if points is None and boxes is None:
        raise ValueError("there are neither points nor boxes to join")
    if wrong := [type(a).__name__ for a in given if not hasattr(a, "__array_namespace__")]:
        raise TypeError(f"prompts are given as {wrong[0]}, expected numpy or JAX arrays")
    xp = _namespace(given)
    points, labels, boxes = (
        None if array is None else xp.asarray(array) for array in (points, labels, boxes)
    )
    parts = []
    if points is not None:
        if labels is None:
            labels = xp.full(points.shape[:-1], FOREGROUND, dtype=xp.int32)
        parts.append((xp.astype(points, xp.float32), xp.astype(labels, xp.int32)))
        if boxes is None:
            last = (*points.shape[:-2], 1)
            parts.append(
                (xp.zeros((*last, 2), dtype=xp.float32), xp.full(last, NOT_A_POINT, dtype=xp.int32))
            )
    if boxes is not None:
        corners = xp.reshape(xp.astype(boxes, xp.float32), (*boxes.shape[:-1], 2, 2))
        kinds = xp.asarray([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], dtype=xp.int32)
        parts.append((corners, xp.broadcast_to(kinds, corners.shape[:-1])))
    return (
        xp.concat([p for p, _ in parts], axis=-2),
        xp.concat([label for _, label in parts], axis=-1),
    )


def check_values(
    points: Num[Any, "*batch n 2"] | None,
    labels: Num[Any, "*batch n"] | None,
    boxes: Num[Any, "*batch 4"] | None,
    where: str = "prompts",
) -> None:
    """Refuses prompts that mean nothing, on arrays that are not traced.

    Raises:
        ValueError: for coordinates that are not finite, unknown labels, and boxes inside out.
    """
    for array in (points, boxes):
        # What float32 cannot hold becomes infinite later.
        if array is None:
            continue
        array = np.asarray(array)
        fine = abs(array) < 1e30
        if not fine.all():
            rows = array[~fine.all(axis=-1)]
            raise ValueError(
                f"{where} hold numbers that are not finite or too large: {rows[0].tolist()}"
                + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
            )
    if labels is not None and (unknown := sorted(set(np.unique(labels).tolist()) - set(LABELS))):
        raise ValueError(
            f"{where} have labels {reprlib.repr(unknown)}; known are 1 (foreground), 0 "
            "(background), -1 (not a point), 2 and 3 (a box's corners) and -10 (padding)"
        )
    if boxes is not None:
        boxes = np.asarray(boxes)
        wrong = (boxes[..., 2] < boxes[..., 0]) | (boxes[..., 3] < boxes[..., 1])
        if wrong.any():
            raise ValueError(
                f"{where} hold {boxes[wrong][0].tolist()}, expected x0, y0, x1, y1 with x0 <= x1 "
                "and y0 <= y1"
            )


def _namespace(arrays: list) -> Any:
    """numpy if all arrays are numpy's, else jax.numpy."""
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
