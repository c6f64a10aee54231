"""Everything-mode over a folder of pictures: what `sam-jax generate` does.

A run can be stopped at any time and started again. Each picture's result appears whole or not at
all, and pictures that have one are passed over.
"""

import collections
import csv
import dataclasses
import errno
import functools
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.mask
from PIL import Image
from tqdm import tqdm

import sam_jax
from sam_jax.checkpoints import from_pretrained
from sam_jax.files import read_json, remove_leftovers, replacing, temporary_folder, write_json
from sam_jax.image import FORMATS, load_image
from sam_jax.mask_generator import SamAutomaticMaskGenerator, check_arguments
from sam_jax.ops.masks import (
    check_rle,
    mask_to_polygons,
    rle_compress,
    rle_decode,
    rle_uncompress,
)
from sam_jax.visualize import overlay

Format = Literal["png", "coco"]
Segmentation = Literal["rle", "polygons"]
ANNOTATIONS = "annotations.json"
_SETTINGS, _PARTS, _OVERLAYS, _IDS = "sam_jax.json", "parts", "overlays", "ids.json"
_TABLE, _SOURCE = "metadata.csv", "source.json"
_RESERVED = (ANNOTATIONS, _SETTINGS, _PARTS, _OVERLAYS, _IDS)
# Every further image would fail, too: a run ends at these.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_TRIES = 3  # of an image whose worker dies
_COLUMNS = (
    *("id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y"),
    *("predicted_iou", "stability_score", "crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h"),
)


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder of results.

    * "png": `<stem>/0.png`, `1.png`, ... and `<stem>/metadata.csv` for each picture, as Meta's
      `amg.py` writes them, with `source.json`, which tells the picture; with `overlays` also
      `<stem>/overlay.png`, the picture with its masks;
    * "coco": the records of each image in `parts/`, as Python has them, put together as
      `annotations.json` at the end of a run (category "object"; masks as `segmentation` says);
      `ids.json`, which keeps the ids the same from run to run; `overlays/<stem>.png`.

    `sam_jax.json` has the settings.
    """

    folder: Path
    format: Format = "png"
    overlays: bool = False
    segmentation: Segmentation = "rle"

    def begin(self, settings: dict[str, Any], pictures: Sequence[Path]) -> list[Path]:
        """Makes the folder; the pictures that have no result in it yet.

        Raises:
            OSError: if it cannot be made or written to.
            ValueError: if its results were made with other settings or of other pictures, or if
                something else is where they belong; the message names it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / _PARTS, self.folder / _OVERLAYS):
            remove_leftovers(folder)
        ours = (self.folder / _SETTINGS).exists()
        for name in (ANNOTATIONS, _PARTS, _OVERLAYS, _IDS) if self.format == "coco" else ():
            if not ours and (self.folder / name).exists():
                raise ValueError(
                    f"{self.folder / name} is not of an earlier run, and is not overwritten; "
                    "choose another output"
                )
        # A run that came to nothing binds no other.
        results = (self.folder.glob(f"[!.]*/{_SOURCE}"), self.folder.glob(f"{_PARTS}/[!.]*"))
        settings = {"format": self.format, "overlays": self.overlays, **settings}
        keep_settings(self.folder / _SETTINGS, settings, any(itertools.chain(*results)))
        return [picture for picture in pictures if not self.is_finished(picture)]

    def is_finished(self, picture: Path) -> bool:
        """Whether there is a result for the picture.

        Raises:
            ValueError: if what has its name is the result of another one, or none.
        """
        result = self._result(picture)
        try:
            if not result.exists():
                return False
            expected = _source(picture)
        except OSError:  # reading or writing it will fail, too, and is that image's trouble
            return False
        try:
            if self.format == "png":
                source = read_json(result / _SOURCE)
            else:
                source = read_json(result)["source"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self.format == "coco":  # damaged; all in `parts` is ours to write again
                return False
            raise ValueError(
                f"{result} is where the result of {picture} belongs, but is none ({error}); remove "
                "it or choose another output"
            ) from error
        if source != expected:
            raise ValueError(
                f"{result} is the result of another picture than {picture}, or of what that was "
                "before it was changed; remove it or choose another output"
            )
        return True

    def write(self, picture: Path, image: np.ndarray, records: list[dict[str, Any]]) -> None:
        """Writes a picture's records, whose masks are uncompressed run lengths."""
        drawn = _draw(image, records) if self.overlays else None
        if self.format == "png":
            with replacing(self._result(picture)) as path:
                _write_pngs(path, records)
                (path / _SOURCE).write_text(json.dumps(_source(picture)))
                if drawn:
                    drawn.save(path / "overlay.png")
            return
        if drawn:
            with replacing(self.folder / _OVERLAYS / f"{picture.stem}.png") as path:
                drawn.save(path, format="PNG")
        part = {"source": _source(picture), **_part(picture, image, records)}
        write_json(self._result(picture), part)

    def finish(self) -> list[str]:
        """Puts all parts of "coco" together in one file, those of earlier runs, too.

        Returns:
            What there is to say of it: what the file holds, and what was left out.
        """
        if self.format != "coco":
            return []
        parts = {path.stem: path for path in sorted((self.folder / _PARTS).glob("*.json"))}
        with replacing(self.folder / ANNOTATIONS) as path:
            said, ids = _write_coco(path, parts, _read_ids(self.folder / _IDS), self.segmentation)
            write_json(self.folder / _IDS, ids)
        return [f"{self.folder / ANNOTATIONS}: {said[0]}", *said[1:]]

    def _result(self, picture: Path) -> Path:
        if self.format == "png":
            return self.folder / picture.stem
        return self.folder / _PARTS / f"{picture.stem}.json"


def keep_settings(file: Path, settings: dict[str, Any], has_results: bool) -> None:
    """Writes the settings of a run, or compares them with those of its results.

    Raises:
        ValueError: for other settings than those of the results; the message names them.
    """
    settings = json.loads(json.dumps(settings))
    if not has_results:
        write_json(file, settings, indent=2)
        return
    try:
        earlier = read_json(file)
        other = [k for k in {**earlier, **settings} if earlier.get(k) != settings.get(k)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.parent} has results, but their {file.name} cannot be read: {error}"
        ) from error
    if other:
        names = ", ".join(f"{k} was {earlier.get(k)!r} and is {settings.get(k)!r}" for k in other)
        raise ValueError(f"{file.parent} has results of other settings: {names}")


