import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pycocotools.coco
import pytest
from cores import all_cores
from everything import ALL, picture
from flax import nnx
from PIL import Image
from reference import SMALL, meta_sam, ours

import sam_jax
from sam_jax import cli, from_pretrained, save_pretrained
from sam_jax.automatic.folder import find_pictures, generate_folder
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.results import Results
from sam_jax.files import lock_folder
from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.rle import rle_encode

pytestmark = pytest.mark.slow

SIZES = {"wide": (60, 110), "tall": (130, 70), "small": (20, 25)}
ALL_PASS = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
OPTIONS = [*ALL_PASS, "--points-per-side", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(ours(meta_sam(SMALL), SMALL), path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(*size, seed=i)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(model, photos, tmp_path, monkeypatch, capsys):
    """Runs the command; returns its exit message and what it printed."""

    def run(*arguments, inputs=(photos,), options=OPTIONS, output=tmp_path / "out"):
        command = ["sam-jax", "generate", *inputs, "--output", output, "--model", model]
        monkeypatch.setattr(sys, "argv", [str(a) for a in (*command, *options, *arguments)])
        message = None
        try:
            cli.main()
        except SystemExit as error:
            message = error.code
        return message, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def expected(model):
    options = {**ALL, "box_nms_thresh": 0.7, "points_per_side": 4}
    generator = SamAutomaticMaskGenerator(from_pretrained(model), **options)
    return {
        name: generator.generate(picture(*size, seed=i))
        for i, (name, size) in enumerate(SIZES.items())
    }


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_png_folders(run, expected, tmp_path):
    message, printed = run("--overlays")
    assert message is None
    assert printed.out == f"3 of 3 pictures in {tmp_path / 'out'}\n"
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
    """What pycocotools, FiftyOne and CVAT expect."""
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
    # Scores and segments are results to pycocotools, too.
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
    said = f"3 images, {count} masks; IoU of polygons and masks 1.0000, the least 1.0000"
    assert said in printed.out
    assert "--segmentation polygons is for --format coco" in run("--segmentation", "polygons")[0]


def record(mask):
    """A record of `SamAutomaticMaskGenerator`."""
    x0, y0, x1, y1 = mask_to_box(mask).tolist()
    height, width = mask.shape
    record = {"segmentation": rle_encode(mask), "area": int(mask.sum())}
    record |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "point_coords": [[0.0, 0.0]]}
    record |= {"crop_box": [0, 0, width, height], "predicted_iou": 1.0, "stability_score": 1.0}
    return record


def test_small_and_empty_masks(photos, tmp_path):
    """A mask of one pixel is one pixel wide; of an empty one there is no polygon."""
    masks = np.zeros((2, *SIZES["small"]), bool)
    masks[0, 7, 9] = True
    image = np.zeros((*SIZES["small"], 3), np.uint8)
    for segmentation in ("rle", "polygons"):
        results = Results(tmp_path / "out", "coco", segmentation=segmentation)
        results.begin({}, [])
        results.write(photos / "small.png", image, [record(mask) for mask in masks])
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
    """Those of earlier runs, too, with the ids that they had."""
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

    # Of what is damaged or gone the ids are given to nothing else, and it is said.
    (tmp_path / "out/parts/small.json").write_text("{")
    message, printed = run("--format", "coco", inputs=[photos / "tall.png"])
    assert message is None
    assert "parts/small.json was left out, it is damaged: " in printed.err
    third = json.loads(file.read_text())
    assert third["images"] == second["images"][1:]
    gone = second["images"][0]["id"]
    assert third["annotations"] == [a for a in second["annotations"] if a["image_id"] != gone]
    run("--format", "coco", inputs=[photos])
    assert json.loads(file.read_text()) == second


@pytest.mark.parametrize(
    "ids", ["[", "5", '[["small"]]', '[["small", -5], ["wide", 0]]', "[" * 500], ids=str
)
def test_damaged_ids_are_made_again(run, tmp_path, ids):
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
        results.write(photos / f"{name}.png", np.zeros((*mask.shape, 3), np.uint8), [record(mask)])
    part = tmp_path / "out/parts/small.json"
    content = json.loads(part.read_text())
    content["annotations"][0].update(damage)
    part.write_text(json.dumps(content))
    said, left_out = results.finish()
    assert "1 images, 1 masks" in said
    assert left_out.startswith(f"{part} was left out, it is damaged: ")
    assert "NaN" not in (tmp_path / "out/annotations.json").read_text()


def test_in_bfloat16(run, model, tmp_path, expected):
    assert run("--format", "coco", "--dtype", "bfloat16")[0] is None
    found = json.loads((tmp_path / "out/parts/small.json").read_text())["annotations"]
    options = {**ALL, "box_nms_thresh": 0.7, "points_per_side": 4}
    sam = from_pretrained(model, dtype="bfloat16")
    records = SamAutomaticMaskGenerator(sam, **options).generate(
        picture(*SIZES["small"], seed=list(SIZES).index("small"))
    )
    scores = [annotation["predicted_iou"] for annotation in found]
    assert scores == [record["predicted_iou"] for record in records]
    assert scores != [record["predicted_iou"] for record in expected["small"]]
    # Results of both are not mixed.
    assert "dtype was 'bfloat16' and is 'float32'" in run("--format", "coco")[0]


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_what_is_finished_is_passed_over(run, tmp_path, kind):
    run("--format", kind)
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in (tmp_path / "out").rglob("*.*")
        if p.is_file() and p.name not in ("annotations.json", "ids.json")
    }
    # One result is lost, and a half-written one was left behind by a run that was killed.
    lost = tmp_path / "out" / ("wide/metadata.csv" if kind == "png" else "parts/wide.json")
    content = lost.read_bytes()
    if kind == "png":
        shutil.rmtree(lost.parent)
    else:  # what a power failure may leave of it
        lost.write_bytes(content[:100])
    message, printed = run("--format", kind)
    assert message is None
    assert printed.out.startswith("3 of 3 pictures")
    assert lost.read_bytes() == content
    for path, (time_written, data) in before.items():
        assert path.read_bytes() == data
        if "wide" not in str(path):
            assert path.stat().st_mtime_ns == time_written
    assert run("--format", kind)[0] is None  # nothing to do


