"""Checks entries of COCO and SA-1B files."""

import operator
import os
import reprlib
from pathlib import Path
from typing import Any

import pycocotools.mask

from sam_jax.ops.rle import check_rle, rle_uncompress

_FAR = 16


def coco_entries(images: list, annotations: list, folder: Path) -> tuple[list[tuple], list[str]]:
    """Id, path, size and objects of each image that has objects, and the problems found."""
    infos: dict[int | str, tuple[Path, tuple[int, int]] | None] = {}  # None for a bad entry
    problems = []
    for i, info in enumerate(images):
        try:
            image_id = _id(info, "id")
        except ValueError as error:
            problems.append(f"images[{i}]: {error}")
            continue
        try:
            if image_id in infos:  # its objects are ambiguous
                raise ValueError("there are two images with this id")
            infos[image_id] = image_entry(info, folder)
        except ValueError as error:
            problems.append(f"image {label_of(image_id)}: {error}")
            infos[image_id] = None
    good = {image_id: info for image_id, info in infos.items() if info is not None}

    objects: dict[int | str, list] = {}
    seen: set[int | str] = set()
    for i, annotation in enumerate(annotations):
        try:
            if _is_crowd(annotation):
                continue
            image_id = _id(annotation, "image_id")
            if image_id not in infos:
                raise ValueError(f"there is no image with the id {shown(image_id)}")
            if annotation.get("id") is not None:
                annotation_id = _id(annotation, "id")
                if annotation_id in seen:
                    raise ValueError("there are two annotations with this id")
                seen.add(annotation_id)
            if image_id not in good:  # reported above
                continue
            _, size = good[image_id]
            segmentation = checked_segmentation(json_field(annotation, "segmentation"), size)
        except ValueError as error:
            name = annotation_name(id_of(annotation), i)
            if isinstance(annotation, dict):
                name = f"image {label_of(annotation.get('image_id'))}: {name}"
            problems.append(f"{name}: {error}")
        else:
            objects.setdefault(image_id, []).append((annotation.get("id"), i, segmentation))

    entries = []
    for image_id, of_image in objects.items():
        path, size = good[image_id]
        if os.path.isfile(path):  # Path.is_file raises for some names
            entries.append((image_id, path, size, of_image))
        else:
            problems.append(f"image {label_of(image_id)}: {path} is missing")
    return entries, problems


def image_entry(info: Any, folder: Path) -> tuple[Path, tuple[int, int]]:
    """Path and size of an image of a COCO or SA-1B file; raises ValueError if it is invalid."""
    name = json_field(info, "file_name", str)
    root, path = os.path.abspath(folder), os.path.normpath(os.path.join(folder, name))
    if os.path.commonpath([root, os.path.abspath(path)]) != root:
        raise ValueError(f"its file_name {shown(name)} leads out of the folder {folder}")
    height, width = (_whole(json_field(info, side), side) for side in ("height", "width"))
    if height < 1 or width < 1:
        raise ValueError(f"its height and width are {height} and {width}, expected at least 1")
    return Path(path), (height, width)


def checked_segmentation(value: Any, size: tuple[int, int]) -> dict | list:
    """COCO polygons or run lengths, with whole numbers as integers.

    Raises:
        ValueError: if it is invalid; the content of compressed run lengths is not checked.
    """
    if isinstance(value, dict):
        given = [_whole(n, "size") for n in json_field(value, "size", list)]
        if given != list(size):
            raise ValueError(f"its size is {given}, but the image's is {list(size)}")
        counts = json_field(value, "counts", list, str)
        if isinstance(counts, list):
            counts = [n if type(n) is int else _whole(n, "run length") for n in counts]
        rle = {"size": given, "counts": counts}
        if isinstance(counts, list):
            check_rle(rle)
        return rle
    if not isinstance(value, list):
        raise ValueError(
            f"its segmentation is {shown(value)}, expected polygons (a list of lists) or run "
            "lengths (an object)"
        )
    far = _FAR * max(size)  # pycocotools visits every pixel of an edge, however long
    for polygon in value:
        if not isinstance(polygon, list) or not {int, float}.issuperset(map(type, polygon)):
            raise ValueError(
                f"one of its polygons is {shown(polygon)}, expected a list of numbers x, y, x, y, "
                "..."
            )
        if len(polygon) % 2:
            raise ValueError(
                f"one of its polygons has {len(polygon)} numbers, expected x and y of each point"
            )
        # Only NaN is not equal to itself. (map is fast enough for a file's millions of numbers.)
        is_finite = not any(map(operator.ne, polygon, polygon))
        if polygon and not (is_finite and -far <= min(polygon) and max(polygon) <= far):
            raise ValueError(f"its polygons are not finite or reach beyond {_FAR} times the image")
    polygons = [polygon for polygon in value if len(polygon) >= 6]
    if not polygons:
        raise ValueError("its segmentation is empty")
    for start, side in ((0, size[1]), (1, size[0])):
        values = [polygon[start::2] for polygon in polygons]
        if max(map(max, values)) < 0 or min(map(min, values)) > side:
            raise ValueError(f"its polygons are outside the image of {size[1]} x {size[0]}")
    return polygons


def _is_crowd(annotation: Any) -> bool:
    value = _object(annotation).get("iscrowd")
    if value not in (None, 0, 1):  # includes False, True, 0.0 and 1.0
        raise ValueError(f"its iscrowd is {shown(value)}, expected 0 or 1")
    return bool(value)


def annotation_name(annotation_id: Any, number: int) -> str:
    """The name of an annotation in messages: its id, or its index in the file."""
    if annotation_id is None:
        return f"annotations[{number}]"
    return f"annotation {label_of(annotation_id)}"


def id_of(annotation: Any) -> Any:
    """The id of an entry, or None."""
    return annotation.get("id") if isinstance(annotation, dict) else None


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"it is {shown(value)}, expected an object")
    return value


def json_field(entry: Any, name: str, *kinds: type) -> Any:
    """A value of a JSON object, checked to be of one of the kinds, if any are given."""
    if name not in _object(entry):
        raise ValueError(f"it has no {name}")
    if kinds and not isinstance(entry[name], kinds):
        names = {list: "a list", dict: "an object", str: "a string"}
        expected = " or ".join(names[kind] for kind in kinds)
        raise ValueError(f"its {name} is {shown(entry[name])}, expected {expected}")
    return entry[name]


def _id(entry: Any, name: str) -> int | str:
    value = json_field(entry, name)
    return value if isinstance(value, str) else _whole(value, name)


def _whole(value: Any, name: str) -> int:
    """A whole number, which may be written as 30 or 30.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"its {name} is {shown(value)}, expected a whole number")
    return int(value)


shown = reprlib.repr  # limits the length for messages


def label_of(value: Any) -> str:
    """An id for a message."""
    return str(value) if isinstance(value, (int, str)) else shown(value)


def segmentation_rle(segmentation: dict | list, size: tuple[int, int]) -> dict:
    """Converts a result of `checked_segmentation` to run lengths for `rle_decode`."""
    if isinstance(segmentation, list):
        rle = pycocotools.mask.frPyObjects(segmentation, *size)
        return rle_uncompress(pycocotools.mask.merge(rle))
    if isinstance(segmentation["counts"], str):
        segmentation = rle_uncompress(segmentation)
        check_rle(segmentation)
    return segmentation
