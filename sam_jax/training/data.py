"""Pictures with objects' masks, from disk to batches of one shape.

A source is a list of examples, dictionaries of `image` (uint8 [h, w, 3]) and `masks` (bool
[n, h, w]): `CocoInstances` and `SegmentAnything1B` are two, whose masks are `RunLengths`, and any
sequence of such dictionaries will do. `Prepare` gives an example a fixed shape, `batches` puts them
together, by grain.
"""

import hashlib
import operator
import os
import reprlib
import signal
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import numpy as np
import pycocotools.mask
from jaxtyping import Bool
from PIL import Image

from sam_jax.config import SamConfig
from sam_jax.files import read_json
from sam_jax.image import read_stored, turn
from sam_jax.ops.masks import check_rle, mask_to_box, rle_decode, rle_uncompress
from sam_jax.ops.prompts import pad_axis
from sam_jax.processing import SamProcessor

Example = dict[str, Any]
BadAnnotations = Literal["refuse", "skip"]

_SHOWN = 10  # bad entries that a message lists
_FAR = 16
_LOOKED_AT = 1000  # images in which `check_objects` looks for an object
_EPOCHS = 2**31  # without end, but for what grain's arithmetic can count


@runtime_checkable
class Source(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class RunLengths:
    """Masks [n, h, w] of which only those are decoded that are asked for: SA-1B has 100 a picture.

    A number gives one mask, bool [h, w]; a slice or an array of numbers gives an array of some, and
    `np.asarray` all.
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


class _AnnotatedImages:
    """Image files and their objects; what `CocoInstances` and `SegmentAnything1B` share.

    Args:
        name: of the file or folder, for messages.
        bad_annotations: see `CocoInstances`.
        exif_orientation: whether the annotations are of images that are turned as EXIF says
            ("applied") or of the pixels as stored ("ignored", or None if nothing says so).
        way_out: what to do if None is wrong.
    """

    def __init__(
        self,
        name: Path,
        bad_annotations: BadAnnotations,
        exif_orientation: str | None,
        way_out: str,
    ):
        self.name, self.bad_annotations = name, bad_annotations
        self.exif_orientation, self._way_out = exif_orientation, way_out
        self._has_warned = False

    def _example(
        self, image_id: Any, path: Path, size: tuple[int, int], objects: list[tuple]
    ) -> Example:
        """The image and its objects: (id, number, segmentation), two of them for messages."""
        try:
            image = self._pixels(image_id, path, size)
        except (OSError, TypeError, ValueError) as error:
            problem = f"image {_label(image_id)}: {path}: {error}"
            _report([problem], "a bad image", self.bad_annotations)
            return _blank()
        rles, problems = [], []
        for annotation_id, number, segmentation in objects:
            try:
                rles.append(_run_lengths(segmentation, size))
            except ValueError as error:
                name = f"image {_label(image_id)}: {_annotation_name(annotation_id, number)}"
                problems.append(f"{name}: its segmentation cannot be read: {error}")
        _report(problems, f"{path} has bad annotations", self.bad_annotations)
        return {"image": image, "masks": RunLengths(rles, size)}

    def _pixels(self, image_id: Any, path: Path, size: tuple[int, int]) -> np.ndarray:
        """The image that is annotated, turned or as stored."""
        stored, orientation = read_stored(path)
        turned = turn(stored, orientation)
        image = turned if self.exif_orientation == "applied" else stored
        if image.shape[:2] != size:
            message = f"its size is {list(image.shape[:2])}, but {list(size)} is annotated"
            if turned.shape[:2] == size:
                message += (
                    f"; its EXIF orientation is {orientation}, and its annotations seem to be of "
                    f"the image turned upright, not of the pixels as stored: {self._way_out}"
                )
            raise ValueError(message)
        is_open = self.exif_orientation is None and orientation != 1
        if is_open and turned.shape[:2] == size and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.name}: image {_label(image_id)} ({path}) has EXIF orientation "
                f"{orientation}, and others may have one. Annotations are taken to be of the "
                "pixels as stored, as in pycocotools. If they are of the image turned upright, "
                f"{self._way_out}",
                stacklevel=4,
            )
        return np.ascontiguousarray(image)


class CocoInstances(_AnnotatedImages):
    """The images of a COCO instance file that have objects.

    Polygons and run lengths, compressed or not. Crowds are left out.

    Masks are of the pixels as an image file stores them, as in pycocotools: an EXIF orientation is
    not applied, and you are warned once if it might have to be. If the file's `info` has
    `"exif_orientation": "applied"`, as what `sam-jax generate` writes does, masks are of the images
    turned upright, and they are turned when they are read; `"ignored"` says that nothing is to be
    turned.

    Numbers may be written as 30 or 30.0. Boxes, areas and categories are not used, and not looked
    at, nor is anything of crowds.

    Args:
        annotations: the JSON file.
        images: the folder of its images.
        bad_annotations: what to do about invalid entries: values of the wrong type, missing
            images, file names that lead out of the folder, ids that occur twice, empty
            segmentations, polygons of half a point or outside the image, run lengths of another
            size than the image's, annotations of no image. "refuse" raises an error that lists
            them by the ids of image and annotation; "skip" leaves them out with a warning. What
            only shows when an image is read is treated the same; one that cannot be read at all
            is blank then, without objects.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is not a COCO instance file, no image in it has an object, or there
            are invalid entries and they are refused, or for another `bad_annotations`.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        bad_annotations: BadAnnotations = "refuse",
    ):
        _check_choice(bad_annotations)
        content = read_json(Path(annotations))
        try:
            parts = (_field(content, name, list) for name in ("images", "annotations"))
            self.entries, problems = _coco_entries(*parts, Path(images))
            info = content.get("info")
            rule = info.get("exif_orientation") if isinstance(info, dict) else None
            if rule not in (None, "applied", "ignored"):
                raise ValueError(
                    f'"exif_orientation" of its info is {_shown(rule)}, expected "applied" or '
                    '"ignored"'
                )
        except ValueError as error:
            raise ValueError(f"{annotations} is not a COCO instance file: {error}") from error
        way_out = (
            'set "exif_orientation" in the annotation file\'s "info" to "applied" ("ignored" says '
            "that they are not)"
        )
        super().__init__(Path(annotations), bad_annotations, rule, way_out)
        _report(problems, f"{annotations} has bad entries", bad_annotations)
        if not self.entries:
            raise ValueError(f"no image of {annotations} has an object")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        return self._example(*self.entries[index])

    def image_id(self, index: int) -> int | str:
        """The id that the file has for the image."""
        return self.entries[index][0]


