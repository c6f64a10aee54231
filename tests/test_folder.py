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

import numpy as np
import pycocotools.coco
import pytest
from cores import all_cores
from PIL import Image
from reference import SMALL, meta_sam, ours
from test_mask_generator import ALL, picture

from sam_jax import cli, from_pretrained, save_pretrained
from sam_jax.folder import Results, find_pictures, generate_folder
from sam_jax.mask_generator import SamAutomaticMaskGenerator

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


def test_coco(run, expected, tmp_path, capsys):
    assert run("--format", "coco", "--overlays")[0] is None
    assert {f"overlays/{n}.png" for n in SIZES} < files(tmp_path / "out")
    coco = pycocotools.coco.COCO(tmp_path / "out/annotations.json")
    assert coco.loadCats(coco.getCatIds()) == [{"id": 1, "name": "object"}]
    for image in coco.loadImgs(coco.getImgIds()):
        records = expected[Path(image["file_name"]).stem]
        assert (image["height"], image["width"]) == SIZES[Path(image["file_name"]).stem]
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        for annotation, record in zip(annotations, records, strict=True):
            assert annotation["area"] == record["area"]
            assert annotation["bbox"] == record["bbox"]
            assert annotation["predicted_iou"] == record["predicted_iou"]
            np.testing.assert_array_equal(coco.annToMask(annotation), record["segmentation"])
    assert len(coco.getImgIds()) == 3


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
        if p.is_file() and p.name != "annotations.json"
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

    monkeypatch.setattr(cli, "generate_folder", stop)
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
    assert message.startswith("sam-jax: 3 could not be read:\n")
    for name in ("empty.png", "cut.png", "damaged.avif"):
        assert f"  {photos / name}: " in message
    assert printed.out.startswith("3 of 6 pictures")
    assert not any("empty" in f or "cut" in f or "notes" in f for f in files(tmp_path / "out"))
    if kind == "coco":
        images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
        assert [image["file_name"] for image in images] == ["small.png", "tall.png", "wide.png"]


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
    finally:
        cluster.communicate("\n", timeout=60)
    assert process.returncode == 1, errors
    assert "1 could not be read:" in errors
    assert f"  {photos / 'bad.png'}: " in errors
    assert "23 of 24 pictures" in printed
    coco = json.loads((tmp_path / "out/annotations.json").read_text())
    names = [image["file_name"] for image in coco["images"]]
    assert len(names) == len(set(names)) == 23
    alone = Results(tmp_path / "alone", "coco")
    alone.begin({}, [])
    generator = SamAutomaticMaskGenerator(
        from_pretrained(model),
        pred_iou_thresh=0,
        stability_score_thresh=0,
        points_per_side=4,
        output_mode="uncompressed_rle",
    )
    generate_folder(generator, [photos / "wide.png"], alone, lambda *_: None)
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
    assert "there is no picture in" in run(inputs=[tmp_path / "empty"])[0]
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
    rle = {"size": [2, 2], "counts": [1, 2, 1]}
    record = {"segmentation": rle, "area": 2, "bbox": [0, 0, 1, 1], "point_coords": [[0.0, 0.0]]}
    record |= {"predicted_iou": 1.0, "stability_score": 1.0, "crop_box": [0, 0, 2, 2]}
    with pytest.raises(OSError, match="No space"):
        Results(tmp_path).write(Path("a.png"), np.zeros((2, 2, 3), np.uint8), [record])
    assert list(tmp_path.iterdir()) == []
