"""Metrics that compare masks."""

import numpy as np
from jaxtyping import Bool, Float


def iou(
    masks: Bool[np.ndarray, "*n h w"], others: Bool[np.ndarray, "*n h w"]
) -> Float[np.ndarray, "*n"]:
    """The IoU of each pair of masks; 1 if both are empty.

    Raises:
        ValueError: if the masks are not bool, or their shapes differ.
    """
    if not masks.dtype == others.dtype == bool or masks.shape != others.shape or masks.ndim < 2:
        raise ValueError(
            f"masks are {masks.dtype} {masks.shape} and {others.dtype} {others.shape}, expected "
            "two arrays of bool of one shape (..., h, w)"
        )
    intersection = (masks & others).sum((-2, -1))
    union = (masks | others).sum((-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))
