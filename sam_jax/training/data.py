"""Pictures with objects' masks, from disk to batches of one shape.

A source is a list of examples, dictionaries of `image` (uint8 [h, w, 3]) and `masks` (bool
[n, h, w]): `CocoInstances` and `SegmentAnything1B` are two, whose masks are `RunLengths`, and any
sequence of such dictionaries will do. `Prepare` gives an example a fixed shape, `batches` puts them
together, by grain.
"""

import hashlib
import json
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
from PIL import ExifTags, Image

from sam_jax.config import SamConfig
from sam_jax.image import load_image
from sam_jax.ops.masks import check_rle, mask_to_box, rle_area, rle_decode, rle_uncompress
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


class CocoInstances:
    """The pictures of a COCO instance file that have objects.

    Polygons and run lengths, compressed or not. Crowds are left out. Masks are of the pixels as a
    file stores them, as in pycocotools: an EXIF orientation is not applied.

    Args:
        annotations: the JSON file.
        images: the folder of its pictures.
        bad_annotations: what to do about entries that cannot be right: missing pictures, ids that
            occur twice, empty segmentations, polygons of half a point, run lengths of another size
            than the picture's, boxes outside it, annotations of no picture. "refuse" raises an
            error that lists them by the picture's id; "skip" leaves them out with a warning. What
            only shows when a picture is read is treated the same; one that cannot be read at all
            is blank then, without objects.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is no COCO instance file, no picture in it has an object, or there
            are bad entries and they are refused, or for another `bad_annotations`.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        bad_annotations: BadAnnotations = "refuse",
    ):
        _check_choice(bad_annotations)
        content = _read_json(Path(annotations))
        try:
            self.entries, problems = _coco_entries(content, Path(images))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{annotations} is no COCO instance file: {error!r}; expected images of id, "
                "file_name, height and width, and annotations of image_id and segmentation"
            ) from error
        self.bad_annotations = bad_annotations
        _report(problems, f"{annotations} has bad entries", bad_annotations)
        if not self.entries:
            raise ValueError(f"no picture of {annotations} has an object")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        return _example(*self.entries[index], self.bad_annotations)

    def image_id(self, index: int) -> Any:
        """The id that the file has for the picture."""
        return self.entries[index][0]


class SegmentAnything1B:
    """A folder of SA-1B: pictures, and beside each a JSON file of its masks' run lengths.

    Args:
        folder: of both.
        bad_annotations: as for `CocoInstances`, when a picture is read.

    Raises:
        ValueError: if there is no JSON file, or for another `bad_annotations`; when a picture is
            read, if it is missing, or its file is none of SA-1B's.
    """

    def __init__(self, folder: str | Path, bad_annotations: BadAnnotations = "refuse"):
        _check_choice(bad_annotations)
        # Each file is read only when it is its turn: SA-1B has 11 million.
        self.files = sorted(Path(folder).glob("*.json"))
        self.bad_annotations = bad_annotations
        if not self.files:
            raise ValueError(f"there is no JSON file in {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        try:
            content = _read_json(file)
            picture = file.with_name(content["image"]["file_name"])
            size = content["image"]["height"], content["image"]["width"]
            segments = [annotation["segmentation"] for annotation in content["annotations"]]
        except (KeyError, TypeError, ValueError) as error:
            problem = f"image {file.stem}: {file} is no file of SA-1B: {error!r}"
            _report([problem], "a bad picture", self.bad_annotations)
            return _blank()
        return _example(file.stem, picture, size, segments, self.bad_annotations)

    def image_id(self, index: int) -> str:
        """The name of the picture's file."""
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
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_the_parent)
    return dataset


