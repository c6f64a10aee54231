import csv
import json
import os
from pathlib import Path

import numpy as np
import pycocotools.coco
import pytest
from everything import random_image
from folders import SIZES, files, record_of
from PIL import Image

import sam_jax
from sam_jax.automatic.results import Results

pytestmark = pytest.mark.slow


def test_png_folders(run, expected, tmp_path):
    message, printed = run("--overlays")
    assert message is None
    assert printed.out == f"3 of 3 images in {tmp_path / 'out'}\n"
    assert "image/s" in printed.err
    for name, records in expected.items():
        folder = tmp_path / "out" / name
        masks = {f"{i}.png" for i in range(len(records))}
        assert files(folder) == {"metadata.csv", "source.json", "overlay.png", *masks}
        with (folder / "metadata.csv").open() as file:
            rows = list(csv.DictReader(file))
        for i, (row, record) in enumerate(zip(rows, records, strict=True)):
            mask = np.asarray(Image.open(folder / f"{i}.png"))
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask == 255, record["segmentation"])
            assert row["id"] == str(i)
            assert row["area"] == str(record["area"])
            bbox = [int(row[f"bbox_{k}"]) for k in ("x0", "y0", "w", "h")]
            assert bbox == record["bbox"]
            assert float(row["predicted_iou"]) == record["predicted_iou"]
            assert [float(row["point_input_x"]), float(row["point_input_y"])] == record[
                "point_coords"
            ][0]


def test_coco(run, expected, tmp_path):
    """The file has what pycocotools, FiftyOne and CVAT expect."""
    message, printed = run("--format", "coco", "--overlays")
    assert message is None
    masks = sum(map(len, expected.values()))
    file = tmp_path / "out/annotations.json"
    assert printed.out.splitlines()[1:] == [f"{file}: 3 images, {masks} masks"]
    assert {f"overlays/{n}.png" for n in SIZES} < files(tmp_path / "out")
    coco = pycocotools.coco.COCO(file)
    assert coco.dataset["info"]["exif_orientation"] == "applied"
    assert sam_jax.__version__ in coco.dataset["info"]["contributor"]
    assert coco.dataset["licenses"] == []
    (category,) = coco.loadCats(coco.getCatIds())
    assert category == {"id": 1, "name": "object", "supercategory": "object"}
    for image in coco.loadImgs(coco.getImgIds()):
        assert image.keys() == {"id", "file_name", "height", "width"}
        records = expected[Path(image["file_name"]).stem]
        assert (image["height"], image["width"]) == SIZES[Path(image["file_name"]).stem]
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        for annotation, record in zip(annotations, records, strict=True):
            assert annotation["area"] == record["area"]
            box = pycocotools.mask.toBbox(annotation["segmentation"])
            assert annotation["bbox"] == box.tolist()
            if annotation["area"]:
                x, y, w, h = record["bbox"]
                assert annotation["bbox"] == [x, y, w + 1, h + 1]
            assert annotation["score"] == annotation["predicted_iou"] == record["predicted_iou"]
            assert annotation["iscrowd"] == 0
            np.testing.assert_array_equal(coco.annToMask(annotation), record["segmentation"])
    assert len(coco.getImgIds()) == 3
    # pycocotools can also load the annotations as results, with scores.
    assert len(coco.loadRes(coco.dataset["annotations"]).anns) == masks


def test_polygons(run, expected, tmp_path):
    assert run("--format", "coco")[0] is None
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/parts").iterdir()}
    message, printed = run("--format", "coco", "--segmentation", "polygons")
    assert message is None
    # Nothing was generated again.
    assert {p: p.stat().st_mtime_ns for p in parts} == parts
    count = 0
    coco = pycocotools.coco.COCO(tmp_path / "out/annotations.json")
    for image in coco.loadImgs(coco.getImgIds()):
        records = [r for r in expected[Path(image["file_name"]).stem] if r["area"]]
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        for annotation, record in zip(annotations, records, strict=True):
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in annotation["segmentation"])
            assert annotation["iscrowd"] == 0
            np.testing.assert_array_equal(coco.annToMask(annotation), record["segmentation"])
            count += 1
    said = f"3 images, {count} masks; IoU of polygons and masks: mean 1.0000, lowest 1.0000"
    assert said in printed.out
    assert "--segmentation polygons is for --format coco" in run("--segmentation", "polygons")[0]


def test_small_and_empty_masks(photos, tmp_path):
    """A mask of one pixel is one pixel wide; an empty mask has no polygon."""
    masks = np.zeros((2, *SIZES["small"]), bool)
    masks[0, 7, 9] = True
    image = np.zeros((*SIZES["small"], 3), np.uint8)
    for segmentation in ("rle", "polygons"):
        results = Results(tmp_path / "out", "coco", segmentation=segmentation)
        results.begin({}, [])
        results.write(photos / "small.png", image, [record_of(mask) for mask in masks])
        (said,) = results.finish()
        found = json.loads((tmp_path / "out/annotations.json").read_text())["annotations"]
        assert found[0]["bbox"] == [9, 7, 1, 1]
        if segmentation == "rle":
            assert found[1]["bbox"] == [0, 0, 0, 0]
        else:
            assert found[0]["segmentation"] == [[9, 7, 10, 7, 10, 8, 9, 8]]
            assert len(found) == 1
            assert said.endswith("; 1 empty masks have no polygon and were left out")


