"""Everything-mode over a folder of pictures: what `sam-jax generate` does.

A run can be stopped at any time and started again. Each picture's result appears whole or not at
all, and pictures that have one are passed over.
"""

import collections
import csv
import dataclasses
import itertools
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sam_jax.checkpoints import from_pretrained
from sam_jax.files import replacing
from sam_jax.image import load_image
from sam_jax.mask_generator import SamAutomaticMaskGenerator, check_arguments
from sam_jax.ops.masks import rle_compress, rle_decode
from sam_jax.visualize import overlay

Format = Literal["png", "coco"]
ANNOTATIONS = "annotations.json"
_SETTINGS, _PARTS, _OVERLAYS = "sam_jax.json", "parts", "overlays"
_TABLE, _SOURCE = "metadata.csv", "source.json"
_RESERVED = (ANNOTATIONS, _SETTINGS, _PARTS, _OVERLAYS)
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
    * "coco": a file for each picture in `parts/`, put together as `annotations.json` at the end
      of a run (category "object", compressed run lengths), for the pictures of that run;
      `overlays/<stem>.png`.

    `sam_jax.json` has the settings.
    """

    folder: Path
    format: Format = "png"
    overlays: bool = False

    def begin(self, settings: dict[str, Any], pictures: Sequence[Path]) -> list[Path]:
        """Makes the folder; the pictures that have no result in it yet.

        Raises:
            OSError: if it cannot be made or written to.
            ValueError: if its results were made with other settings or of other pictures, or if
                something else is where they belong; the message names it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = (self.folder / _SETTINGS).exists()
        for name in (ANNOTATIONS, _PARTS, _OVERLAYS) if self.format == "coco" else ():
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
        if not result.exists():
            return False
        try:
            if self.format == "png":
                source = json.loads((result / _SOURCE).read_text())
            else:
                source = json.loads(result.read_text())["source"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self.format == "coco":  # damaged; all in `parts` is ours to write again
                return False
            raise ValueError(
                f"{result} is where the result of {picture} belongs, but is none ({error}); remove "
                "it or choose another output"
            ) from error
        if source != _source(picture):
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
        part = {"source": _source(picture), **_coco_part(picture, image, records)}
        with replacing(self._result(picture)) as path:
            path.write_text(json.dumps(part))

    def finish(self, pictures: Sequence[Path]) -> None:
        """Puts the parts of "coco" together in one file, in the order of `pictures`."""
        if self.format == "coco":
            parts = (self._result(p) for p in pictures if self.is_finished(p))
            with replacing(self.folder / ANNOTATIONS) as path:
                _write_coco(path, parts)

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
        with replacing(file) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    try:
        earlier = json.loads(file.read_text())
        other = [k for k in {**earlier, **settings} if earlier.get(k) != settings.get(k)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.parent} has results, but their {file.name} cannot be read: {error}"
        ) from error
    if other:
        names = ", ".join(f"{k} was {earlier.get(k)!r} and is {settings.get(k)!r}" for k in other)
        raise ValueError(f"{file.parent} has results of other settings: {names}")


def find_pictures(inputs: Iterable[Path]) -> list[Path]:
    """The files given, and of the folders given the files that are named as pictures, sorted.

    Hidden ones are passed over, and what Pillow knows no such name for.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: if there is none, or if two of them would have one result.
    """
    pictures: dict[str, Path] = {}
    inputs, known = list(inputs), Image.registered_extensions()
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            is_picture = file.suffix.lower() in known and not file.name.startswith(".")
            if path.is_dir() and not is_picture:
                continue
            if file.stem in _RESERVED:
                raise ValueError(
                    f"{file} would be written as {file.stem!r}, a name of ours; rename it"
                )
            other = pictures.setdefault(file.stem, file)
            if other.resolve() != file.resolve():
                raise ValueError(
                    f"{other} and {file} would both be written as {file.stem!r}; rename one, or "
                    "give them separately with another output"
                )
    if not inputs:
        raise ValueError("there is no input, expected pictures or folders of pictures")
    if not pictures:
        raise ValueError(f"there is no picture in {', '.join(map(str, inputs))}")
    return list(pictures.values())


