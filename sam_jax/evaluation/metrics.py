"""How masks are compared."""

import numpy as np
from jaxtyping import Bool, Float


def iou(
    masks: Bool[np.ndarray, "*n h w"], others: Bool[np.ndarray, "*n h w"]
) -> Float[np.ndarray, "*n"]:
    """IoU of masks pair by pair; 1 where both are empty."""
    intersection = (masks & others).sum((-2, -1))
    union = (masks | others).sum((-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))
