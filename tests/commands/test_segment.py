import contextlib
import json
import os
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from image_files import write_deep
from PIL import Image
from reference import SHALLOW, mask_iou, meta_sam, ours
from safetensors import SafetensorError

import sam_jax
from sam_jax import cli, runs


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A saved model and an image."""
    folder = tmp_path_factory.mktemp("cli")
    sam_jax.save_pretrained(model, folder / "model")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((113, 71), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs `sam-jax segment photo.png --model ... ARGUMENTS` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, image=None, model=None):
        image = folder / "photo.png" if image is None else image
        model = folder / "model" if model is None else model
        command = ["sam-jax", "segment", str(image), "--model", str(model), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        cli.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def fails(run, tmp_path, capsys):
    """Runs the command, which must write nothing but one line to stderr; returns that line."""

    def fails(*arguments, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            run(*arguments, **options)
        # Python prints such a message to stderr and exits with code 1.
        message = exit_info.value.code
        assert isinstance(message, str)
        assert message.startswith("sam-jax: ")
        assert "\n" not in message
        assert sorted(tmp_path.rglob("*")) == before
        printed = capsys.readouterr()
        assert printed.out == printed.err == ""
        return message

    return fails


def results(folder):
    """The JSON, and the masks that it names; there must be no others."""
    summary = json.loads((folder / "masks.json").read_text())
    names = [record["file"] for record in summary["masks"]]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "masks.json", "overlay.png"])
    masks = []
    for record in summary["masks"]:
        with Image.open(folder / record["file"]) as file:
            assert file.mode == "1"
            masks.append(np.asarray(file))
        assert masks[-1].shape == (summary["height"], summary["width"]) == (71, 113)
        assert masks[-1].sum() == record["area"]
    with Image.open(folder / "overlay.png") as file:
        assert (file.size, file.mode) == ((113, 71), "RGB")
    return summary, np.stack(masks)


@pytest.fixture(scope="module")
def predictor(model, folder):
    predictor = sam_jax.SamPredictor(model)
    predictor.set_image(folder / "photo.png")
    return predictor


def test_one_point(run, predictor, folder, tmp_path):
    printed = run("--point", "60,30.5")
    summary, masks = results(tmp_path / "photo_masks")
    expected, scores, _ = predictor.predict([[60, 30.5]], [1])
    order = np.argsort(-scores)
    assert mask_iou(masks, expected[order]).min() >= 0.9999
    found = [record["predicted_iou"] for record in summary["masks"]]
    assert np.allclose(found, scores[order], atol=1e-5)
    assert found == sorted(found, reverse=True)
    assert summary["image"] == str(folder / "photo.png")
    assert summary["model"] == str(folder / "model")
    assert summary["points"] == [[60, 30.5, 1]]
    assert all("box" not in record for record in summary["masks"])
    assert len(printed) == 4
    assert printed[0] == f"photo_masks/mask_0.png  predicted IoU {found[0]:.3f}"
    assert printed[-1] == "photo_masks/overlay.png"


def test_points_with_labels(run, predictor, tmp_path):
    run("--point", "60,30.5", "--point", "10,50,0", "--point=111,2.25,1", "--output", "out/deep")
    summary, masks = results(tmp_path / "out" / "deep")
    expected, _, _ = predictor.predict(
        [[60, 30.5], [10, 50], [111, 2.25]], [1, 0, 1], multimask_output=False
    )
    assert mask_iou(masks, expected).min() >= 0.9999
    assert summary["points"] == [[60, 30.5, 1], [10, 50, 0], [111, 2.25, 1]]


def test_several_boxes(run, predictor, tmp_path):
    boxes = [[12, 8.1, 90, 66], [0, 0, 20, 30], [50, 50, 100, 70]]
    arguments = [a for box in boxes for a in ("--box", ",".join(map(str, box)))]
    run(*arguments, "--output", tmp_path / "boxes")
    summary, masks = results(tmp_path / "boxes")
    expected, _, _ = predictor.predict_batch(boxes=boxes, multimask_output=False)
    assert mask_iou(masks, expected[:, 0]).min() >= 0.9999
    assert [record["box"] for record in summary["masks"]] == boxes
    assert summary["points"] == []


def test_points_and_a_box(run, predictor, tmp_path):
    run("--point", "60,30", "--point", "20,20,0", "--box", "12,8,90,66", "--output", "out")
    summary, masks = results(tmp_path / "out")
    expected, _, _ = predictor.predict(
        [[60, 30], [20, 20]], [1, 0], [12, 8, 90, 66], multimask_output=False
    )
    assert mask_iou(masks, expected).min() >= 0.9999
    assert summary["masks"][0]["box"] == [12, 8, 90, 66]


@pytest.mark.slow
def test_multimask_can_be_chosen(run, tmp_path):
    run("--point", "60,30", "--no-multimask", "--output", "one")
    assert len(results(tmp_path / "one")[1]) == 1
    run("--point", "60,30", "--point", "6,3,0", "--multimask", "--output", "three")
    assert len(results(tmp_path / "three")[1]) == 3


def test_overlay_shows_the_best_mask_and_the_prompt(run, predictor, folder, tmp_path):
    run("--point", "60,30", "--output", "out")
    with Image.open(tmp_path / "out" / "overlay.png") as file:
        pixels = np.asarray(file)
    masks, scores, _ = predictor.predict([[60, 30]], [1])
    expected = sam_jax.visualize.overlay(
        folder / "photo.png", [masks[scores.argmax()]], point_coords=[[60, 30]], point_labels=[1]
    )
    assert np.array_equal(pixels, expected)
    assert tuple(pixels[30, 60]) == (40, 200, 80)


def test_a_second_run_replaces_the_first(run, tmp_path):
    run("--point", "60,30", "--output", "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run("--box", "12,8,90,66", "--output", "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    summary, masks = results(tmp_path / "out")
    assert len(masks) == 1
    assert "box" in summary["masks"][0]


@pytest.mark.parametrize("name", ["mask_7.png", "mask_0.png", "overlay.png", "masks.json"])
def test_other_peoples_files_are_left_alone(fails, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    message = fails("--point", "3,4", "--output", "out", model="/no/such/model")
    assert f"out/{name} was not written by an earlier run and is not overwritten" in message
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_the_image_is_not_overwritten(fails, folder, tmp_path):
    image = tmp_path / "overlay.png"
    image.write_bytes((folder / "photo.png").read_bytes())
    assert "is not overwritten" in fails("--point", "3,4", "--output", ".", image="overlay.png")
    assert image.read_bytes() == (folder / "photo.png").read_bytes()


@pytest.mark.slow
def test_in_bfloat16(run, tmp_path):
    scores = []
    for dtype in ("float32", "bfloat16"):
        run("--box", "12,8,90,66", "--output", dtype, "--dtype", dtype)
        scores.append(results(tmp_path / dtype)[0]["masks"][0]["predicted_iou"])
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_gray_and_transparent_images(run, folder, tmp_path):
    with Image.open(folder / "photo.png") as file:
        file.convert("LA").save(tmp_path / "gray.png")
    run("--box", "12,8,90,66", "--output", "out", image="gray.png")
    assert results(tmp_path / "out")[0]["image"] == "gray.png"


def test_a_failed_write_changes_nothing(run, tmp_path, monkeypatch):
    """Simulates a full disk: the earlier run's files stay as they are."""
    run("--point", "60,30", "--output", "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    save, saved = Image.Image.save, []

    def full(self, path, **options):
        if saved:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit, match=r"sam-jax: .*No space left on device"):
        run("--point", "20,30", "--output", "out")
    assert len(saved) == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_scores_that_are_not_finite(run, model, tmp_path):
    """Nothing is written: JSON has no NaN."""
    sam = nnx.clone(model)
    head = sam.mask_decoder.iou_prediction_head
    nnx.update(head, jax.tree.map(lambda x: x * 1e37, nnx.state(head)))
    sam_jax.save_pretrained(sam, tmp_path / "huge")
    with pytest.raises(SystemExit, match="sam-jax: the model predicts IoUs that are NaN or inf"):
        run("--point", "60,30", "--output", "out", model=tmp_path / "huge")
    assert not (tmp_path / "out").exists()


