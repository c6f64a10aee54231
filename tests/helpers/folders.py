"""Folders of small images, and `sam-jax generate` with options that keep every mask."""

import sys

import pytest
from everything import ALL, random_image
from PIL import Image
from reference import SHALLOW, meta_sam, ours

from sam_jax import cli, from_pretrained, save_pretrained
from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.ops.boxes import mask_to_box
from sam_jax.ops.rle import rle_encode

SIZES = {"wide": (60, 110), "tall": (130, 70), "small": (20, 25)}
ALL_PASS = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
OPTIONS = [*ALL_PASS, "--points-per-side", "4"]


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def record_of(mask):
    """A record of `SamAutomaticMaskGenerator`."""
    x0, y0, x1, y1 = mask_to_box(mask).tolist()
    height, width = mask.shape
    record = {"segmentation": rle_encode(mask), "area": int(mask.sum())}
    record |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "point_coords": [[0.0, 0.0]]}
    record |= {"crop_box": [0, 0, width, height], "predicted_iou": 1.0, "stability_score": 1.0}
    return record


# Fixtures; a conftest.py imports them.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(ours(meta_sam(SHALLOW), SHALLOW), path)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(random_image(*size, seed=i)).save(folder / f"{name}.png")
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
        name: generator.generate(random_image(*size, seed=i))
        for i, (name, size) in enumerate(SIZES.items())
    }