def find_pictures(inputs: Iterable[Path]) -> list[Path]:
    """The files given, and of the folders given the files that are named as images, sorted.

    Hidden ones are passed over, and those without an extension of `sam_jax.image.FORMATS`.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: if there is none, or if two of them would have one result.
    """
    pictures: dict[str, Path] = {}
    inputs = list(inputs)
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in _images_of(path) if path.is_dir() else [path]:
            if file.stem in _RESERVED:
                raise ValueError(
                    f"{file} would be written as {file.stem!r}, a name of ours; rename it"
                )
            other = pictures.setdefault(file.stem, file)
            if os.path.realpath(other) != os.path.realpath(file):
                raise ValueError(
                    f"{other} and {file} would both be written as {file.stem!r}; rename one, or "
                    "give them separately with another output"
                )
    if not inputs:
        raise ValueError("there is no input, expected images or folders of images")
    if not pictures:
        hint = "".join(f"; {line}" for line in passed_over(inputs))
        raise ValueError(f"there is no image in {', '.join(map(str, inputs))}{hint}")
    return list(pictures.values())


def _images_of(folder: Path) -> list[Path]:
    # Pillow opens a camera's MPO as the JPEG that it begins with.
    formats = {*FORMATS, "MPO"}
    known = {name for name, kind in Image.registered_extensions().items() if kind in formats}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in known and not path.name.startswith(".") and not path.is_dir()
    )