def test_other_settings_are_refused(run, tmp_path):
    run()
    message, _ = run("--crop-n-layers", "1")
    assert "has results of other settings: crop_n_layers was 0 and is 1" in message
    message, _ = run("--format", "coco")
    assert "format was 'png' and is 'coco'" in message
    assert run("--points-per-batch", "5")[0] is None  # which changes no result
    (tmp_path / "out/sam_jax.json").write_text("[")
    assert "has results, but their sam_jax.json cannot be read" in run()[0]


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_another_picture_of_the_same_name(run, photos, tmp_path, kind):
    run("--format", kind)
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(picture(30, 30)).save(other / "wide.png")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*") if p.is_file()}
    message, _ = run("--format", kind, inputs=[other])
    assert "is the result of another picture than" in message
    os.utime(photos / "tall.png", (1, 1))
    message, _ = run("--format", kind)
    assert "or of what that was before it was changed; remove it" in message
    assert {p: p.read_bytes() for p in before} == before


def test_files_of_others_are_not_overwritten(run, photos, tmp_path):
    for name in ("annotations.json", "parts"):
        output = tmp_path / name
        output.mkdir()
        (output / name).write_text("mine")
        message, _ = run("--format", "coco", output=output)
        assert f"{output / name} is not of an earlier run, and is not overwritten" in message
        assert (output / name).read_text() == "mine"
    (tmp_path / "out/wide").mkdir(parents=True)
    (tmp_path / "out/wide/0.png").write_text("mine")
    message, _ = run()
    assert "is where the result of" in message
    assert files(tmp_path / "out") == {"wide/0.png", "sam_jax.json"}
    message, _ = run(output=photos)
    assert "is an input, too; choose another folder" in message
    (photos / "parts.png").write_bytes((photos / "wide.png").read_bytes())
    assert "would be written as 'parts', a name of ours" in run(output=tmp_path / "new")[0]


