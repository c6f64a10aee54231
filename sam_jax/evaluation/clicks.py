"""How good a model's masks are, by the number of clicks and by box (paper, section 7.1, D.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from sam_jax.evaluation.metrics import iou
from sam_jax.models.sam import Sam
from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.prompts import BACKGROUND, FOREGROUND
from sam_jax.predictor import SamPredictor
from sam_jax.training.datasets import Dataset
from sam_jax.visualize import overlay

CLICKS = (1, 2, 3, 5)
_DRAWN = 16  # objects of a picture: of SA-1B's hundred the eye would tell no more apart


def evaluate(
    model: Sam,
    source: Dataset,
    *,
    clicks: Sequence[int] = CLICKS,
    objects_chunk_size: int = 16,
    on_image: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The mean IoU over all objects, at the pictures' own resolution.

    The first click is in the middle of the object, each later one in the middle of an error: of
    all pixels missed, or wrongly in the mask, the farthest from that region's boundary (paper,
    appendix D.1). After one click, which is ambiguous, the candidate with the best predicted IoU
    counts; after more, the single mask, which has the logits before as a mask prompt. A box is the
    object's own.

    Args:
        model: of any kind.
        source: examples; see `sam_jax.training.datasets`.
        clicks: numbers of clicks, at least one.
        objects_chunk_size: prompts decoded together.
        on_image: called after each picture.

    Returns:
        `miou@1`, ... for each number of clicks, `miou@box`, and `objects`, how many there were.

    Raises:
        ValueError: for numbers below 1, or if there is no object.
    """
    if not clicks or min(clicks) < 1:
        raise ValueError(f"clicks is {clicks}, expected one number of clicks or more, each above 0")
    if objects_chunk_size < 1:
        raise ValueError(f"objects_chunk_size is {objects_chunk_size}, expected at least 1")
    names = [*(f"miou@{n}" for n in clicks), "miou@box"]
    found: dict[str, list[float]] = {name: [] for name in names}
    predictor = SamPredictor(model)
    for i in range(len(source)):
        example = source[i]
        if len(example["masks"]):
            set_image(predictor, example)
        for start in range(0, len(example["masks"]), objects_chunk_size):
            masks = example["masks"][start : start + objects_chunk_size]
            masks = masks[masks.any((-2, -1))]  # an empty one has no place for a click
            if not len(masks):
                continue
            for count, ious in _by_clicks(predictor, masks, max(clicks)).items():
                if count in clicks:
                    found[f"miou@{count}"] += ious
            boxes = np.array([mask_to_box(mask) for mask in masks])
            predicted, _, _ = predictor.predict_batch(boxes=boxes, multimask_output=False)
            found["miou@box"] += iou(predicted[:, 0], masks).tolist()
        on_image()
    objects = len(found["miou@box"])
    if not objects:
        raise ValueError("there is no object to evaluate on")
    return {**{name: float(np.mean(values)) for name, values in found.items()}, "objects": objects}


def draw_clicks(model: Sam, source: Dataset, *, count: int = 4) -> Image.Image:
    """The first pictures side by side, with the best mask of a click in each object's middle.

    Of more than 16 objects the first are drawn.
    """
    predictor, pictures = SamPredictor(model), []
    for i in range(min(count, len(source))):
        example = source[i]
        targets = example["masks"][:_DRAWN]
        targets = targets[targets.any((-2, -1))]
        if not len(targets):
            pictures.append(Image.fromarray(example["image"]))
            continue
        points = np.array([[middle(mask)] for mask in targets])
        set_image(predictor, example)
        masks, scores, _ = predictor.predict_batch(points, np.ones(points.shape[:2]))
        best = masks[np.arange(len(masks)), scores.argmax(1)]
        marks = {"point_coords": points[:, 0], "point_labels": np.ones(len(points), int)}
        pictures.append(overlay(example["image"], best, **marks))
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    return sheet


def set_image(predictor: SamPredictor, example: dict[str, Any]) -> None:
    """Gives the predictor the example's picture, or its embedding if it has one."""
    if "image_embedding" in example:
        embedding = np.moveaxis(example["image_embedding"], -1, 0)[None]
        predictor.set_image_embedding(embedding, example["image"].shape[:2])
    else:
        predictor.set_image(example["image"])


def middle(region: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
    """(x, y) of the pixel farthest from what is not in the region, the picture's edge included."""
    return _innermost(region)[1]


def _by_clicks(predictor, targets, most: int) -> dict[int, list[float]]:
    """For 1, 2, ... clicks the IoUs of all objects."""
    predicted, ious, low_res = np.zeros_like(targets), {}, None
    points: list[list] = [[] for _ in targets]
    labels: list[list] = [[] for _ in targets]
    for count in range(1, most + 1):
        for k, target in enumerate(targets):
            errors = (target & ~predicted[k], FOREGROUND), (predicted[k] & ~target, BACKGROUND)
            inner = [(*_innermost(error), label) for error, label in errors if error.any()]
            if inner:
                _, point, label = max(inner, key=lambda found: found[0])
                points[k].append(point)
                labels[k].append(label)
        masks, scores, low = predictor.predict_batch(
            points, labels, mask_input=low_res, multimask_output=count == 1
        )
        best = scores.argmax(1)
        predicted, low_res = (x[np.arange(len(x)), best] for x in (masks, low))
        low_res = low_res[:, None]
        ious[count] = iou(predicted, targets).tolist()
    return ious


def _innermost(region: Bool[np.ndarray, "h w"]) -> tuple[float, tuple[int, int]]:
    """How far the pixel of `middle` is from what is not in the region, and the pixel."""
    import scipy.ndimage  # a quarter of a second that few need

    x0, y0, x1, y1 = mask_to_box(region)
    part = np.pad(region[y0 : y1 + 1, x0 : x1 + 1], 1)
    distance = np.asarray(scipy.ndimage.distance_transform_edt(part))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(distance[y, x]), (int(x + x0), int(y + y0))