def generate_folder(
    generator: SamAutomaticMaskGenerator,
    pictures: Sequence[Path],
    results: Results,
    on_picture: Callable[[Path, str | None], None],
) -> None:
    """Generates and writes the masks of pictures, as many at a time as the generator has devices.

    Pictures are read before, and results written after, while the devices work on others.

    Args:
        generator: its output mode must be "uncompressed_rle".
        pictures: files.
        results: where to write.
        on_picture: called for each picture once it is done, with what was wrong if it could not be
            read.
    """
    taken: collections.deque[tuple[Path, np.ndarray]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
        for picture, image in _read(pictures, on_picture):
            taken.append((picture, image))
            yield image

    def finish(picture: Path, writing: Future) -> None:
        writing.result()
        on_picture(picture, None)

    before = None
    with ThreadPoolExecutor(1) as writer:
        for found in generator.generate_batch(images()):
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
    on_picture: Callable[[Path, str | None], None],
) -> None:
    """`generate_folder` on the machines of a Ray cluster, which must all see the same folders.

    Ray Data schedules the pictures on actors (as many as GPUs, or as machines if there are none),
    which load the model once and compile once. What a lost one was at is tried again by
    another, which passes over what is finished.

    Args:
        address: of the cluster; None for one that runs on this machine or a new one.
        model: what `from_pretrained` takes, on every machine.
        dtype: likewise.
        options: of `SamAutomaticMaskGenerator`.
        pictures: files.
        results: where to write.
        on_picture: as for `generate_folder`.

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
        _run_on_ray(ray, model, dtype, options, pictures, results, on_picture)
    except ray.exceptions.RayError as error:
        raise ValueError(f"the run on Ray failed: {str(error).splitlines()[-1]}") from error
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


def _run_on_ray(ray, model, dtype, options, pictures, results, on_picture) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    results = dataclasses.replace(results, folder=results.folder.absolute())
    rows = ray.data.from_items(
        [{"picture": str(picture.absolute())} for picture in pictures],
        override_num_blocks=min(len(pictures), 1000),
    ).map(
        _Worker,
        fn_constructor_args=(model, dtype, options, results),
        concurrency=(1, gpus or machines),
        num_gpus=1 if gpus else None,
        scheduling_strategy="SPREAD",
    )
    given = {str(picture.absolute()): picture for picture in pictures}
    for row in rows.iter_rows():
        on_picture(given[row["picture"]], row["problem"] or None)


class _Worker:
    """A Ray actor: a generator that does one picture after the other."""

    def __init__(self, model: str, dtype: str, options: dict[str, Any], results: Results):
        sam = from_pretrained(model, dtype=dtype)
        self.generator = SamAutomaticMaskGenerator(sam, **options)
        self.results = results

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        picture, problems = Path(row["picture"]), []
        if not self.results.is_finished(picture):
            generate_folder(
                self.generator,
                [picture],
                self.results,
                lambda _, problem: problems.append(problem or ""),
            )
        return {"picture": row["picture"], "problem": "".join(problems)}


def _read(
    pictures: Iterable[Path], on_picture: Callable[[Path, str | None], None]
) -> Iterator[tuple[Path, np.ndarray]]:
    for picture in pictures:
        try:
            image = load_image(picture)
        except (OSError, ValueError, TypeError) as error:
            on_picture(picture, " ".join(str(error).split()))
        else:
            yield picture, image


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


def _coco_part(picture: Path, image: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    height, width = image.shape[:2]
    annotations = [
        {**record, "segmentation": rle_compress(record["segmentation"]), "iscrowd": 0}
        for record in records
    ]
    size = {"height": height, "width": width}
    return {"image": {"file_name": picture.name, **size}, "annotations": annotations}


def _write_coco(path: Path, parts: Iterable[Path]) -> None:
    """COCO's file, one part in memory at a time."""
    images, count = [], 0
    with path.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "object"}], "annotations": [')
        for image_id, part in enumerate(parts, start=1):
            values = json.loads(part.read_text())
            images.append({"id": image_id, **values["image"]})
            for annotation in values["annotations"]:
                file.write(",\n" if count else "\n")
                count += 1
                ids = {"id": count, "image_id": image_id, "category_id": 1}
                file.write(json.dumps({**ids, **annotation}))
        file.write('\n], "images": ' + json.dumps(images) + "}\n")


def _draw(image: np.ndarray, records: list[dict[str, Any]]) -> Image.Image:
    """The picture with its masks, small ones over large ones."""
    largest_first = sorted(records, key=lambda record: -record["area"])
    return overlay(image, (rle_decode(record["segmentation"]) for record in largest_first))