def test_overlays_are_a_setting(run):
    run()
    assert "overlays was False and is True" in run("--overlays")[0]


def test_stopping(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_jax.automatic.folder.generate_folder", stop)
    message, printed = run()
    assert message == 130
    assert printed.err.endswith("sam-jax: stopped\n")


def test_names_may_be_as_long_as_the_system_allows(run, photos, tmp_path):
    name = "x" * 246
    (photos / "wide.png").rename(photos / f"{name}.png")
    assert run()[0] is None
    assert (tmp_path / "out" / name / "metadata.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray", "--points-per-batch", "0"], "points_per_batch is 0, expected a whole number"),
        (["--ray", "--devices", "1"], "--devices is for this machine; it cannot be given with"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--stability-score-offset", "nan"], "stability_score_offset is nan, expected a number"),
    ],
    ids=str,
)
def test_refused_before_anything_is_done(run, tmp_path, arguments, message):
    assert message in run(*arguments)[0]
    assert not list(tmp_path.glob("out/*/*"))


def test_a_run_that_came_to_nothing_binds_no_other(run):
    assert "crop_overlap_ratio is 2.0" in run("--crop-overlap-ratio", "2")[0]
    assert run()[0] is None


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_bad_pictures_do_not_stop_the_rest(run, photos, tmp_path, kind):
    (photos / "empty.png").touch()
    whole = (photos / "wide.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not looked at")
    (photos / "wide.json").write_text("not looked at: SA-1B has such beside its pictures")
    pixels = io.BytesIO()
    Image.fromarray(picture(20, 20)).save(pixels, "AVIF")
    (photos / "damaged.avif").write_bytes(pixels.getvalue()[:300])
    (photos / ".hidden").write_text("not looked at")
    message, printed = run("--format", kind)
    assert message.startswith("sam-jax: 3 failed:\n")
    for name in ("empty.png", "cut.png", "damaged.avif"):
        assert f"  {photos / name}: " in message
    assert printed.out.startswith("3 of 6 pictures")
    assert not any("empty" in f or "cut" in f or "notes" in f for f in files(tmp_path / "out"))
    if kind == "coco":
        images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
        assert [image["file_name"] for image in images] == ["small.png", "tall.png", "wide.png"]


def test_what_is_no_image_and_what_lies_deeper(run, photos, tmp_path):
    """Only what can be read counts, and folders are not passed over without a word."""
    for name in ("notes.pdf", "data.h5", "vector.eps", "film.mpg", "plot.svg", "list.fits"):
        (photos / name).touch()
    (photos / "inner.png").mkdir()
    (photos / "more").mkdir()
    (photos / "more" / "deep.png").write_bytes((photos / "wide.png").read_bytes())
    message, printed = run(output=photos / "out")
    assert message is None
    assert printed.out.startswith("3 of 3 pictures")
    assert f"as inputs of their own: {photos / 'inner.png'} and 1 more\n" in printed.err
    assert f"that can be read are passed over: {photos / 'data.h5'} and 5 more\n" in printed.err
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no image in .*outer; subfolders are passed over, giv"):
        find_pictures([tmp_path / "outer"])


