"""Images with annotated objects: COCO files and folders of SA-1B."""

import hashlib
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Bool

from sam_jax.files import read_json
from sam_jax.image import read_stored, turn
from sam_jax.ops.rle import rle_decode
from sam_jax.training.annotations import (
    annotation_name,
    checked_segmentation,
    coco_entries,
    id_of,
    image_entry,
    json_field,
    label_of,
    segmentation_rle,
    shown,
)
from sam_jax.types import OnBadAnnotation

Example = dict[str, Any]
_SHOWN = 10  # bad entries listed in a message


@runtime_checkable
class Dataset(Protocol):
    """Examples by index.

    An example has an `image`, uint8 [h, w, 3], and `masks`, bool [n, h, w] or `LazyMasks`, one for
    each object. Two more methods are optional: `image_id(index)` names the image in messages, and
    `read_masks(index)` returns the masks without reading the image.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class LazyMasks:
    """Masks [n, h, w] that are decoded only on access: SA-1B has 100 per image.

    An integer index returns one mask, bool [h, w]; a slice or an array of indices returns several,
    and `np.asarray` returns all.
    """

    dtype, ndim = np.dtype(bool), 3

    def __init__(self, rles: list[dict], size: tuple[int, int]):
        self.rles = rles  # uncompressed
        self.shape = (len(rles), *size)

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, key: Any) -> np.ndarray:
        chosen = np.arange(len(self))[key]
        if chosen.ndim == 0:
            return rle_decode(self.rles[chosen])
        masks = [rle_decode(self.rles[k]) for k in chosen]
        return np.array(masks, bool).reshape(-1, *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or bool, copy=False)


class LazyImage:
    """A dataset's image, uint8 [h, w, 3], that is read only by `np.asarray`."""

    dtype, ndim = np.dtype(np.uint8), 3

    def __init__(self, dataset: Dataset, index: int, *, shape: tuple[int, int, int]):
        self._dataset, self._index, self.shape = dataset, index, shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._dataset[self._index]["image"].astype(dtype or np.uint8, copy=False)


class _Entry(NamedTuple):
    """What is annotated of an image."""

    image_id: int | str
    path: Path
    size: tuple[int, int]
    objects: list[tuple]  # (id, index, segmentation), the first two for messages


class _AnnotatedImages(ABC):
    """Image files and their objects; the common part of `CocoInstances` and `SegmentAnything1B`.

    Args:
        name: the file or folder, for messages.
        on_bad_annotation: see `CocoInstances`.
        exif_orientation: "applied" if the annotations refer to upright images, "ignored" if they
            refer to the pixels as stored, None (treated as "ignored") if unknown.
        advice: advice for messages, in case None is wrong.
    """

    def __init__(
        self,
        name: Path,
        on_bad_annotation: OnBadAnnotation,
        exif_orientation: str | None,
        advice: str,
    ):
        self.name = name
        self.on_bad_annotation: OnBadAnnotation = on_bad_annotation
        self.exif_orientation, self._advice = exif_orientation, advice
        self._has_warned = False

    @abstractmethod
    def _entry(self, index: int) -> _Entry | None:
        """The entry; None if it was bad and reported."""

    def __getitem__(self, index: int) -> Example:
        entry = self._entry(index)
        if entry is None:
            return _blank()
        try:
            image = self._pixels(entry)
        except (OSError, TypeError, ValueError) as error:
            problem = f"image {label_of(entry.image_id)}: {entry.path}: {error}"
            _report([problem], "a bad image", self.on_bad_annotation)
            return _blank()
        return {"image": image, "masks": self._masks(entry)}

    def read_masks(self, index: int) -> Bool[np.ndarray, "n h w"] | LazyMasks:
        """The masks of an example; the image file is not read."""
        entry = self._entry(index)
        return _blank()["masks"] if entry is None else self._masks(entry)

    def _masks(self, entry: _Entry) -> LazyMasks:
        rles, problems = [], []
        for annotation_id, number, segmentation in entry.objects:
            try:
                rles.append(segmentation_rle(segmentation, entry.size))
            except ValueError as error:
                name = f"image {label_of(entry.image_id)}: {annotation_name(annotation_id, number)}"
                problems.append(f"{name}: its segmentation cannot be read: {error}")
        _report(problems, f"{entry.path} has bad annotations", self.on_bad_annotation)
        return LazyMasks(rles, entry.size)

    def _pixels(self, entry: _Entry) -> np.ndarray:
        """The image that the annotations refer to, upright or as stored."""
        image_id, path, size, _ = entry
        stored, orientation = read_stored(path)
        turned = turn(stored, orientation)
        image = turned if self.exif_orientation == "applied" else stored
        if image.shape[:2] != size:
            message = f"its size is {list(image.shape[:2])}, but {list(size)} is annotated"
            if turned.shape[:2] == size:
                message += (
                    f"; its EXIF orientation is {orientation}, and its annotations seem to refer "
                    f"to the upright image, not to the pixels as stored: {self._advice}"
                )
            raise ValueError(message)
        is_open = self.exif_orientation is None and orientation != 1
        if is_open and turned.shape[:2] == size and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.name}: image {label_of(image_id)} ({path}) has EXIF orientation "
                f"{orientation}, and others may have one. Annotations are assumed to refer to the "
                "pixels as stored, as in pycocotools. If they refer to the upright image, "
                f"{self._advice}",
                stacklevel=4,
            )
        return np.ascontiguousarray(image)