def test_two_runs_into_one_folder(run, tmp_path):
    """A run does not wait for another, and removes what a killed one left."""
    with runs.lock_folder(tmp_path / "out"):
        owner = f"another run is working in out .process {os.getpid()} on "
        with pytest.raises(SystemExit, match=owner):
            run("--point", "60,30", "--output", "out")
        assert os.listdir(tmp_path / "out") == [".sam_jax.lock"]
    (tmp_path / "out" / ".sam_jax.lock").write_text("process 1 on elsewhere")
    (tmp_path / "out" / ".sam_jax-killed").mkdir()
    (tmp_path / "out" / ".sam_jax-killed" / "mask_0.png").touch()
    run("--point", "60,30", "--output", "out")
    results(tmp_path / "out")


def test_a_full_disk_is_one_line(fails, monkeypatch):
    """Safetensors has its own error for it."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("sam_jax.checkpoints.from_pretrained", full)
    assert "No space left on device" in fails("--point", "60,30")


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [1, 3, 6])
def test_a_run_that_was_stopped_is_replaced(run, tmp_path, monkeypatch, allowed):
    """Wherever a run was stopped, the next one recognizes all files as sam-jax's."""
    run("--point", "60,30", "--output", "out")
    run("--box", "12,8,90,66", "--output", "out")
    replace, left = os.replace, [allowed]

    def stopped(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(*paths)

    # Replaces the summary, three masks, the overlay, and the summary again.
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(os, "replace", stopped)
        run("--point", "20,30", "--output", "out")
    assert left[0] == (0 if allowed == 6 else -1)
    run("--box", "12,8,90,66", "--output", "out")
    assert len(results(tmp_path / "out")[1]) == 1
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to segment: give at least one --point or --box"),
        (["--point", "3"], "--point is '3', expected X,Y or X,Y,LABEL"),
        (["--point", "3,4,1,1"], "--point is '3,4,1,1', expected X,Y or X,Y,LABEL"),
        (["--point", "a,b"], "--point is 'a,b', expected X,Y or X,Y,LABEL"),
        (["--point", ""], "--point is '', expected"),
        (["--point", "nan,3"], "--point is 'nan,3', expected"),
        (["--point", "3,inf"], "--point is '3,inf', expected"),
        (["--point", "3,4,2"], "--point has label 2, expected 1 (on the object) or 0 (background)"),
        (["--point", "3,4,-1"], "--point has label -1, expected"),
        (["--point", "3,4,0.5"], "--point has label 0.5, expected"),
        (["--box", "1,2,3"], "--box is '1,2,3', expected X0,Y0,X1,Y1"),
        (["--box", "1,2,3,x"], "--box is '1,2,3,x', expected X0,Y0,X1,Y1"),
        (["--box", "9,2,3,8"], "--box have [9.0, 2.0, 3.0, 8.0], expected x0, y0, x1, y1"),
        (
            ["--point", "450,600"],
            "--point has (450, 600), outside the image, which is 113 x 71 pixels; expected x from "
            "0 to 113 and y from 0 to 71",
        ),
        (["--point", "3,-1"], "--point has (3, -1), outside the image"),
        (["--box", "1,2,114,5"], "--box has (114, 5), outside the image"),
        (
            ["--point", "1,1", "--box", "1,2,3,4", "--box", "1,2,3,4"],
            "--point can be combined with at most one --box, but there are 2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_prompts(fails, arguments, message):
    # Errors come before the model is loaded: its folder does not exist.
    assert message in fails(*arguments, model="/no/such/model")


def test_bad_images(fails, tmp_path):
    assert "missing.png: No such file or dir" in fails("--point", "3,4", image="missing.png")
    (tmp_path / "notes.txt").write_text("no image")
    message = fails("--point", "3,4", image="notes.txt")
    assert message.startswith("sam-jax: notes.txt is not an image of a known format, expected")
    assert ". is a folder, expected an image" in fails("--point", "3,4", image=".")
    write_deep(tmp_path / "deep.png", "png_color")
    assert "more than 8 bits per channel" in fails("--point", "3,4", image="deep.png")


def test_bad_models(fails):
    message = fails("--point", "3,4", model="vit_x")
    assert "vit_x" in message
    assert "mobile_sam" in message
    assert "vit_b" in message
    assert "/no/such/model" in fails("--point", "3,4", model="/no/such/model")


def test_the_output_is_a_file(fails, tmp_path):
    (tmp_path / "out").write_text("a file")
    message = fails("--point", "3,4", "--output", "out", model="/no/such/model")
    assert message == "sam-jax: --output is out, a file; expected a folder"
    message = fails("--point", "3,4", "--output", "out/new", model="/no/such/model")
    assert message == "sam-jax: --output is out, a file; expected a folder"