def test_one_that_cannot_be_written_does_not_stop_the_rest(run, photos, tmp_path):
    longest = "x" * 251 + ".png"  # with .json it is longer than a name may be
    (photos / "wide.png").rename(photos / longest)
    (photos / "gone.png").symlink_to("nowhere")
    (photos / "loop.png").symlink_to("loop.png")
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/sam_jax.json").write_text("{}")
    message, printed = run("--format", "coco")
    assert message.startswith("sam-jax: 3 failed:\n")
    assert f"{longest}: [Errno 36] File name too long" in message
    assert f"{photos / 'gone.png'}: [Errno 2] No such file or directory" in message
    assert printed.out.startswith("2 of 5 pictures")
    images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["small.png", "tall.png"]
    assert {p.stem for p in (tmp_path / "out/parts").iterdir()} == {"small", "tall"}


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_a_full_disk_ends_the_run(run, tmp_path, monkeypatch, kind):
    """With one line: every further image would fail, too."""
    write, written = Results.write, []

    def full(results, picture, *others):
        if written:
            raise OSError(28, "No space left on device")
        written.append(picture)
        write(results, picture, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", full)
        message, printed = run("--format", kind)
    assert message == "sam-jax: [Errno 28] No space left on device"
    assert printed.out == ""
    assert len(written) == 1
    assert run("--format", kind)[0] is None


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_two_runs_into_one_folder(run, tmp_path, kind):
    """The second says that the first is running, and leaves its folder alone."""
    with lock_folder(tmp_path / "out"):
        message, printed = run("--format", kind)
        assert os.listdir(tmp_path / "out") == [".sam_jax.lock"]
    assert message.startswith(f"sam-jax: another run is working in {tmp_path / 'out'} (process ")
    assert f"{os.getpid()} on " in message
    assert "\n" not in message
    assert printed.out == printed.err == ""
    # That of a run that was killed holds nobody up.
    (tmp_path / "out/.sam_jax.lock").write_text("process 1 on elsewhere, since yesterday")
    (tmp_path / "out/.sam_jax-killed").mkdir()
    (tmp_path / "out/.sam_jax-killed/0.png").touch()
    assert run("--format", kind)[0] is None
    assert not any(".sam_jax" in name for name in os.listdir(tmp_path / "out"))


def test_scores_that_are_not_finite(run, model, tmp_path):
    """No result with no masks, and no NaN in JSON."""
    sam = from_pretrained(model)
    head = sam.mask_decoder.iou_prediction_head
    nnx.update(head, jax.tree.map(lambda x: x * 1e37, nnx.state(head)))
    save_pretrained(sam, tmp_path / "huge")
    for options in ([], ALL_PASS):
        message, printed = run("--format", "coco", "--model", tmp_path / "huge", options=options)
        assert message.startswith("sam-jax: the model predicts IoUs that are NaN or infinite: ")
        assert "\n" not in message
        assert printed.out == ""
        assert files(tmp_path / "out") == {"sam_jax.json"}


def test_what_is_said_while_one_waits(run):
    _, printed = run("--format", "coco")
    lines = printed.err.replace("\r", "\n").splitlines()
    assert lines[0].startswith("compiling the image encoder and the mask decoder, once for all")
    assert lines[1].startswith("the first image took ")
    assert "image/s" in printed.err
    assert any("3/3" in line for line in lines)
    _, printed = run("--format", "coco")
    assert "compiling" not in printed.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "and 80 points are decoded instead of 16; expect 5 times the time"),
        (
            ["--crop-n-points-downscale-factor", "2"],
            "and 32 points are decoded instead of 16; expect 2.0 to 5 times the time",
        ),
    ],
    ids=str,
)
def test_crops_are_estimated_before_they_start(run, photos, options, said):
    _, printed = run("--crop-n-layers", "1", *options, inputs=[photos / "small.png"])
    line = printed.err.splitlines()[0]
    assert line.startswith("4 crops per image: the encoder runs 5 times instead of once, ")
    assert said in line


