"""Pictures with objects' masks, from disk to batches of one shape.

A source is a list of examples, dictionaries of `image` (uint8 [h, w, 3]) and `masks` (bool
[n, h, w]): `CocoInstances` and `SegmentAnything1B` are two, and any sequence of such dictionaries
will do. `Prepare` gives an example a fixed shape, `batches` puts them together, by grain.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pycocotools.mask
from jaxtyping import Bool
from PIL import Image

from sam_jax.config import SamConfig
from sam_jax.ops.masks import mask_to_box
from sam_jax.ops.prompts import pad_axis
from sam_jax.processing import SamProcessor, load_image

Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class CocoInstances:
    """The pictures of a COCO instance file that have objects.

    Polygons and run lengths, compressed or not. Crowds and annotations without any area are left
    out.

    Args:
        annotations: the JSON file.
        images: the folder of its pictures.

    Raises:
        FileNotFoundError: if the file or one of its pictures is missing.
        ValueError: if the file is no COCO instance file, or no picture in it has an object.
    """

    def __init__(self, annotations: str | Path, images: str | Path):
        content = _read_json(Path(annotations))
        try:
            infos = {info["id"]: info for info in content["images"]}
            objects: dict[Any, list] = {}
            for annotation in content["annotations"]:
                if annotation["image_id"] not in infos:
                    raise ValueError(f"an annotation is of the picture {annotation['image_id']}")
                if not annotation.get("iscrowd") and annotation.get("segmentation"):
                    objects.setdefault(annotation["image_id"], []).append(
                        annotation["segmentation"]
                    )
            entries = [(info["file_name"], objects[i]) for i, info in infos.items() if i in objects]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{annotations} is no COCO instance file: {error!r}; expected images of id and "
                "file_name, and annotations of image_id and segmentation"
            ) from error
        self.entries = [(Path(images) / name, segments) for name, segments in entries]
        _check_entries(self.entries, annotations)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        return _example(*self.entries[index])


class SegmentAnything1B:
    """A folder of SA-1B: pictures, and beside each a JSON file of its masks' run lengths.

    Raises:
        FileNotFoundError: if a picture is missing.
        ValueError: if a JSON file is none of SA-1B's, or there is none with an object.
    """

    def __init__(self, folder: str | Path):
        # Each file is read only when it is its turn: SA-1B has 11 million.
        self.files = sorted(Path(folder).glob("*.json"))
        if not self.files:
            raise ValueError(f"there is no JSON file in {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        content = _read_json(file)
        try:
            picture = file.with_name(content["image"]["file_name"])
            segments = [annotation["segmentation"] for annotation in content["annotations"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no file of SA-1B: {error!r} is missing") from error
        return _example(picture, segments)


def open_source(
    annotations: str | Path, images: str | Path | None = None
) -> CocoInstances | SegmentAnything1B:
    """COCO for a file (with its folder of pictures), SA-1B for a folder."""
    if Path(annotations).is_dir():
        return SegmentAnything1B(annotations)
    if images is None:
        raise ValueError(f"{annotations} is a file of COCO's: its folder of pictures is needed")
    return CocoInstances(annotations, images)


@dataclass(frozen=True)
class Prepare:
    """Makes an example one of fixed shape: a dictionary of

    * `pixel_values` float32 [size, size, 3], or `image_embedding` if the example has one;
    * `masks` bool [n, target_size, target_size], of the whole model input;
    * `boxes` float32 [n, 4], x0, y0, x1, y1 in pixels of the model's input;
    * `valid` float32 [n], 0 where there is no object.

    Args:
        config: of the model.
        max_objects: n; of more objects some are chosen by chance.
        target_size: the masks' side: `config.mask_size` (what the model gives), or
            `config.image_size`.
        flip: how often the picture is mirrored.
        scale_range: large-scale jitter: by how much the picture is larger than what fits the model,
            by chance in this range (the paper's is 0.1 to 2.0). What is too large is cropped.
    """

    config: SamConfig
    max_objects: int
    target_size: int
    flip: float = 0.0
    scale_range: tuple[float, float] | None = None

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example; what is by chance comes from `rng`."""
        image, masks = example["image"], example["masks"]
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
        full = [_resize(mask, (height, width))[window] for mask in masks]
        targets = [_to_grid(mask, size, self.target_size) for mask in full]
        boxes = [mask_to_box(mask) for mask in full]
        # What has been cropped away, or is too small for the grid, is no object.
        found = [k for k, target in enumerate(targets) if target.any()]
        n, side = self.max_objects, self.target_size
        result["masks"] = _stacked([targets[k] for k in found], n, (side, side), bool)
        result["boxes"] = _stacked([boxes[k] for k in found], n, (4,), np.float32)
        result["valid"] = _stacked([np.float32(1)] * len(found), n, (), np.float32)
        return result

    @property
    def augments(self) -> bool:
        """Whether pictures are changed by chance."""
        return self.flip > 0 or self.scale_range is not None


def batches(
    source: Source,
    prepare: Prepare,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
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
        process_index: of this host.
        process_count: of hosts.

    Raises:
        ValueError: if the batch cannot be shared by the hosts, or the source is empty.
        ImportError: if grain is not installed; it comes with the extra `train`.
    """
    import grain

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a multiple of the {process_count} hosts"
        )
    if not len(source):
        raise ValueError("there are no pictures to train on")
    dataset = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .random_map(prepare)
        .repeat()
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
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return dataset


def _example(picture: Path, segmentations: list) -> Example:
    image = load_image(picture)
    size = image.shape[:2]
    try:
        masks = [_decode_mask(segmentation, size) for segmentation in segmentations]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"a segmentation of {picture} cannot be read: {error!r}") from error
    masks = [mask for mask in masks if mask.any()]
    return {"image": image, "masks": np.array(masks, bool).reshape(-1, *size)}


def _decode_mask(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Polygons or run lengths, as COCO has them."""
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its size is {segmentation['size']}, but the picture's {list(size)}")
        rle = segmentation
        if isinstance(rle["counts"], list):
            if sum(rle["counts"]) != size[0] * size[1]:
                raise ValueError("its run lengths do not fill the picture")
            rle = pycocotools.mask.frPyObjects(rle, *size)
    else:
        polygons = [np.asarray(p, float).tolist() for p in segmentation if len(p) >= 6]
        if not polygons:
            return np.zeros(size, bool)
        if not all(np.isfinite(p).all() for p in polygons):
            raise ValueError("its polygons hold numbers that are not finite")
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *size))
    return pycocotools.mask.decode(rle).astype(bool)


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


def _check_entries(entries: list, annotations: Any) -> None:
    if not entries:
        raise ValueError(f"no picture of {annotations} has an object")
    if missing := [str(path) for path, _ in entries if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(entries)} pictures of {annotations} are missing, the first "
            f"{missing[0]}; is the folder of pictures right?"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
