"""`sam-jax segment`."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from sam_jax.commands.common import IfGiven, ModelOptions, load_model, say_compiling
from sam_jax.files import read_json, require_folder, temporary_folder, write_json
from sam_jax.runs import lock_folder


@dataclasses.dataclass(frozen=True)
class Segment(ModelOptions):
    """Segment the objects marked by points or boxes.

    All points mark one object, each box another; points go with at most one box.
    """

    image: tyro.conf.Positional[Path]
    """The image."""
    point: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="X,Y[,LABEL]")] = (
        dataclasses.field(default_factory=list)
    )
    """A point in pixels; label 1 (the default): on the object, 0: background."""
    box: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="X0,Y0,X1,Y1")] = (
        dataclasses.field(default_factory=list)
    )
    """A box in pixels."""
    output: IfGiven[Path] = None
    """Folder for the results, `<image>_masks` if left out. Results of an earlier run are
    replaced."""
    multimask: IfGiven[bool] = None
    """Three candidate masks per object instead of one; by default only for a single point."""


def segment(args: Segment) -> None:
    """Writes overlay.png, a PNG for each mask and masks.json with their scores.

    Raises:
        OSError: if the image cannot be read or the output cannot be written to.
        ValueError: if a prompt is invalid, if the output has files with names of results that no
            earlier run wrote, or if the model is unknown.
    """
    from sam_jax.image import load_image
    from sam_jax.predictor import SamPredictor
    from sam_jax.visualize import draw

    points, labels = _parse_points(args.point)
    boxes = _parse_boxes(args.box)
    if len(points) == 0 and len(boxes) == 0:
        raise ValueError("nothing to segment: give at least one --point or --box")
    if len(points) and len(boxes) > 1:
        raise ValueError(
            f"--point can be combined with at most one --box, but there are {len(boxes)}"
        )
    image = load_image(args.image)
    _check_inside(points, "--point", image.shape[:2])
    _check_inside(boxes.reshape(-1, 2), "--box", image.shape[:2])
    output = args.output or Path(f"{args.image.stem}_masks")
    require_folder("--output", output)
    _check_free(output)

    predictor = SamPredictor(load_model(args.model, args.dtype), runtime=args.runtime)
    say_compiling()
    predictor.set_image(image)
    multimask = args.multimask
    if multimask is None:
        multimask = len(points) == 1 and len(boxes) == 0
    masks, scores, _ = predictor.predict_batch(
        points[None] if len(points) else None,
        labels[None] if len(points) else None,
        boxes=boxes if len(boxes) else None,
        multimask_output=multimask,
    )

    images, records = {}, []
    for prompt in range(len(masks)):
        for candidate in np.argsort(-scores[prompt]):
            mask, score = masks[prompt, candidate], float(scores[prompt, candidate])
            name = f"mask_{len(records)}.png"
            images[name] = Image.fromarray(mask)
            record = {"file": name, "predicted_iou": score, "area": int(mask.sum())}
            if len(boxes):
                record["box"] = boxes[prompt].tolist()
            records.append(record)
    best = [m[s.argmax()] for m, s in zip(masks, scores, strict=True)]
    images["overlay.png"] = draw(image, best, points, labels, boxes)
    summary = {
        "image": str(args.image),
        "width": image.shape[1],
        "height": image.shape[0],
        "model": args.model,
        "points": [[*p, k] for p, k in zip(points.tolist(), labels.tolist(), strict=True)],
        "masks": records,
    }
    with lock_folder(output):
        _check_free(output)
        _write(output, images, summary)
    for record in records:
        print(f"{output / record['file']}  predicted IoU {record['predicted_iou']:.3f}")
    print(output / "overlay.png")


def _write(folder: Path, images: dict[str, Image.Image], summary: dict[str, Any]) -> None:
    """Writes all images to a hidden folder, then moves them to the place of an earlier run's.

    If it is interrupted at any point, masks.json lists all files that `segment` wrote there.
    """
    with temporary_folder(folder) as temporary:
        for name, image in images.items():
            image.save(temporary / name)
        old = _files_of_earlier_run(folder)
        both = [{"file": name} for name in (*old, *images)]
        write_json(folder / "masks.json", {"masks": both})
        for name in images:
            os.replace(temporary / name, folder / name)
        for name in {*old} - {*images, "masks.json"}:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "masks.json", summary, indent=2)


def _check_free(folder: Path) -> None:
    """Rejects a folder that has files with names of results that no earlier run wrote."""
    earlier = _files_of_earlier_run(folder)
    for file in sorted(folder.glob("*")):
        name = file.name
        if name not in earlier and re.fullmatch(r"mask_\d+\.png|overlay\.png|masks\.json", name):
            raise ValueError(
                f"{file} was not written by an earlier run and is not overwritten; choose another "
                "--output"
            )


def _files_of_earlier_run(folder: Path) -> list[str]:
    """The files listed in masks.json, and those that are always written."""
    try:
        names = [record["file"] for record in read_json(folder / "masks.json")["masks"]]
        names = [name for name in names if re.fullmatch(r"mask_\d+\.png", name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [*names, "overlay.png", "masks.json"]


def _parse_points(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = [_parse_numbers(t, (2, 3), "--point", "X,Y or X,Y,LABEL") for t in texts]
    labels = [row[2] if len(row) == 3 else 1 for row in rows]
    if wrong := [x for x in labels if x not in (0, 1)]:
        raise ValueError(
            f"--point has label {wrong[0]:g}, expected 1 (on the object) or 0 (background)"
        )
    coords = np.array([row[:2] for row in rows]).reshape(-1, 2)
    return coords, np.array(labels, np.int32)


def _parse_boxes(texts: list[str]) -> np.ndarray:
    from sam_jax.validation import check_boxes

    return check_boxes([_parse_numbers(t, (4,), "--box", "X0,Y0,X1,Y1") for t in texts], "--box")


def _check_inside(coords: np.ndarray, option: str, size: tuple[int, int]) -> None:
    """Rejects coordinates [n, 2] outside an image of size (h, w)."""
    height, width = size
    outside = ((coords < 0) | (coords > (width, height))).any(1)
    if outside.any():
        x, y = coords[outside][0]
        raise ValueError(
            f"{option} has ({x:g}, {y:g}), outside the image, which is {width} x {height} pixels; "
            f"expected x from 0 to {width} and y from 0 to {height}"
        )


def _parse_numbers(text: str, counts: tuple[int, ...], option: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not np.isfinite(numbers).all():
        raise ValueError(f"{option} is {text!r}, expected {form}")
    return numbers