def test_a_run_that_is_killed_goes_on(model, photos, tmp_path, run, expected):
    """A process killed while it works leaves nothing half, and the next run does the rest."""
    for i in range(30):
        Image.fromarray(picture(40, 50, seed=i)).save(photos / f"more_{i:02}.png")
    command = [sys.executable, "-m", "sam_jax.cli", "generate", photos, "--output"]
    command += [tmp_path / "out", "--model", model, *OPTIONS, "--format", "coco"]
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "out/parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(parts.glob("[!.]*.json"))
    assert 2 <= len(done) < 33
    assert not (tmp_path / "out/annotations.json").exists()
    for part in done:
        json.loads(part.read_text())
    assert run("--format", "coco")[0] is None
    coco = json.loads((tmp_path / "out/annotations.json").read_text())
    names = [image["file_name"] for image in coco["images"]]
    assert len(names) == len(set(names)) == 33
    wide = coco["images"][names.index("wide.png")]["id"]
    found = [a for a in coco["annotations"] if a["image_id"] == wide]
    assert len(found) == len(expected["wide"])


# In a process of its own, since starting nodes forks it, which JAX does not bear.
CLUSTER = """
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""


# What kills its worker, and an error of Python's: a `Results` of its own, which Ray pickles.
POISONED = """
import os, sys
from pathlib import Path
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.ray_cluster import generate_with_ray
from sam_jax.automatic.results import Results

class Poisoned(Results):
    def write(self, picture, *others):
        with open(self.folder / "writes", "a") as file:
            file.write(picture.stem + " ")
        if picture.stem == "tall":
            os.kill(os.getpid(), 9)
        if self.overlays:
            raise RuntimeError("the cause")
        super().write(picture, *others)

address, model, photos, output = sys.argv[1:]
options = MaskGenerationOptions(1, output_mode="uncompressed_rle")
names = [Path(photos, f"{name}.png") for name in ("tall", "bad", "wide", "small")]
for names, breaks in ((names, False), (names[-1:], True)):
    results = Poisoned(Path(output, str(breaks)), "coco", breaks)
    results.begin({}, [])
    try:
        generate_with_ray(
            address, model, "float32", options, names, results, lambda: print("image"), print
        )
    except ValueError as error:
        print(error)
