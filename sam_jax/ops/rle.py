"""COCO run lengths of masks."""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask
from jaxtyping import Bool

from sam_jax.errors import check_mask


def rle_encode(mask: Bool[np.ndarray, "h w"]) -> dict:
    """Encodes a mask as uncompressed COCO run lengths: column by column, zeros first.

    Returns:
        `{"size": [h, w], "counts": [...]}` with Python integers.

    Raises:
        ValueError: if the mask is not bool (h, w), or has no pixels.
    """
    check_mask(mask)
    if not mask.size:
        raise ValueError(f"the mask has shape {mask.shape}, expected one with pixels")
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


def rle_decode(rle: dict) -> Bool[np.ndarray, "h w"]:
    """Decodes uncompressed run lengths; raises what `check_rle` raises."""
    check_rle(rle)
    (height, width), counts = rle["size"], rle["counts"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def check_rle(rle: dict) -> None:
    """Raises ValueError if uncompressed run lengths do not match their size."""
    (height, width), counts = rle["size"], rle["counts"]
    if isinstance(counts, str | bytes):
        raise ValueError("its run lengths are compressed; call rle_uncompress first")
    if not all(isinstance(count, numbers.Integral) for count in counts):
        raise ValueError("its run lengths do not fill the mask: expected whole numbers")
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise ValueError(
            f"its run lengths do not fill the mask: their sum is {sum(counts)} and the smallest "
            f"{min(counts, default=0)}, expected {height} x {width} and none below 0"
        )


def rle_compress(rle: dict) -> dict:
    """Compresses run lengths to pycocotools' string: `{"size": [h, w], "counts": str}`.

    Raises ValueError if the run lengths do not match their size.
    """
    check_rle(rle)
    height, width = rle["size"]
    # The stubs only allow compressed run lengths.
    compressed = pycocotools.mask.frPyObjects(rle, height, width)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return {"size": rle["size"], "counts": compressed["counts"].decode()}


def rle_uncompress(rle: Mapping[str, Any]) -> dict:
    """The inverse of `rle_compress`, also for untrusted strings.

    pycocotools would read past the end of a truncated string.

    Raises:
        ValueError: if the string is not valid, or ends within a number.
    """
    text = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
    if not isinstance(text, bytes):
        raise ValueError("its run lengths are a list, which is not compressed, expected a string")
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    (ends,) = np.nonzero(digits & 32 == 0)  # where it is set, more of the number follows
    starts = np.append(0, ends + 1)
    lengths, left = np.diff(starts), len(digits) - starts[-1]
    if ((digits < 0) | (digits >= 64)).any() or lengths.max(initial=left) > 12:
        raise ValueError(f"{text[:20]!r} is not a string of COCO's run lengths")
    if left:
        raise ValueError(f"{text[-20:]!r} ends within a number of COCO's run lengths")
    place = np.arange(len(digits)) - np.repeat(starts[:-1], lengths)
    total = np.append(0, np.cumsum((digits & 31) << (5 * place)))
    counts = np.diff(total[starts]) - np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth number on, the string has the difference from the number before the last.
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return {"size": rle["size"], "counts": counts.tolist()}


def rle_area(rle: dict) -> int:
    """The number of pixels in the mask; raises what `check_rle` raises."""
    check_rle(rle)
    return sum(rle["counts"][1::2])