def test_all_parts_are_joined(run, photos, tmp_path):
    """Parts of earlier runs are included, and keep their ids."""
    run("--format", "coco", inputs=[photos / "wide.png", photos / "small.png"])
    file = tmp_path / "out/annotations.json"
    first = json.loads(file.read_text())
    assert [image["file_name"] for image in first["images"]] == ["small.png", "wide.png"]
    message, printed = run("--format", "coco", inputs=[photos / "tall.png"])
    assert message is None
    assert "out/annotations.json: 3 images, " in printed.out
    second = json.loads(file.read_text())
    assert second["images"][:2] == first["images"]
    assert second["images"][2]["file_name"] == "tall.png"
    assert second["annotations"][: len(first["annotations"])] == first["annotations"]
    ids = [annotation["id"] for annotation in second["annotations"]]
    assert ids == list(range(1, len(ids) + 1))

    # A warning names a damaged part. Its ids are not reused.
    (tmp_path / "out/parts/small.json").write_text("{")
    message, printed = run("--format", "coco", inputs=[photos / "tall.png"])
    assert message is None
    assert "parts/small.json is damaged and was left out: " in printed.err
    third = json.loads(file.read_text())
    assert third["images"] == second["images"][1:]
    gone = second["images"][0]["id"]
    assert third["annotations"] == [a for a in second["annotations"] if a["image_id"] != gone]
    run("--format", "coco", inputs=[photos])
    assert json.loads(file.read_text()) == second


@pytest.mark.parametrize(
    "ids", ["[", "5", '[["small"]]', '[["small", -5], ["wide", 0]]', "[" * 500], ids=str
)
def test_damaged_ids_are_recreated(run, tmp_path, ids):
    run("--format", "coco")
    before = (tmp_path / "out/annotations.json").read_bytes()
    (tmp_path / "out/ids.json").write_text(ids)
    assert run("--format", "coco")[0] is None
    assert (tmp_path / "out/annotations.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        {"segmentation": {"size": [20, 25], "counts": "o"}},
        {"segmentation": {"size": [20, 25], "counts": "0"}},
        {"segmentation": [1, 2]},
        {"predicted_iou": float("nan")},
        {"predicted_iou": "high"},
    ],
    ids=str,
)
def test_damaged_parts_are_left_out(photos, tmp_path, damage):
    mask = np.ones(SIZES["small"], bool)
    results = Results(tmp_path / "out", "coco", segmentation="polygons")
    results.begin({}, [])
    for name in ("small", "tall"):
        results.write(
            photos / f"{name}.png", np.zeros((*mask.shape, 3), np.uint8), [record_of(mask)]
        )
    part = tmp_path / "out/parts/small.json"
    content = json.loads(part.read_text())
    content["annotations"][0].update(damage)
    part.write_text(json.dumps(content))
    said, left_out = results.finish()
    assert "1 image, 1 mask" in said
    assert left_out.startswith(f"{part} is damaged and was left out: ")
    assert "NaN" not in (tmp_path / "out/annotations.json").read_text()


def test_other_settings_are_refused(run, tmp_path):
    run()
    message, _ = run("--crop-n-layers", "1")
    assert (
        "already contains results made with different settings: crop_n_layers was 0, now 1"
        in message
    )
    message, _ = run("--format", "coco")
    assert "format was 'png', now 'coco'" in message
    assert run("--points-per-batch", "5")[0] is None  # changes no result
    (tmp_path / "out/sam_jax.json").write_text("[")
    assert "has results, but their sam_jax.json cannot be read" in run()[0]


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_another_image_of_the_same_name(run, photos, tmp_path, kind):
    run("--format", kind)
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(random_image(30, 30)).save(other / "wide.png")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*") if p.is_file()}
    message, _ = run("--format", kind, inputs=[other])
    assert "is the result of a different image than" in message
    os.utime(photos / "tall.png", (1, 1))
    message, _ = run("--format", kind)
    assert "or of an earlier version of it; remove it" in message
    assert {p: p.read_bytes() for p in before} == before


def test_files_of_others_are_not_overwritten(run, photos, tmp_path):
    for name in ("annotations.json", "parts"):
        output = tmp_path / name
        output.mkdir()
        (output / name).write_text("mine")
        message, _ = run("--format", "coco", output=output)
        assert (
            f"{output / name} was not written by an earlier run and is not overwritten" in message
        )
        assert (output / name).read_text() == "mine"
    (tmp_path / "out/wide").mkdir(parents=True)
    (tmp_path / "out/wide/0.png").write_text("mine")
    message, _ = run()
    assert "is where the result of" in message
    assert files(tmp_path / "out") == {"wide/0.png", "sam_jax.json"}
    message, _ = run(output=photos)
    assert "is also an input; choose another folder" in message
    (photos / "parts.png").write_bytes((photos / "wide.png").read_bytes())
    assert (
        "would be written as 'parts', a name that sam_jax uses" in run(output=tmp_path / "new")[0]
    )


def test_overlays_are_a_setting(run):
    run()
    assert "overlays was False, now True" in run("--overlays")[0]


def test_names_may_be_as_long_as_the_system_allows(run, photos, tmp_path):
    name = "x" * 246
    (photos / "wide.png").rename(photos / f"{name}.png")
    assert run()[0] is None
    assert (tmp_path / "out" / name / "metadata.csv").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    mask = np.eye(2, dtype=bool)
    with pytest.raises(OSError, match="No space"):
        Results(tmp_path).write(Path("a.png"), np.zeros((2, 2, 3), np.uint8), [record_of(mask)])
    assert list(tmp_path.iterdir()) == []