class SegmentAnything1B(_AnnotatedImages):
    """A folder of SA-1B: images, and alongside each a JSON file of its masks' run lengths.

    Masks are of the pixels as an image file stores them; you are warned once if one has an EXIF
    orientation.

    Args:
        folder: of both.
        bad_annotations: as for `CocoInstances`, when an image is read.

    Raises:
        ValueError: if there is no JSON file, or for another `bad_annotations`; when an image is
            read, if it is missing, or its file is not one of SA-1B.
    """

    def __init__(self, folder: str | Path, bad_annotations: BadAnnotations = "refuse"):
        _check_choice(bad_annotations)
        way_out = "store the image upright, without EXIF orientation"
        super().__init__(Path(folder), bad_annotations, None, way_out)
        # Each file is read only when it is its turn: SA-1B has 11 million.
        self.files = sorted(Path(folder).glob("*.json"))
        if not self.files:
            raise ValueError(f"there is no JSON file in {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        try:
            content = read_json(file)
            path, size = _image_entry(_field(content, "image", dict), file.parent)
            annotations = _field(content, "annotations", list)
        except ValueError as error:
            problem = f"image {_label(file.stem)}: {file} is not a file of SA-1B: {error}"
            _report([problem], "a bad image", self.bad_annotations)
            return _blank()
        objects, problems = [], []
        for i, annotation in enumerate(annotations):
            try:
                segmentation = _checked_segmentation(_field(annotation, "segmentation"), size)
                objects.append((annotation.get("id"), i, segmentation))
            except ValueError as error:
                name = f"image {_label(file.stem)}: {_annotation_name(_id_of(annotation), i)}"
                problems.append(f"{name}: {error}")
        _report(problems, f"{file} has bad annotations", self.bad_annotations)
        return self._example(file.stem, path, size, objects)

    def image_id(self, index: int) -> str:
        """The name of the image's file."""
        return self.files[index].stem


def open_source(
    annotations: str | Path,
    images: str | Path | None = None,
    bad_annotations: BadAnnotations = "refuse",
) -> CocoInstances | SegmentAnything1B:
    """COCO for a file (with its folder of pictures), SA-1B for a folder.

    Raises:
        FileNotFoundError, ValueError: as `CocoInstances` and `SegmentAnything1B`; and for a file
            without a folder of pictures.
    """
    if Path(annotations).is_dir():
        return SegmentAnything1B(annotations, bad_annotations)
    if images is None:
        raise ValueError(f"{annotations} is a file of COCO's: its folder of pictures is needed")
    return CocoInstances(annotations, images, bad_annotations)


@dataclass(frozen=True)
class Prepare:
    """Makes an example one of fixed shape: a dictionary of

    * `pixel_values` float32 [size, size, 3], or `image_embedding` if the example has one;
    * `masks` bool [n, target_size, target_size], of the whole model input;
    * `boxes` float32 [n, 4], x0, y0, x1, y1 in pixels of the model's input;
    * `valid` float32 [n], 0 where there is no object;
    * `dropped` int32 [], how many of the chosen objects are left out because they are too small:
      none of their pixels is left at the model's input size, or they fill half of no cell of the
      target grid. Objects outside a crop do not count;
    * `index` int32 [], the example's number in its source, if it has one.

    Args:
        config: of the model.
        max_objects: n; of more objects some are chosen by chance.
        target_size: the masks' side, a divisor of the model's input size: `config.mask_size` (what
            the model gives), or `config.image_size`.
        flip: how often the picture is mirrored.
        scale_range: large-scale jitter: by how much the picture is larger than what fits the model,
            by chance in this range (the paper's is 0.1 to 2.0). What is too large is cropped.

    Raises:
        ValueError: for numbers that make no sense.
    """

    config: SamConfig
    max_objects: int
    target_size: int
    flip: float = 0.0
    scale_range: tuple[float, float] | None = None

    def __post_init__(self):
        low, high = self.scale_range or (1, 1)
        for name, ok, expected in (
            ("max_objects", self.max_objects >= 1, "at least 1"),
            (
                "target_size",
                self.target_size >= 1 and self.config.image_size % self.target_size == 0,
                f"a divisor of the model's input size {self.config.image_size}",
            ),
            ("flip", 0 <= self.flip <= 1, "0 to 1"),
            ("scale_range", 0 < low <= high, "two numbers above 0, the smaller first"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example; what is by chance comes from `rng`.

        Raises:
            TypeError: if the masks are not bool.
            ValueError: if the masks are not of the picture's size, or the picture has to change
                but its embedding is cached.
        """
        image, masks = example["image"], example["masks"]
        if masks.dtype != bool:
            raise TypeError(
                f"the masks are {masks.dtype}, expected bool; compare them, as masks > 0"
            )
        if masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
            raise ValueError(
                f"the masks have shape {masks.shape}, expected masks of the picture's "
                f"size, [n, {image.shape[0]}, {image.shape[1]}]"
            )
        chosen: Any = slice(None)
        if len(masks) > self.max_objects:
            chosen = np.sort(rng.choice(len(masks), self.max_objects, replace=False))
        masks = masks[chosen]
        if "image_embedding" in example:
            if self.augments:
                raise ValueError("a picture whose embedding is cached cannot be augmented")
        elif rng.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]

        processor, size = SamProcessor(self.config), self.config.image_size
        height, width = processor.input_size(image.shape[:2])
        top = left = 0
        if self.scale_range is not None:
            scale = rng.uniform(*self.scale_range)
            height, width = (max(1, round(n * scale)) for n in (height, width))
            top, left = (int(rng.integers(max(n - size, 0) + 1)) for n in (height, width))
        window = np.s_[top : top + size, left : left + size]

        result = {}
        if "image_embedding" in example:
            result["image_embedding"] = example["image_embedding"]
        else:
            result["pixel_values"] = processor.normalize(_resize(image, (height, width))[window])
        full = [_resize(mask, (height, width)) for mask in masks]
        # One that the window has no part of is not too small, but cropped away.
        full = [mask[window] for mask in full if mask[window].any() or not mask.any()]
        targets = [_to_grid(mask, size, self.target_size) for mask in full]
        boxes = [mask_to_box(mask) for mask in full]
        found = [k for k, target in enumerate(targets) if target.any()]
        n, side = self.max_objects, self.target_size
        result["masks"] = _stacked([targets[k] for k in found], n, (side, side), bool)
        result["boxes"] = _stacked([boxes[k] for k in found], n, (4,), np.float32)
        result["valid"] = _stacked([np.float32(1)] * len(found), n, (), np.float32)
        result["dropped"] = np.int32(len(full) - len(found))
        if "index" in example:
            result["index"] = np.int32(example["index"])
        return result

    @property
    def augments(self) -> bool:
        """Whether pictures are changed by chance."""
        return self.flip > 0 or self.scale_range is not None


def batches(
    source: Source,
    prepare: Prepare,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[dict[str, np.ndarray]]:
    """Batches without end, shuffled anew in each epoch.

    The batch of a step depends on the seed and the step alone, not on where a run was interrupted,
    nor on the number of workers or hosts; each host gets its part of it.

    Args:
        source: examples.
        prepare: gives them a shape.
        batch_size: of all hosts together.
        seed: of the order, and of all that is by chance.
        start: the first step, where a run goes on.
        workers: processes that read; 0 for threads of this one.
        process_index: of this host; JAX's if left out.
        process_count: of hosts; JAX's if left out.

    Raises:
        ValueError: if the batch cannot be shared by the hosts, or the source is empty; from the
            iterator, if an example cannot be read or prepared, with the image's id.
        ImportError: if grain is not installed; it comes with the extra `train`.
    """
    import grain

    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of the {process_count} hosts"
        )
    if not len(source):
        raise ValueError("there are no pictures to train on")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or above")
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .random_map(_Reader(source, prepare))
        .repeat(_EPOCHS)
        .batch(batch_size // process_count)
        .slice(slice(process_index, None, process_count))
        .slice(slice(start, None))
    )
    ahead = max(2, workers)
    threads = grain.ReadOptions(num_threads=min(4, ahead), prefetch_buffer_size=ahead)
    dataset = dataset.to_iter_dataset(threads)
    if workers:
        import absl.flags

        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain's workers look at flags, parsed or not
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_signals_to_the_parent)
    return dataset


def check_objects(source: Source, prepare: Prepare | None, seed: int = 0) -> None:
    """Makes sure that there is an object to train or to evaluate on, by reading until the first.

    At most 1,000 images are read, in random order, so that it takes a minute or two at the worst.
    If there is none in so many of a larger source, that is a warning.

    Args:
        source: examples.
        prepare: as for `batches`; None for evaluation, which takes objects of any size.
        seed: of the order, and of what is random in `prepare`.

    Raises:
        ValueError: if there is none in the whole source, or an example cannot be read; if all
            objects are too small for the target grid, the message says what to do.
    """
    rng, dropped = np.random.default_rng(seed), False
    read = min(len(source), _LOOKED_AT)
    # Where crops are random, an object that one misses another may show.
    tries = read if prepare is None or not prepare.augments else max(read, _LOOKED_AT // 10)
    reader, order = _Reader(source, prepare or _any_object), rng.permutation(len(source))[:read]
    for i in range(tries):
        example = reader(int(order[i % read]), rng)
        if example["valid"].any():
            return
        dropped |= example["dropped"] > 0
    message = f"none of the {read} images that were read has an object"
    if prepare is not None and dropped:
        message = (
            f"no object of the {read} images that were read can be trained on: {too_small(prepare)}"
        )
    if read == len(source):
        raise ValueError(message)
    warnings.warn(f"{message} (the other {len(source) - read} were not read)", stacklevel=2)


def too_small(prepare: Prepare) -> str:
    """Why objects are dropped, and the remedy."""
    cell = prepare.config.image_size // prepare.target_size
    remedy = "cut the images into crops, or enlarge them at random (--scale-range 1 4)"
    if cell > 1:
        remedy = f"compare masks at --full-resolution; if that is not enough, {remedy}"
    return (
        f"they fill less than half of every cell of the target grid, {cell} x {cell} pixels of the "
        f"model's input, to which an image is resized; {remedy}"
    )


def fingerprint(annotations: str | Path) -> str:
    """Tells whether annotations are the same as before, by a file's bytes or a folder's names."""
    path = Path(annotations)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = sorted(file.name for file in path.glob("*.json"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@dataclass(frozen=True)
class _Reader:
    """Reads an example by its number and prepares it; errors name the image."""

    source: Source
    prepare: Callable[[Example, np.random.Generator], Example]

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        try:
            return self.prepare({**self.source[index], "index": index}, rng)
        except Exception as error:  # whatever a source of one's own raises
            image_id = getattr(self.source, "image_id", int)(index)
            if f"image {image_id}:" in str(error):
                raise
            raise ValueError(f"image {image_id}: {str(error) or repr(error)}") from error


def _any_object(example: Example, _: np.random.Generator) -> Example:
    found = any(mask.any() for mask in example["masks"])
    return {"valid": np.array([found]), "dropped": 0}


def _leave_signals_to_the_parent(*_: int) -> None:
    """Terminals and schedulers signal all processes, but only the parent can end a run in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _coco_entries(images: list, annotations: list, folder: Path) -> tuple[list[tuple], list[str]]:
    """What `_example` takes for each image of a COCO file with objects, and what is wrong."""
    infos: dict[int | str, tuple | None] = {}  # None if it is bad
    problems = []
    for i, info in enumerate(images):
        try:
            image_id = _id(info, "id")
        except ValueError as error:
            problems.append(f"images[{i}]: {error}")
            continue
        try:
            if image_id in infos:  # whose objects these are cannot be known
                raise ValueError("there are two images of this id")
            infos[image_id] = _image_entry(info, folder)
        except ValueError as error:
            problems.append(f"image {_label(image_id)}: {error}")
            infos[image_id] = None

    objects: dict[int | str, list] = {}
    seen: set[int | str] = set()
    for i, annotation in enumerate(annotations):
        try:
            if _is_crowd(annotation):
                continue
            image_id = _id(annotation, "image_id")
            if image_id not in infos:
                raise ValueError(f"there is no image of the id {_shown(image_id)}")
            if annotation.get("id") is not None:
                annotation_id = _id(annotation, "id")
                if annotation_id in seen:
                    raise ValueError("there are two annotations of this id")
                seen.add(annotation_id)
            if infos[image_id] is None:  # which has been said
                continue
            _, size = infos[image_id]
            segmentation = _checked_segmentation(_field(annotation, "segmentation"), size)
        except ValueError as error:
            name = _annotation_name(_id_of(annotation), i)
            if isinstance(annotation, dict):
                name = f"image {_label(annotation.get('image_id'))}: {name}"
            problems.append(f"{name}: {error}")
        else:
            objects.setdefault(image_id, []).append((annotation.get("id"), i, segmentation))

    entries = []
    for image_id, of_image in objects.items():
        path, size = infos[image_id]
        if os.path.isfile(path):  # Path's raises for some names
            entries.append((image_id, path, size, of_image))
        else:
            problems.append(f"image {_label(image_id)}: {path} is missing")
    return entries, problems


def _image_entry(info: Any, folder: Path) -> tuple[Path, tuple[int, int]]:
    """Path and size of an image of a COCO or SA-1B file; raises ValueError if it is invalid."""
    name = _field(info, "file_name", str)
    root, path = os.path.abspath(folder), os.path.normpath(os.path.join(folder, name))
    if os.path.commonpath([root, os.path.abspath(path)]) != root:
        raise ValueError(f"its file_name {_shown(name)} leads out of the folder {folder}")
    height, width = (_whole(_field(info, side), side) for side in ("height", "width"))
    if height < 1 or width < 1:
        raise ValueError(f"its height and width are {height} and {width}, expected at least 1")
    return Path(path), (height, width)


def _checked_segmentation(value: Any, size: tuple[int, int]) -> dict | list:
    """Polygons or run lengths, as COCO has them, with whole numbers as integers.

    Raises:
        ValueError: if it is invalid; but what a string of run lengths says is not looked at.
    """
    if isinstance(value, dict):
        given = [_whole(n, "size") for n in _field(value, "size", list)]
        if given != list(size):
            raise ValueError(f"its size is {given}, but the image's is {list(size)}")
        counts = _field(value, "counts", list, str)
        if isinstance(counts, list):
            counts = [n if type(n) is int else _whole(n, "run length") for n in counts]
        rle = {"size": given, "counts": counts}
        if isinstance(counts, list):
            check_rle(rle)
        return rle
    if not isinstance(value, list):
        raise ValueError(
            f"its segmentation is {_shown(value)}, expected polygons (a list of lists) or run "
            "lengths (an object)"
        )
    far = _FAR * max(size)  # pycocotools walks along every edge, however long
    for polygon in value:
        if not isinstance(polygon, list) or not {int, float}.issuperset(map(type, polygon)):
            raise ValueError(
                f"a polygon of it is {_shown(polygon)}, expected a list of numbers x, y, x, y, ..."
            )
        if len(polygon) % 2:
            raise ValueError(
                f"a polygon of it has {len(polygon)} numbers, expected x and y of each point"
            )
        # NaN alone is not equal to itself. (No generator: a file has millions of numbers.)
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
    if value not in (None, 0, 1):  # which False, True, 0.0 and 1.0 are, too
        raise ValueError(f"its iscrowd is {_shown(value)}, expected 0 or 1")
    return bool(value)


def _annotation_name(annotation_id: Any, number: int) -> str:
    if annotation_id is None:
        return f"annotations[{number}]"
    return f"annotation {_label(annotation_id)}"


def _id_of(annotation: Any) -> Any:
    return annotation.get("id") if isinstance(annotation, dict) else None


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"it is {_shown(value)}, expected an object")
    return value


def _field(entry: Any, name: str, *kinds: type) -> Any:
    """A value of a JSON object, of one of some kinds (any, if none is given)."""
    if name not in _object(entry):
        raise ValueError(f"it has no {name}")
    if kinds and not isinstance(entry[name], kinds):
        names = {list: "a list", dict: "an object", str: "a string"}
        expected = " or ".join(names[kind] for kind in kinds)
        raise ValueError(f"its {name} is {_shown(entry[name])}, expected {expected}")
    return entry[name]


def _id(entry: Any, name: str) -> int | str:
    value = _field(entry, name)
    return value if isinstance(value, str) else _whole(value, name)


def _whole(value: Any, name: str) -> int:
    """A whole number, which JSON may have as 30 or 30.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"its {name} is {_shown(value)}, expected a whole number")
    return int(value)


_shown = reprlib.repr  # not longer than fits a message


def _label(value: Any) -> str:
    return str(value) if isinstance(value, (int, str)) else _shown(value)


def _check_choice(bad_annotations: str) -> None:
    choices = get_args(BadAnnotations)
    if bad_annotations not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"bad_annotations is {bad_annotations!r}, expected {expected}")


def _report(problems: list[str], what: str, bad_annotations: BadAnnotations) -> None:
    if not problems:
        return
    shown = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"  and {len(problems) - _SHOWN} more")
    if bad_annotations == "refuse":
        hint = 'mend them, or leave them out with bad_annotations="skip" (--bad-annotations skip)'
        raise ValueError("\n".join([f"{what}; {hint}:", *shown]))
    warnings.warn("\n".join([f"{what}, left out:", *shown]), stacklevel=3)


def _blank() -> Example:
    """Takes the place of a bad image, since examples are counted before they are read."""
    return {"image": np.zeros((1, 1, 3), np.uint8), "masks": np.zeros((0, 1, 1), bool)}


def _run_lengths(segmentation: dict | list, size: tuple[int, int]) -> dict:
    """What `_checked_segmentation` gives, as run lengths that `rle_decode` takes."""
    if isinstance(segmentation, list):
        rle = pycocotools.mask.frPyObjects(segmentation, *size)
        return rle_uncompress(pycocotools.mask.merge(rle))
    if isinstance(segmentation["counts"], str):
        segmentation = rle_uncompress(segmentation)
        check_rle(segmentation)
    return segmentation


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture or a mask to (h, w), as `SamProcessor` does."""
    if array.shape[:2] == size:
        return array
    is_mask = array.dtype == bool
    image = Image.fromarray(
        array.astype(np.uint8) * 255 if is_mask else np.ascontiguousarray(array)
    )
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return resized >= 128 if is_mask else resized


def _to_grid(mask: Bool[np.ndarray, "h w"], size: int, side: int) -> Bool[np.ndarray, "side side"]:
    """The mask padded to the model's input, each cell of the grid by the majority of its pixels."""
    mask = pad_axis(pad_axis(mask, size, 0, 0), size, 1, 0)
    if side == size:
        return mask
    cell = size // side
    return mask.reshape(side, cell, side, cell).mean((1, 3)) >= 0.5


def _stacked(arrays: list, count: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    return pad_axis(np.array(arrays, dtype).reshape(len(arrays), *shape), count, 0, 0)
