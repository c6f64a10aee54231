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
from sam_jax.files import (
    atomic_write,
    check_or_write_settings,
    read_json,
    remove_leftovers,
    write_json,
)
from sam_jax.ops.regions import mask_to_polygons
from sam_jax.ops.rle import check_rle, rle_compress, rle_decode, rle_uncompress
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
    Meta's `amg.py` writes them, and `source.json`, which names the image. "coco": the records of
    each image in `parts/`, joined as `annotations.json` at the end of a run (category "object"),
    and `ids.json`, which keeps ids the same from run to run."""
    overlays: bool = False
    """Whether each image is also written with its masks: `<stem>/overlay.png`, or for "coco"
    `overlays/<stem>.png`."""
    segmentation: Segmentation = "rle"
    """Of "coco": how `annotations.json` holds masks."""

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
        check_or_write_settings(self.folder / _SETTINGS, settings, any(itertools.chain(*results)))
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
            with atomic_write(self._result(picture)) as path:
                _write_pngs(path, records)
                (path / _SOURCE).write_text(json.dumps(_source(picture)))
                if drawn:
                    drawn.save(path / "overlay.png")
            return
        if drawn:
            with atomic_write(self.folder / _OVERLAYS / f"{picture.stem}.png") as path:
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
        with atomic_write(self.folder / ANNOTATIONS) as path:
            said, ids = _write_coco(path, parts, _read_ids(self.folder / _IDS), self.segmentation)
            write_json(self.folder / _IDS, ids)
        return [f"{self.folder / ANNOTATIONS}: {said[0]}", *said[1:]]

    def _result(self, picture: Path) -> Path:
        if self.format == "png":
            return self.folder / picture.stem
        return self.folder / _PARTS / f"{picture.stem}.json"


def one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
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
                    f"{parts[name]} was left out, it is damaged: {one_line(error)}; remove it and "
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
            ious = np.asarray(pycocotools.mask.iou([drawn], [rle], [0]))
            annotation["iou"] = float(ious[0, 0])
    return annotation


def _draw(image: np.ndarray, records: list[dict[str, Any]]) -> Image.Image:
    """The picture with its masks, small ones over large ones."""
    largest_first = sorted(records, key=lambda record: -record["area"])
    return overlay(image, (rle_decode(record["segmentation"]) for record in largest_first))
