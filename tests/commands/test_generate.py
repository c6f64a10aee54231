import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from everything import ALL, random_image
from flax import nnx
from folders import ALL_PASS, OPTIONS, SIZES, files
from PIL import Image

from sam_jax import from_pretrained, save_pretrained
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.results import Results
from sam_jax.runs import lock_folder

pytestmark = pytest.mark.slow


def test_in_bfloat16(run, model, tmp_path, expected):
    assert run("--format", "coco", "--dtype", "bfloat16")[0] is None
    found = json.loads((tmp_path / "out/parts/small.json").read_text())["annotations"]
    options = {**ALL, "box_nms_thresh": 0.7, "points_per_side": 4}
    sam = from_pretrained(model, dtype="bfloat16")
    records = SamAutomaticMaskGenerator(sam, **options).generate(
        random_image(*SIZES["small"], seed=list(SIZES).index("small"))
    )
    scores = [annotation["predicted_iou"] for annotation in found]
    assert scores == [record["predicted_iou"] for record in records]
    assert scores != [record["predicted_iou"] for record in expected["small"]]
    # Results of both dtypes are not mixed.
    assert "dtype was 'bfloat16', now 'float32'" in run("--format", "coco")[0]


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_finished_images_are_skipped(run, tmp_path, kind):
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
    else:  # as a power failure may leave it
        lost.write_bytes(content[:100])
    message, printed = run("--format", kind)
    assert message is None
    assert printed.out.startswith("3 of 3 images")
    assert lost.read_bytes() == content
    for path, (time_written, data) in before.items():
        assert path.read_bytes() == data
        if "wide" not in str(path):
            assert path.stat().st_mtime_ns == time_written
    assert run("--format", kind)[0] is None  # nothing to do


def test_stopping(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_jax.automatic.folder.generate_folder", stop)
    message, printed = run()
    assert message == 130
    assert printed.err.endswith("sam-jax: stopped\n")


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
def test_bad_arguments_are_refused_first(run, tmp_path, arguments, message):
    assert message in run(*arguments)[0]
    assert not list(tmp_path.glob("out/*/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--devices", "9"], "--devices is 9, but this machine has"), (["--model", "vit_x"], "vit_x")],
)
def test_nothing_is_created_before_the_arguments_are_checked(run, tmp_path, arguments, message):
    assert message in run(*arguments)[0]
    assert not (tmp_path / "out").exists()


def test_a_failed_run_does_not_fix_the_settings(run):
    assert "crop_overlap_ratio is 2.0" in run("--crop-overlap-ratio", "2")[0]
    assert run()[0] is None


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_bad_images_do_not_stop_the_rest(run, photos, tmp_path, kind):
    (photos / "empty.png").touch()
    whole = (photos / "wide.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not read")
    (photos / "wide.json").write_text("not read: SA-1B has such files next to its images")
    pixels = io.BytesIO()
    Image.fromarray(random_image(20, 20)).save(pixels, "AVIF")
    (photos / "damaged.avif").write_bytes(pixels.getvalue()[:300])
    (photos / ".hidden").write_text("not read")
    message, printed = run("--format", kind)
    assert message.startswith("sam-jax: 3 images failed:\n")
    for name in ("empty.png", "cut.png", "damaged.avif"):
        assert f"  {photos / name}: " in message
    assert printed.out.startswith("3 of 6 images")
    assert not any("empty" in f or "cut" in f or "notes" in f for f in files(tmp_path / "out"))
    if kind == "coco":
        images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
        assert [image["file_name"] for image in images] == ["small.png", "tall.png", "wide.png"]


def test_other_files_and_subfolders(run, photos, tmp_path):
    """Only readable images count, and folders are not skipped silently."""
    for name in ("notes.pdf", "data.h5", "vector.eps", "film.mpg", "plot.svg", "list.fits"):
        (photos / name).touch()
    (photos / "inner.png").mkdir()
    (photos / "more").mkdir()
    (photos / "more" / "deep.png").write_bytes((photos / "wide.png").read_bytes())
    message, printed = run(output=photos / "out")
    assert message is None
    assert printed.out.startswith("3 of 3 images")
    assert (
        f"which you can give as further inputs: {photos / 'inner.png'} and 1 more\n" in printed.err
    )
    assert f"of a supported image format: {photos / 'data.h5'} and 5 more\n" in printed.err


