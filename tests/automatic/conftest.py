import sys

import pytest
from everything import ALL, picture
from folders import OPTIONS, SIZES
from PIL import Image
from reference import SMALL, meta_sam, ours

from sam_jax import cli, from_pretrained, save_pretrained
from sam_jax.automatic.generator import SamAutomaticMaskGenerator


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