"""


def ray_workers():
    """The processes of Ray's actors, by what they call themselves."""
    workers = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = status.read_bytes()
        except OSError:  # it has just ended
            continue
        if name.startswith(b"ray::") and b"MapWorker" in name:
            workers.append(int(status.parent.name))
    return workers


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_two_machines_of_which_a_worker_is_killed(model, photos, tmp_path):
    """Ray Data on a cluster of two nodes: every picture once, though a worker is lost."""
    for i in range(20):
        Image.fromarray(picture(40, 50, seed=i)).save(photos / f"more_{i:02}.png")
    (photos / "bad.png").write_text("no picture")
    with all_cores():
        cluster = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    try:
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "sam_jax.cli", "generate", photos, "--output"]
        command += [tmp_path / "out", "--model", model, *OPTIONS, "--format", "coco"]
        command += ["--ray", address]
        process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        parts = tmp_path / "out/parts"
        deadline = time.monotonic() + 120
        while len(list(parts.glob("[!.]*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = ray_workers()
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        done = len(list(parts.glob("[!.]*.json")))
        assert done < 23, "all was done before a worker could be killed"
        printed, errors = process.communicate(timeout=180)
        poisoned = [sys.executable, "-c", POISONED, address, model, photos, tmp_path / "poisoned"]
        outcome = subprocess.run(
            [str(c) for c in poisoned], stdout=subprocess.PIPE, text=True, timeout=240, check=True
        ).stdout
    finally:
        cluster.communicate("\n", timeout=60)
    assert process.returncode == 1, errors
    assert "1 failed:" in errors
    assert f"  {photos / 'bad.png'}: " in errors
    assert "23 of 24 pictures" in printed
    coco = json.loads((tmp_path / "out/annotations.json").read_text())
    names = [image["file_name"] for image in coco["images"]]
    assert len(names) == len(set(names)) == 23

    # An image that kills its worker is tried three times; the others and the causes are there.
    lines = [line for line in outcome.splitlines() if line != "image" and "raylet" not in line]
    assert outcome.splitlines().count("image") == 4
    (bad,) = (line for line in lines if line.startswith(f"{photos / 'bad.png'} "))
    assert "is not an image of a known format" in bad
    (tall,) = (line for line in lines if line.startswith(f"{photos / 'tall.png'} "))
    assert "its worker died at each of 3 tries" in tall
    writes = (tmp_path / "poisoned/False/writes").read_text().split()
    assert sorted(writes) == ["small", "tall", "tall", "tall", "wide"]
    assert {p.stem for p in (tmp_path / "poisoned/False/parts").iterdir()} == {"small", "wide"}
    assert lines[-1].endswith(f"failed at {photos / 'small.png'}: RuntimeError: the cause")

    alone = Results(tmp_path / "alone", "coco")
    alone.begin({}, [])
    generator = SamAutomaticMaskGenerator(
        from_pretrained(model),
        pred_iou_thresh=0,
        stability_score_thresh=0,
        points_per_side=4,
        output_mode="uncompressed_rle",
    )
    generate_folder(generator, [photos / "wide.png"], alone, lambda: None, lambda *_: None)
    expected = json.loads((tmp_path / "alone/parts/wide.json").read_text())
    assert json.loads((parts / "wide.json").read_text()) == expected


def test_ray_is_asked_for_by_one_address(run):
    assert "--ray is 'a b', expected one address or none" in run("--ray", "a", "b")[0]


def test_point_grids(run, tmp_path):
    grid = tmp_path / "grid.json"
    grid.write_text("[[[0.5, 0.5], [0.25, 0.75]]]")
    assert run("--point-grids", grid, options=ALL_PASS)[0] is None
    with (tmp_path / "out/small/metadata.csv").open() as file:
        points = {(r["point_input_x"], r["point_input_y"]) for r in csv.DictReader(file)}
    assert points
    assert points <= {("12.5", "10.0"), ("6.25", "15.0")}

    other = {"options": ALL_PASS, "output": tmp_path / "other"}
    message, _ = run("--point-grids", grid, "--points-per-side", "2", **other)
    assert "expected exactly one" in message
    grid.write_text("[[[0.5, 2]]]")
    assert "point_grids[0] holds [0.5, 2.0]" in run("--point-grids", grid, **other)[0]
    grid.write_text("5")
    assert "is no JSON list of lists of points" in run("--point-grids", grid, **other)[0]


def test_bad_arguments(run, photos, tmp_path):
    assert "missing does not exist" in run(inputs=[tmp_path / "missing"])[0]
    (tmp_path / "empty").mkdir()
    assert "there is no image in" in run(inputs=[tmp_path / "empty"])[0]
    assert "--devices is 5, expected 1 to 1" in run("--devices", "5")[0]
    assert "points_per_batch is 0, expected" in run("--points-per-batch", "0")[0]
    (tmp_path / "file").touch()
    assert "file" in run(output=tmp_path / "file")[0]
    message, _ = run(inputs=[photos / "wide.png", tmp_path / "file"])
    assert message.startswith("sam-jax: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in run(output=tmp_path / "closed" / "out")[0]


def test_two_pictures_of_one_name(photos, tmp_path):
    (photos / "wide.jpg").write_bytes((photos / "wide.png").read_bytes())
    with pytest.raises(ValueError, match=r"would both be written as 'wide'"):
        find_pictures([photos])
    # The same file twice is one.
    assert find_pictures([photos / "tall.png"] * 2) == [photos / "tall.png"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    mask = np.eye(2, dtype=bool)
    with pytest.raises(OSError, match="No space"):
        Results(tmp_path).write(Path("a.png"), np.zeros((2, 2, 3), np.uint8), [record(mask)])
    assert list(tmp_path.iterdir()) == []