class CocoInstances(_AnnotatedImages):
    """The images of a COCO instance file that have objects.

    Supports polygons and run lengths, compressed or not. Crowds are left out.

    Masks refer to the pixels as stored in the image file, as in pycocotools: EXIF orientation is
    not applied, and you are warned once if it might be needed. If the file's `info` has
    `"exif_orientation": "applied"`, as files of `sam-jax generate` do, masks refer to the upright
    images, and images are turned upright when they are read; `"ignored"` silences the warning.

    Numbers may be written as 30 or 30.0. Boxes, areas, categories and crowds are neither used nor
    checked.

    Args:
        annotations: the JSON file.
        images: the folder of its images.
        on_bad_annotation: how to handle invalid entries: values of the wrong type, missing images,
            file names that lead out of the folder, repeated ids, empty segmentations, polygons with
            an odd number of coordinates or outside the image, run lengths of another size than the
            image's, and annotations without an image. "raise" raises an error that lists them by
            the ids of image and annotation; "skip" leaves them out with a warning. Problems found
            when an image is read are handled the same way; with "skip", an image that cannot be
            read becomes a blank image without objects.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is not a COCO instance file, if no image in it has an object, if
            there are invalid entries and `on_bad_annotation` is "raise", or for another
            `on_bad_annotation`.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        on_bad_annotation: OnBadAnnotation = "raise",
    ):
        _check_choice(on_bad_annotation)
        content = read_json(Path(annotations))
        try:
            infos, objects = (json_field(content, k, list) for k in ("images", "annotations"))
            self.entries, problems = coco_entries(infos, objects, Path(images))
            info = content.get("info")
            rule = info.get("exif_orientation") if isinstance(info, dict) else None
            if rule not in (None, "applied", "ignored"):
                raise ValueError(
                    f'"exif_orientation" of its info is {shown(rule)}, expected "applied" or '
                    '"ignored"'
                )
        except ValueError as error:
            raise ValueError(f"{annotations} is not a COCO instance file: {error}") from error
        advice = (
            'set "exif_orientation" in the annotation file\'s "info" to "applied" ("ignored" says '
            "that they are not)"
        )
        super().__init__(Path(annotations), on_bad_annotation, rule, advice)
        _report(problems, f"{annotations} has bad entries", on_bad_annotation)
        if not self.entries:
            raise ValueError(f"no image of {annotations} has an object")

    def __len__(self) -> int:
        return len(self.entries)

    def _entry(self, index: int) -> _Entry:
        return _Entry(*self.entries[index])

    def image_id(self, index: int) -> int | str:
        """The image's id in the file."""
        return self.entries[index][0]


