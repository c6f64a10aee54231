"""The results of automatic mask generation in a folder: PNG masks, or COCO annotations."""

import csv
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image
from tqdm import tqdm

import sam_jax
from sam_jax.files import atomic_write, read_json, remove_leftovers, write_json
from sam_jax.ops.regions import mask_to_polygons
from sam_jax.ops.rle import check_rle, rle_compress, rle_decode, rle_uncompress
from sam_jax.runs import check_or_write_settings
from sam_jax.types import ResultsFormat, Segmentation
from sam_jax.visualize import overlay

ANNOTATIONS = "annotations.json"
_SETTINGS, _PARTS, _OVERLAYS, _IDS = "sam_jax.json", "parts", "overlays", "ids.json"
_TABLE, _SOURCE = "metadata.csv", "source.json"
RESERVED = (ANNOTATIONS, _SETTINGS, _PARTS, _OVERLAYS, _IDS)
_COLUMNS = (
    *("id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y"),
    *("predicted_iou", "stability_score", "crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h"),
)


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder of results, with the settings in `sam_jax.json`."""

    folder: Path
    """The folder."""
    format: ResultsFormat = "png"
    """The files. "png": `<stem>/0.png`, `1.png`, ... and `<stem>/metadata.csv` for each image, as
    Meta's `amg.py` writes them, and `source.json`, which identifies the image. "coco": the records
    of each image in `parts/`, joined into `annotations.json` at the end of a run (category
    "object"), and `ids.json`, which keeps ids the same from run to run."""
    overlays: bool = False
    """Whether each image is also written with its masks: `<stem>/overlay.png`, or for "coco"
    `overlays/<stem>.png`."""
    segmentation: Segmentation = "rle"
    """Form of the masks in `annotations.json` ("coco" only)."""

    def begin(self, settings: dict[str, Any], image_files: Sequence[Path]) -> list[Path]:
        """Creates the folder and returns the images that do not have a result in it yet.

        Raises:
            OSError: if it cannot be created or written to.
            ValueError: if its results were made with different settings or from different images,
                or if something else is in their place; the message names it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / _PARTS, self.folder / _OVERLAYS):
            remove_leftovers(folder)
        is_results_folder = (self.folder / _SETTINGS).exists()
        for name in (ANNOTATIONS, _PARTS, _OVERLAYS, _IDS) if self.format == "coco" else ():
            if not is_results_folder and (self.folder / name).exists():
                raise ValueError(
                    f"{self.folder / name} was not written by an earlier run and is not "
                    "overwritten; choose another output"
                )
        # Settings of a run without results do not bind later runs.
        results = (self.folder.glob(f"[!.]*/{_SOURCE}"), self.folder.glob(f"{_PARTS}/[!.]*"))
        settings = {"format": self.format, "overlays": self.overlays, **settings}
        has_results = any(itertools.chain(*results))
        check_or_write_settings(self.folder / _SETTINGS, settings, has_results=has_results)
        return [image_file for image_file in image_files if not self.is_finished(image_file)]

    def is_finished(self, image_file: Path) -> bool:
        """Whether there is a result for the image.

        Raises:
            ValueError: if something else, or the result of another image, is in its place.
        """
        result = self._result(image_file)
        try:
            if not result.exists():
                return False
            expected = _source(image_file)
        except OSError:  # reading or writing will fail too, and is reported for this image
            return False
        try:
            if self.format == "png":
                source = read_json(result / _SOURCE)
            else:
                source = read_json(result)["source"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self.format == "coco":  # damaged; `parts` holds only results, so write it again
                return False
            raise ValueError(
                f"{result} is where the result of {image_file} belongs, but is not a result "
                f"({error}); remove it or choose another output"
            ) from error
        if source != expected:
            raise ValueError(
                f"{result} is the result of a different image than {image_file}, or of an earlier "
                "version of it; remove it or choose another output"
            )
        return True

    def write(self, image_file: Path, image: np.ndarray, records: list[dict[str, Any]]) -> None:
        """Writes an image's records; their masks must be uncompressed run lengths."""
        drawn = _draw(image, records) if self.overlays else None
        if self.format == "png":
            with atomic_write(self._result(image_file)) as path:
                _write_pngs(path, records)
                (path / _SOURCE).write_text(json.dumps(_source(image_file)))
                if drawn:
                    drawn.save(path / "overlay.png")
            return
        if drawn:
            with atomic_write(self.folder / _OVERLAYS / f"{image_file.stem}.png") as path:
                drawn.save(path, format="PNG")
        part = {"source": _source(image_file), **_part(image_file, image, records)}
        write_json(self._result(image_file), part)

    def finish(self) -> list[str]:
        """Joins all parts of "coco", including those of earlier runs, into one file.

        Returns:
            Messages: what the file contains, and what was left out.
        """
        if self.format != "coco":
            return []
        parts = {path.stem: path for path in sorted((self.folder / _PARTS).glob("*.json"))}
        with atomic_write(self.folder / ANNOTATIONS) as path:
            said, ids = _write_coco(path, parts, _read_ids(self.folder / _IDS), self.segmentation)
            write_json(self.folder / _IDS, ids)
        return [f"{self.folder / ANNOTATIONS}: {said[0]}", *said[1:]]

    def _result(self, image_file: Path) -> Path:
        if self.format == "png":
            return self.folder / image_file.stem
        return self.folder / _PARTS / f"{image_file.stem}.json"


def one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())


