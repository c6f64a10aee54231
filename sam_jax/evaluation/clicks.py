"""Mean IoU of a model's masks by number of clicks and by box (paper, sections 7.1 and D.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from sam_jax.errors import check_whole
from sam_jax.evaluation.metrics import iou
from sam_jax.models.sam import Sam
from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.prompts import BACKGROUND, FOREGROUND
from sam_jax.predictor import SamPredictor
from sam_jax.training.datasets import Dataset
from sam_jax.training.transform import checked_example
from sam_jax.types import Runtime
from sam_jax.visualize import overlay

CLICKS = (1, 2, 3, 5)
_DRAWN = 16  # objects per image; SA-1B's hundred could not be told apart


def evaluate(
    model: Sam,
    dataset: Dataset,
    *,
    clicks: Sequence[int] = CLICKS,
    objects_chunk_size: int = 16,
    runtime: Runtime = "jax",
    on_image: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The mean IoU over all objects, at the images' own resolution.

    The first click is in the center of the object, and each later one in the center of the error:
    at the pixel, missed or wrongly included, that is farthest from its region's boundary (paper,
    appendix D.1). One click is ambiguous, so the candidate with the highest predicted IoU counts;
    after more clicks, the single mask, for which the previous logits are a mask prompt. The box is
    the object's bounding box.

    Args:
        model: the model to evaluate.
        dataset: the examples; see `sam_jax.training.datasets`.
        clicks: the numbers of clicks to evaluate, each at least 1.
        objects_chunk_size: number of prompts decoded together.
        runtime: what runs the image encoder, as for `SamPredictor`.
        on_image: called after each image.

    Returns:
        `miou@1`, ... for each number of clicks, `miou@box`, and `objects`, their number.

    Raises:
        TypeError: if masks are not bool.
        ValueError: if a number is below 1, if masks do not have their image's size, or if there are
            no objects.
    """
    if not hasattr(clicks, "__len__") or not len(clicks):
        raise ValueError(f"clicks is {clicks!r}, expected one number of clicks or more")
    for number in clicks:
        check_whole("clicks", number, 1)
    check_whole("objects_chunk_size", objects_chunk_size, 1)
    names = [*(f"miou@{n}" for n in clicks), "miou@box"]
    found: dict[str, list[float]] = {name: [] for name in names}
    predictor = SamPredictor(model, runtime=runtime)
    for i in range(len(dataset)):
        example = dataset[i]
        targets = example["masks"]
        if len(targets):
            image, targets = checked_example(example)
            set_image(predictor, {**example, "image": image})
        for start in range(0, len(targets), objects_chunk_size):
            masks = targets[start : start + objects_chunk_size]
            masks = masks[masks.any((-2, -1))]  # an empty mask cannot be clicked
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
        raise ValueError("there are no objects to evaluate on")
    return {**{name: float(np.mean(values)) for name, values in found.items()}, "objects": objects}


def draw_clicks(model: Sam, dataset: Dataset, *, count: int = 4) -> Image.Image:
    """Draws the first images side by side, with the best mask for a click at each object's center.

    At most 16 objects are drawn per image.

    Raises:
        TypeError: if masks are not bool.
        ValueError: if `count` is below 1, if there is no image, or if masks do not have its size.
    """
    check_whole("count", count, 1)
    if not len(dataset):
        raise ValueError("there are no images to draw")
    predictor, drawn = SamPredictor(model), []
    for i in range(min(count, len(dataset))):
        example = dataset[i]
        image, targets = checked_example(example)
        pixels, targets = np.asarray(image), targets[:_DRAWN]
        targets = targets[targets.any((-2, -1))]
        if not len(targets):
            drawn.append(Image.fromarray(pixels))
            continue
        points = np.array([[middle(mask)] for mask in targets])
        set_image(predictor, {**example, "image": pixels})
        masks, scores, _ = predictor.predict_batch(points, np.ones(points.shape[:2]))
        best = masks[np.arange(len(masks)), scores.argmax(1)]
        marks = {"point_coords": points[:, 0], "point_labels": np.ones(len(points), int)}
        drawn.append(overlay(pixels, best, **marks))
    sheet = Image.new("RGB", (sum(d.width for d in drawn), max(d.height for d in drawn)))
    for i, image in enumerate(drawn):
        sheet.paste(image, (sum(d.width for d in drawn[:i]), 0))
    return sheet


def set_image(predictor: SamPredictor, example: dict[str, Any]) -> None:
    """Gives the predictor the example's image, or its embedding if it has one."""
    if "image_embedding" in example:
        embedding = np.moveaxis(example["image_embedding"], -1, 0)[None]
        predictor.set_image_embedding(embedding, example["image"].shape[:2])
    else:
        predictor.set_image(example["image"])


def middle(region: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
    """(x, y) of the pixel farthest from all pixels outside the region and from the image's edge."""
    return _innermost(region)[1]


def _by_clicks(predictor, targets, most: int) -> dict[int, list[float]]:
    """The IoUs of all objects after 1, 2, ... clicks."""
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
    """The pixel of `middle`, preceded by its distance from the outside of the region."""
    import scipy.ndimage  # takes a quarter of a second, which few callers need

    x0, y0, x1, y1 = mask_to_box(region)
    part = np.pad(region[y0 : y1 + 1, x0 : x1 + 1], 1)
    distance = np.asarray(scipy.ndimage.distance_transform_edt(part))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(distance[y, x]), (int(x + x0), int(y + y0))