class SegmentAnything1B(_AnnotatedImages):
    """A folder of SA-1B: images, each with a JSON file of its masks' run lengths.

    Masks refer to the pixels as stored in the image file; you are warned once if one has an EXIF
    orientation.

    Args:
        folder: the folder of images and JSON files.
        on_bad_annotation: as for `CocoInstances`; applied when an image is read.

    Raises:
        ValueError: if there is no JSON file, or for another `on_bad_annotation`; when an image is
            read, if it is missing or its JSON file is not in SA-1B's format.
    """

    def __init__(self, folder: str | Path, *, on_bad_annotation: OnBadAnnotation = "raise"):
        _check_choice(on_bad_annotation)
        advice = "store the image upright, without EXIF orientation"
        super().__init__(Path(folder), on_bad_annotation, None, advice)
        # Files are read only on access: SA-1B has 11 million.
        self.files = sorted(Path(folder).glob("*.json"))
        if not self.files:
            raise ValueError(f"there is no JSON file in {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def _entry(self, index: int) -> _Entry | None:
        file = self.files[index]
        try:
            content = read_json(file)
            path, size = image_entry(json_field(content, "image", dict), file.parent)
            annotations = json_field(content, "annotations", list)
        except ValueError as error:
            problem = f"image {label_of(file.stem)}: {file} is not a file of SA-1B: {error}"
            _report([problem], "a bad image", self.on_bad_annotation)
            return None
        objects, problems = [], []
        for i, annotation in enumerate(annotations):
            try:
                segmentation = checked_segmentation(json_field(annotation, "segmentation"), size)
                objects.append((annotation.get("id"), i, segmentation))
            except ValueError as error:
                name = f"image {label_of(file.stem)}: {annotation_name(id_of(annotation), i)}"
                problems.append(f"{name}: {error}")
        _report(problems, f"{file} has bad annotations", self.on_bad_annotation)
        return _Entry(file.stem, path, size, objects)

    def image_id(self, index: int) -> str:
        """The name of the image's file."""
        return self.files[index].stem


def open_annotations(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    on_bad_annotation: OnBadAnnotation = "raise",
) -> CocoInstances | SegmentAnything1B:
    """Opens a COCO file (with its folder of images) or a folder of SA-1B.

    Raises:
        FileNotFoundError, ValueError: as `CocoInstances` and `SegmentAnything1B`, and for a file
            without a folder of images.
    """
    if Path(annotations).is_dir():
        return SegmentAnything1B(annotations, on_bad_annotation=on_bad_annotation)
    if not Path(annotations).exists():
        raise FileNotFoundError(f"{annotations} does not exist")
    if images is None:
        raise ValueError(f"{annotations} is a COCO file; also give its folder of images")
    return CocoInstances(annotations, images, on_bad_annotation=on_bad_annotation)


def fingerprint(annotations: str | Path) -> str:
    """A SHA-256 of annotations, by a file's bytes or the names of a folder's files.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(annotations)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = sorted(name for name in os.listdir(path) if name.endswith(".json"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _check_choice(on_bad_annotation: str) -> None:
    choices = get_args(OnBadAnnotation)
    if on_bad_annotation not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"on_bad_annotation is {on_bad_annotation!r}, expected {expected}")


def _report(problems: list[str], what: str, on_bad_annotation: OnBadAnnotation) -> None:
    if not problems:
        return
    shown = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"  and {len(problems) - _SHOWN} more")
    if on_bad_annotation == "raise":
        hint = (
            'fix them, or leave them out with on_bad_annotation="skip" (--on-bad-annotation skip)'
        )
        raise ValueError("\n".join([f"{what}; {hint}:", *shown]))
    warnings.warn("\n".join([f"{what}, left out:", *shown]), stacklevel=3)


def _blank() -> Example:
    """Replaces a bad image, since examples are counted before they are read."""
    return {"image": np.zeros((1, 1, 3), np.uint8), "masks": np.zeros((0, 1, 1), bool)}