def _source(image_file: Path) -> dict[str, Any]:
    """Identifies an image file and its version."""
    stat = image_file.stat()
    return {"file": image_file.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


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


def _part(image_file: Path, image: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    height, width = image.shape[:2]
    records = [{**r, "segmentation": rle_compress(r["segmentation"])} for r in records]
    size = {"height": height, "width": width}
    return {"image": {"file_name": image_file.name, **size}, "annotations": records}


def _read_ids(file: Path) -> list[tuple[str, int]]:
    """Reads `ids.json`: for image ids 1, 2, ... the part's name and number of annotations.

    Annotation ids continue from image to image. If an image occurs twice, its last id counts.
    """
    try:
        ids = [(str(name), int(count)) for name, count in read_json(file)]
    except (OSError, ValueError, TypeError, OverflowError):  # absent or damaged
        return []
    return ids if all(count >= 0 for _, count in ids) else []


def _write_coco(
    path: Path, parts: dict[str, Path], ids: list[tuple[str, int]], segmentation: Segmentation
) -> tuple[list[str], list[tuple[str, int]]]:
    """Writes COCO's file with one part in memory at a time.

    Args:
        path: the file to write.
        parts: the files of the parts by name.
        ids: the ids of earlier runs, which are kept.
        segmentation: the form of the masks.

    Returns:
        The messages of `finish`, and the ids.
    """
    info = {
        "description": "Masks of everything in the images, found by Segment Anything",
        "contributor": f"sam_jax {sam_jax.__version__}",
        # Sizes and masks refer to images as displayed, not as stored.
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
                    f"{parts[name]} is damaged and was left out: {one_line(error)}; remove it and "
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
    counts = {"image": len(images), "mask": len(ious)}
    said = ", ".join(f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items())
    if segmentation == "polygons" and ious:
        said += f"; IoU of polygons and masks: mean {np.mean(ious):.4f}, lowest {min(ious):.4f}"
    if empty:
        said += f"; {empty} empty masks have no polygon and were left out"
    return [said, *left_out], ids


_CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}


def _read_part(
    path: Path, segmentation: Segmentation
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A part's image and its COCO annotations."""
    part = read_json(path)
    image = {key: part["image"][key] for key in ("file_name", "height", "width")}
    return image, [_annotation(record, segmentation) for record in part["annotations"]]


def _annotation(record: dict[str, Any], segmentation: Segmentation) -> dict[str, Any]:
    """Converts a part's record to a COCO annotation.

    COCO's boxes include the last pixel: a mask of one pixel is 1 wide, but 0 wide in Meta's
    records. Polygons of a mask that is not empty have its IoU with them as `iou`.
    """
    rle, scores = record["segmentation"], (record["predicted_iou"], record["stability_score"])
    if not np.isfinite(scores).all():
        raise ValueError("it has scores that are not finite numbers")
    counts = rle_uncompress(rle)
    check_rle(counts)  # pycocotools does not check its input
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
            ious = np.asarray(pycocotools.mask.iou([drawn], [rle], [0]))
            annotation["iou"] = float(ious[0, 0])
    return annotation


def _draw(image: np.ndarray, records: list[dict[str, Any]]) -> Image.Image:
    """The image with its masks, small masks on top."""
    largest_first = sorted(records, key=lambda record: -record["area"])
    return overlay(image, (rle_decode(record["segmentation"]) for record in largest_first))