def passed_over(inputs: Iterable[Path], output: Path | None = None) -> list[str]:
    """What there is to say of what lies in the folders given and is not an image of theirs."""
    there = [
        path
        for folder in inputs
        if folder.is_dir()
        for path in sorted(set(folder.iterdir()).difference(_images_of(folder)))
        if not path.name.startswith(".") and path != output
    ]
    kinds = {
        "subfolders are passed over, give them as inputs of their own": lambda path: path.is_dir(),
        "files without the name of an image that can be read are passed over": os.path.isfile,
    }
    lines = []
    for what, is_kind in kinds.items():
        if paths := list(filter(is_kind, there)):
            lines.append(f"{what}: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}")
    return lines


def generate_folder(
    generator: SamAutomaticMaskGenerator,
    pictures: Sequence[Path],
    results: Results,
    on_image: Callable[[], None],
    on_failure: Callable[[Path, str], None],
) -> None:
    """Generates and writes the masks of pictures, as many at a time as the generator has devices.

    Pictures are read before, and results written after, while the devices work on others.

    Args:
        generator: its output mode must be "uncompressed_rle".
        pictures: files.
        results: where to write.
        on_image: called for each image that cannot be read, or whose masks are found.
        on_failure: called with each image that could not be read or written, and the cause.

    Raises:
        OSError: if the disk is full or read-only.
        NonFiniteError: if the model predicts NaN or infinity.
    """
    taken: collections.deque[tuple[Path, np.ndarray]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
        for picture in pictures:
            try:
                image = load_image(picture)
            except (OSError, ValueError, TypeError) as error:
                on_failure(picture, _one_line(error))
                on_image()
            else:
                taken.append((picture, image))
                yield image

    def finish(picture: Path, writing: Future) -> None:
        try:
            writing.result()
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            on_failure(picture, _one_line(error))

    before = None
    with ThreadPoolExecutor(1) as writer:
        for found in generator.generate_batch(images(), on_image):
            picture, image = taken.popleft()
            writing = picture, writer.submit(results.write, picture, image, found)
            if before is not None:
                finish(*before)
            before = writing
        if before is not None:
            finish(*before)


def generate_with_ray(
    address: str | None,
    model: str,
    dtype: str,
    options: dict[str, Any],
    pictures: Sequence[Path],
    results: Results,
    on_image: Callable[[], None],
    on_failure: Callable[[Path, str], None],
) -> None:
    """`generate_folder` on the machines of a Ray cluster, which must all see the same folders.

    Ray Data schedules the pictures on actors (as many as GPUs, or as machines if there are none),
    which load the model once and compile once. What a lost one was at is tried again by
    another, which passes over what is finished; an image at which three were lost has failed.

    Args:
        address: of the cluster; None for one that runs on this machine or a new one.
        model: what `from_pretrained` takes, on every machine.
        dtype: likewise.
        options: of `SamAutomaticMaskGenerator`.
        pictures: files.
        results: where to write.
        on_image: as for `generate_folder`.
        on_failure: likewise.

    Raises:
        ValueError: if Ray is not installed, for arguments that cannot be, and if the run fails.
        ConnectionError: if nothing answers at the address.
    """
    check_arguments(**options)
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("Ray is not installed; install sam_jax with its extra `ray`") from error
    _check_reachable(address)
    ours = not ray.is_initialized()
    ray.init(address, log_to_driver=False, logging_level="warning", ignore_reinit_error=True)
    try:
        with temporary_folder(results.folder) as tries:
            results = dataclasses.replace(results, folder=results.folder.absolute())
            worker = model, dtype, options, results, tries.absolute()
            for row in _rows_of_ray(ray, worker, pictures):
                if row["problem"]:
                    on_failure(Path(row["picture"]), row["problem"])
                on_image()
    except ray.exceptions.RayError as error:
        raise ValueError(f"the run on Ray failed: {_one_line(error)}") from error
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray waits for minutes for a cluster that is not there."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host:  # None, "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error


def _rows_of_ray(ray, worker: tuple, pictures: Sequence[Path]) -> Iterator[dict[str, str]]:
    """What `_Worker` returns, for each picture.

    Raises:
        ValueError: for what would happen to each of them.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    rows = ray.data.from_items(
        [{"picture": str(picture), "absolute": str(picture.absolute())} for picture in pictures],
        override_num_blocks=min(len(pictures), 1000),
    ).map(
        _Worker,
        fn_constructor_args=worker,
        concurrency=(1, gpus or machines),
        num_gpus=1 if gpus else None,
        scheduling_strategy="SPREAD",
    )
    outcomes = set()
    for row in rows.iter_rows():
        outcomes.add(row["outcome"])
        if "error" in outcomes or outcomes == {"unmade"}:
            raise ValueError(f"the run on Ray failed at {row['picture']}: {row['problem']}")
        yield row


class _Worker:
    """A Ray actor: a generator that does one picture after the other.

    Ray would start one that dies again without end, at the same picture, and hide the cause of
    an exception. So tries are counted, in files, and an exception is a result.
    """

    def __init__(
        self, model: str, dtype: str, options: dict[str, Any], results: Results, tries: Path
    ):
        self.model, self.dtype, self.options = model, dtype, options
        self.results, self.tries = results, tries

    @functools.cached_property
    def generator(self) -> SamAutomaticMaskGenerator:
        """Made at the first picture: where making it kills the worker, that counts as a try."""
        sam = from_pretrained(self.model, dtype=self.dtype)
        return SamAutomaticMaskGenerator(sam, **self.options)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Adds to the row `outcome` and `problem`.

        The outcome is "worked"; "lost", if the image's workers died, or "unmade", if they did so
        before they had a generator; or an "error" that ends the run.
        """
        picture, problems = Path(row["absolute"]), []
        tries = self.tries / picture.name
        try:
            if not self.results.is_finished(picture):
                made = tries.read_bytes() if tries.exists() else b""  # a byte for each try
                if len(made) >= _TRIES:
                    problem = (
                        f"its worker died at each of {_TRIES} tries (killed, or out of memory); "
                        "try it without --ray"
                    )
                    outcome = "lost" if b"+" in made else "unmade"
                    return {**row, "outcome": outcome, "problem": problem}
                tries.write_bytes(made + b"-")
                generator = self.generator
                tries.write_bytes(made + b"+")
                generate_folder(
                    generator,
                    [picture],
                    self.results,
                    on_image=lambda: None,
                    on_failure=lambda _, problem: problems.append(problem),
                )
                tries.unlink()
        except Exception as error:
            problem = f"{type(error).__name__}: {_one_line(error)}"
            return {**row, "outcome": "error", "problem": problem}
        return {**row, "outcome": "worked", "problem": "".join(problems)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _source(picture: Path) -> dict[str, Any]:
    """What tells a picture from another of its name, and from itself before a change."""
    stat = picture.stat()
    return {"file": picture.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _write_pngs(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir()
    with (folder / _TABLE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        for i, record in enumerate(records):
            mask = rle_decode(record["segmentation"])
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{i}.png")
            (point,) = record["point_coords"]
            scores = record["predicted_iou"], record["stability_score"]
            table.writerow(
                [i, record["area"], *record["bbox"], *point, *scores, *record["crop_box"]]
            )


def _part(picture: Path, image: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    height, width = image.shape[:2]
    records = [{**r, "segmentation": rle_compress(r["segmentation"])} for r in records]
    size = {"height": height, "width": width}
    return {"image": {"file_name": picture.name, **size}, "annotations": records}


def _read_ids(file: Path) -> list[tuple[str, int]]:
    """`ids.json`: for image ids 1, 2, ... the part's name and how many annotations it has.

    Annotation ids count on from image to image. An image that is there twice has the last id.
    """
    try:
        ids = [(str(name), int(count)) for name, count in read_json(file)]
    except (OSError, ValueError, TypeError, OverflowError):  # there is none yet, or it is damaged
        return []
    return ids if all(count >= 0 for _, count in ids) else []


def _write_coco(
    path: Path, parts: dict[str, Path], ids: list[tuple[str, int]], segmentation: Segmentation
) -> tuple[list[str], list[tuple[str, int]]]:
    """COCO's file, one part in memory at a time.

    Args:
        path: what to write.
        parts: by name.
        ids: those of an earlier run, which stay.
        segmentation: of the annotations.

    Returns:
        What there is to say, and the ids.
    """
    info = {
        "description": "Masks of everything in the images, found by Segment Anything",
        "contributor": f"sam_jax {sam_jax.__version__}",
        # Sizes and masks are those of the images as they are shown, not as they are stored.
        "exif_orientation": "applied",
    }
    header = {"info": info, "licenses": [], "categories": [_CATEGORY]}
    first_of = list(itertools.accumulate((count for _, count in ids), initial=1))
    known = {name: i for i, (name, _) in enumerate(ids)}
    ids, images, ious, empty, left_out = list(ids), [], [], 0, []
    with path.open("w") as file:
        file.write(json.dumps(header)[:-1] + ', "annotations": [')
        comma = "\n"
        for name in tqdm(sorted(parts, key=lambda n: known.get(n, len(known))), delay=2):
            try:
                image, annotations = _read_part(parts[name], segmentation)
            except (OSError, ValueError, KeyError, TypeError) as error:
                left_out.append(
                    f"{parts[name]} was left out, it is damaged: {_one_line(error)}; remove it and "
                    "generate its image again"
                )
                continue
            i = known.get(name, len(ids))
            if i == len(ids) or ids[i][1] != len(annotations):
                i = len(ids)
                ids.append((name, len(annotations)))
                first_of.append(first_of[-1] + len(annotations))
            images.append({"id": i + 1, **image})
            for annotation_id, annotation in enumerate(annotations, start=first_of[i]):
                if not annotation["segmentation"]:
                    empty += 1
                    continue
                ious.append(annotation.pop("iou", 1.0))
                keys = {"id": annotation_id, "image_id": i + 1, "category_id": 1}
                file.write(comma + json.dumps({**keys, **annotation}, allow_nan=False))
                comma = ",\n"
        file.write('\n], "images": ' + json.dumps(sorted(images, key=lambda x: x["id"])) + "}\n")
    said = f"{len(images)} images, {len(ious)} masks"
    if segmentation == "polygons" and ious:
        said += f"; IoU of polygons and masks {np.mean(ious):.4f}, the least {min(ious):.4f}"
    if empty:
        said += f"; {empty} empty masks have no polygon and were left out"
    return [said, *left_out], ids


_CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}


def _read_part(
    path: Path, segmentation: Segmentation
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part's image, and its records as COCO has annotations."""
    part = read_json(path)
    image = {key: part["image"][key] for key in ("file_name", "height", "width")}
    return image, [_annotation(record, segmentation) for record in part["annotations"]]


def _annotation(record: dict[str, Any], segmentation: Segmentation) -> dict[str, Any]:
    """COCO's annotation, of a part's record.

    In COCO a box has its last pixels, too: a mask of one pixel is 1 wide, where Meta has 0. With
    polygons there is `iou`, with the mask; for an empty mask there is none.
    """
    rle, scores = record["segmentation"], (record["predicted_iou"], record["stability_score"])
    if not np.isfinite(scores).all():
        raise ValueError("it has scores that are not finite")
    counts = rle_uncompress(rle)
    check_rle(counts)  # pycocotools checks nothing that it is given
    annotation = {
        **record,
        "bbox": pycocotools.mask.toBbox(rle).astype(int).tolist(),
        "score": record["predicted_iou"],
        "iscrowd": 0,
    }
    if segmentation == "polygons":
        annotation["segmentation"] = polygons = mask_to_polygons(rle_decode(counts))
        if polygons:
            drawn = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *rle["size"]))
            annotation["iou"] = float(pycocotools.mask.iou([drawn], [rle], [0])[0, 0])
    return annotation


def _draw(image: np.ndarray, records: list[dict[str, Any]]) -> Image.Image:
    """The picture with its masks, small ones over large ones."""
    largest_first = sorted(records, key=lambda record: -record["area"])
    return overlay(image, (rle_decode(record["segmentation"]) for record in largest_first))
