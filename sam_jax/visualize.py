"""Draws masks, points and boxes: on matplotlib axes for notebooks, or on a PIL image."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from sam_jax.arrays import AnyArray, ArrayLike, as_numpy, is_array
from sam_jax.errors import check_mask
from sam_jax.image import ImageInput, load_image
from sam_jax.ops.prompts import BACKGROUND, FOREGROUND
from sam_jax.validation import check_boxes, check_points

__all__ = ["COLORS", "overlay", "show_box", "show_mask", "show_points"]

# Callers with axes have imported matplotlib already.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch
else:
    Axes = AxesImage = Patch = Any

COLORS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
)
"""Okabe and Ito's palette, which color-blind people can tell apart; RGB, 0 to 255."""
MARKS = {FOREGROUND: (40, 200, 80), BACKGROUND: (220, 50, 47)}
ALPHA = 0.55


def show_mask(mask: ArrayLike, ax: Axes, *, color: tuple[int, int, int] = COLORS[0]) -> AxesImage:
    """Draws a boolean mask [h, w] over the image shown by the matplotlib axes `ax`.

    Raises:
        ValueError: if the mask has another shape or dtype.
    """
    mask = _check_mask(mask, "mask")
    rgba = np.zeros((*mask.shape, 4))
    rgba[mask] = (*np.array(color) / 255, ALPHA)
    return ax.imshow(rgba)


def show_points(coords: ArrayLike, labels: ArrayLike, ax: Axes, *, size: float = 200) -> None:
    """Draws foreground points [n, 2] as green stars, background points as red ones.

    Raises:
        ValueError: if points or labels are invalid.
    """
    coords, labels = check_points(coords, labels, "coords")
    for label, color in MARKS.items():
        x, y = coords[labels == label].T
        ax.scatter(
            x, y, color=np.array(color) / 255, marker="*", s=size, edgecolor="white", linewidth=1
        )


def show_box(box: ArrayLike, ax: Axes) -> Patch:
    """Draws a box (x0, y0, x1, y1), in pixels.

    Raises:
        ValueError: if the box is invalid.
    """
    from matplotlib.patches import Rectangle

    ((x0, y0, x1, y1),) = check_boxes([box], "box")
    rectangle = Rectangle(
        (x0, y0), x1 - x0, y1 - y0, edgecolor=np.array(MARKS[1]) / 255, facecolor="none", lw=2
    )
    return ax.add_patch(rectangle)


def overlay(
    image: ImageInput,
    masks: AnyArray | Iterable[ArrayLike] = (),
    *,
    point_coords: ArrayLike = (),
    point_labels: ArrayLike = (),
    boxes: ArrayLike = (),
) -> Image.Image:
    """The image with masks tinted and outlined, and with points and boxes drawn on it.

    Args:
        image: anything that `load_image` accepts.
        masks: booleans [n, h, w] or a list of booleans [h, w], of the image's size. Each mask has
            its own color.
        point_coords: [n, 2], x and y in pixels.
        point_labels: [n], 1 foreground, 0 background.
        boxes: [n, 4], x0, y0, x1, y1 in pixels.

    Raises:
        TypeError, ValueError: if the image or a prompt is invalid, or if masks are not booleans of
            the image's size.
    """
    coords, labels = check_points(point_coords, point_labels, "point_coords")
    boxes = check_boxes(boxes, "boxes")
    array = load_image(image)
    every = as_numpy(masks, "masks") if is_array(masks) else cast(Iterable[ArrayLike], masks)

    def checked():
        for i, mask in enumerate(every):
            mask = _check_mask(mask, f"masks[{i}]")
            if mask.shape != array.shape[:2]:
                raise ValueError(
                    f"masks[{i}] has shape {mask.shape}, expected the image's {array.shape[:2]}"
                )
            yield mask

    return draw(array, checked(), coords, labels, boxes)


def draw(
    image: UInt8[np.ndarray, "h w 3"],
    masks: Iterable[Bool[np.ndarray, "h w"]],
    coords: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "b 4"],
) -> Image.Image:
    """`overlay` of values that are checked already."""
    pixels = image.astype(np.float32)
    for i, mask in enumerate(masks):
        color = np.array(COLORS[i % len(COLORS)], np.float32)
        pixels[mask] = (1 - ALPHA) * pixels[mask] + ALPHA * color
        pixels[outline(mask)] = 255
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    unit = max(drawn.size) / 512  # lines and marks scale with the image
    for box in boxes:
        draw.rectangle(tuple(box), outline=MARKS[1], width=max(2, round(2 * unit)))
    for (x, y), label in zip(coords, labels, strict=True):
        if label in MARKS:
            radius = max(4, 6 * unit)
            draw.ellipse(
                (x - radius, y - radius, x + radius, y + radius),
                fill=MARKS[int(label)],
                outline="white",
                width=max(1, round(1.5 * unit)),
            )
    return drawn


def _check_mask(mask: ArrayLike, where: str) -> np.ndarray:
    mask = as_numpy(mask, where)
    check_mask(mask, where)
    return mask


def outline(mask: np.ndarray) -> np.ndarray:
    """The mask's pixels with a neighbor above, below, left or right that is outside the mask."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