def test_failed_writes_do_not_stop_the_rest(run, photos, tmp_path):
    longest = "x" * 251 + ".png"  # with .json, the name is too long
    (photos / "wide.png").rename(photos / longest)
    (photos / "gone.png").symlink_to("nowhere")
    (photos / "loop.png").symlink_to("loop.png")
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/sam_jax.json").write_text("{}")
    message, printed = run("--format", "coco")
    assert message.startswith("sam-jax: 3 images failed:\n")
    assert f"{longest}: [Errno 36] File name too long" in message
    assert f"{photos / 'gone.png'}: [Errno 2] No such file or directory" in message
    assert printed.out.startswith("2 of 5 images")
    images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["small.png", "tall.png"]
    assert {p.stem for p in (tmp_path / "out/parts").iterdir()} == {"small", "tall"}


@pytest.mark.parametrize("kind", ["png", "coco"])
def test_a_full_disk_ends_the_run(run, tmp_path, monkeypatch, kind):
    """The run prints one line and stops, since every later image would fail, too."""
    write, written = Results.write, []

    def full(results, file, *others):
        if written:
            raise OSError(28, "No space left on device")
        written.append(file)
        write(results, file, *others)

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
    # The lock of a killed run does not block others.
    (tmp_path / "out/.sam_jax.lock").write_text("process 1 on elsewhere, since yesterday")
    (tmp_path / "out/.sam_jax-killed").mkdir()
    (tmp_path / "out/.sam_jax-killed/0.png").touch()
    assert run("--format", kind)[0] is None
    assert not any(".sam_jax" in name for name in os.listdir(tmp_path / "out"))


def test_scores_that_are_not_finite(run, model, tmp_path):
    """The run writes neither a result without masks nor NaN in JSON."""
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


def test_progress_messages(run):
    _, printed = run("--format", "coco")
    lines = printed.err.replace("\r", "\n").splitlines()
    assert lines[0].startswith("preparing the model; a first run compiles encoder and decoder")
    assert lines[1].startswith("the first image took ")
    assert "image/s" in printed.err
    assert any("3/3" in line for line in lines)
    _, printed = run("--format", "coco")
    assert "preparing" not in printed.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "and 80 points are decoded instead of 16; expect 5 times the run time"),
        (
            ["--crop-n-points-downscale-factor", "2"],
            "and 32 points are decoded instead of 16; expect 2.0 to 5 times the run time",
        ),
    ],
    ids=str,
)
def test_crops_are_estimated_before_they_start(run, photos, options, said):
    _, printed = run("--crop-n-layers", "1", *options, inputs=[photos / "small.png"])
    line = printed.err.splitlines()[0]
    assert line.startswith("4 crops per image: the encoder runs 5 times instead of once, ")
    assert said in line


def test_a_killed_run_resumes(model, photos, tmp_path, run, expected):
    """A killed process leaves no half-written results, and the next run does the rest."""
    for i in range(30):
        Image.fromarray(random_image(40, 50, seed=i)).save(photos / f"more_{i:02}.png")
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
    assert "is not a JSON list of lists of points" in run("--point-grids", grid, **other)[0]


def test_bad_arguments(run, photos, tmp_path):
    assert "missing does not exist" in run(inputs=[tmp_path / "missing"])[0]
    (tmp_path / "empty").mkdir()
    assert "there is no image in" in run(inputs=[tmp_path / "empty"])[0]
    assert "--devices is 5, but this machine has 1 device" in run("--devices", "5")[0]
    assert "points_per_batch is 0, expected" in run("--points-per-batch", "0")[0]
    (tmp_path / "file").touch()
    assert "file" in run(output=tmp_path / "file")[0]
    message, _ = run(inputs=[photos / "wide.png", tmp_path / "file"])
    assert message.startswith("sam-jax: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in run(output=tmp_path / "closed" / "out")[0]