def check_objects(source: Source, prepare: Prepare | None, seed: int = 0) -> None:
    """Makes sure that there is an object to train or to evaluate on, by reading until the first.

    At most 1,000 images are read, evenly spaced, so that it takes a minute or two at the worst.

    Args:
        source: examples.
        prepare: as for `batches`; None for evaluation, which takes objects of any size.
        seed: of what is random in `prepare`.

    Raises:
        ValueError: if there is none, or an example cannot be read; if all objects are too small
            for the target grid, the message says what to do.
    """
    rng, dropped = np.random.default_rng(seed), False
    read = min(len(source), _LOOKED_AT)
    # Where crops are random, an object that one misses another may show.
    tries = read if prepare is None or not prepare.augments else max(read, _LOOKED_AT // 10)
    reader = _Reader(source, prepare or _any_object)
    for i in range(tries):
        example = reader(i % read * len(source) // read, rng)
        if example["valid"].any():
            return
        dropped |= example["dropped"] > 0
    if prepare is None or not dropped:
        raise ValueError(f"none of the {read} images that were read has an object")
    raise ValueError(
        f"no object of the {read} images that were read can be trained on: {too_small(prepare)}"
    )


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


def _leave_interrupts_to_the_parent(*_: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but only the parent can end a run in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _coco_entries(content: Any, folder: Path) -> tuple[list[tuple], list[str]]:
    """Of a COCO file what `_example` takes for each picture with objects, and what is wrong."""
    infos: dict[Any, dict] = {}
    ambiguous: set = set()
    objects: dict[Any, list] = {}
    seen: set = set()
    problems = []
    for info in content["images"]:
        if info["id"] in infos:
            problems.append(f"image {info['id']}: there are two pictures of this id")
            ambiguous.add(info["id"])
        infos[info["id"]] = info
    for annotation in content["annotations"]:
        image_id, annotation_id = annotation.get("image_id"), annotation.get("id")
        try:
            problem = _annotation_problem(annotation, infos.get(image_id), seen)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"it cannot be read: {error!r}"
        if problem:
            which = "" if annotation_id is None else f"annotation {annotation_id}: "
            problems.append(f"image {image_id}: {which}{problem}")
        elif not annotation.get("iscrowd"):
            objects.setdefault(image_id, []).append(annotation["segmentation"])
        seen.add(annotation_id)

    entries = []
    for image_id, segmentations in objects.items():
        if image_id in ambiguous:  # whose objects these are cannot be known
            continue
        info = infos[image_id]
        picture = folder / info["file_name"]
        if picture.is_file():
            entries.append((image_id, picture, (info["height"], info["width"]), segmentations))
        else:
            problems.append(f"image {image_id}: {picture} is missing")
    return entries, problems


def _annotation_problem(annotation: dict, info: dict | None, seen: set) -> str | None:
    """What is wrong with an annotation, as far as is seen without its picture."""
    if "image_id" not in annotation:
        return "it has no image_id"
    if info is None:
        return "there is no picture of this id"
    if annotation.get("id") is not None and annotation["id"] in seen:
        return "there are two annotations of this id"
    height, width = info["height"], info["width"]
    segmentation = annotation["segmentation"]
    is_polygons = isinstance(segmentation, list)
    if not segmentation or (is_polygons and not any(len(p) >= 6 for p in segmentation)):
        return "its segmentation is empty"
    if is_polygons and any(len(p) % 2 for p in segmentation):
        odd = next(len(p) for p in segmentation if len(p) % 2)
        return f"a polygon of it has {odd} numbers, expected x and y of each point"
    if not is_polygons and list(segmentation["size"]) != [height, width]:
        return f"its size is {segmentation['size']}, but the picture's {[height, width]}"
    counts = None if is_polygons else segmentation["counts"]
    if isinstance(counts, list) and sum(counts) != height * width:
        return "its run lengths do not fill the picture"
    x, y, w, h = annotation.get("bbox", (0, 0, 1, 1))
    # A pixel more is common, by rounding, and COCO's own files have boxes without height.
    inside = x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
    if not (inside and w >= 0 and h >= 0):
        return f"its box {[x, y, w, h]} is not within the picture of {width} x {height}"
    return None


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


def _example(
    image_id: Any,
    picture: Path,
    size: tuple[int, int],
    segmentations: list,
    bad_annotations: BadAnnotations,
) -> Example:
    try:
        image = _stored_pixels(picture, tuple(size))
    except Exception as error:  # also whatever Pillow's decoders meet in a damaged file
        _report([f"image {image_id}: {picture}: {error}"], "a bad picture", bad_annotations)
        return _blank()
    size, rles, problems = image.shape[:2], [], []
    for segmentation in segmentations:
        try:
            rles.append(_run_lengths(segmentation, size))
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"image {image_id}: a segmentation cannot be read: {error!r}")
    _report(problems, f"{picture} has bad annotations", bad_annotations)
    return {"image": image, "masks": RunLengths([rle for rle in rles if rle_area(rle)], size)}


def _stored_pixels(picture: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture of this size, not turned as its EXIF says: nor are those that COCO annotates."""
    with Image.open(picture) as file:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
        image = load_image(file)
    if image.shape[:2] == size:
        return image
    message = f"it has {image.shape[:2]} pixels, but {size} are annotated"
    if orientation > 4 and image.shape[1::-1] == size:  # on its side
        message += (
            f"; its EXIF orientation is {orientation}, and its annotations seem to be of the "
            "turned picture, but have to be of the pixels as stored: store it turned, without EXIF"
        )
    raise ValueError(message)


def _blank() -> Example:
    """Takes the place of a bad picture, since examples are counted before they are read."""
    return {"image": np.zeros((1, 1, 3), np.uint8), "masks": np.zeros((0, 1, 1), bool)}


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> dict:
    """Polygons or run lengths, as COCO has them, as run lengths that `rle_decode` takes."""
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its size is {segmentation['size']}, but the picture's {list(size)}")
        if not isinstance(segmentation["counts"], list):
            segmentation = rle_uncompress(segmentation)
        check_rle(segmentation)
        return segmentation
    polygons = [np.asarray(p, float) for p in segmentation if len(p) >= 6]
    if not all(np.isfinite(p).all() for p in polygons):
        raise ValueError("its polygons hold numbers that are not finite")
    if not polygons:
        return {"size": list(size), "counts": [size[0] * size[1]]}
    # pycocotools walks along every edge, however long.
    if any(abs(p).max() > _FAR * max(size) for p in polygons):
        raise ValueError(f"its polygons reach beyond {_FAR} times the picture")
    rle = pycocotools.mask.frPyObjects([p.tolist() for p in polygons], *size)
    return rle_uncompress(pycocotools.mask.merge(rle))


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
