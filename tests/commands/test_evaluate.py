import json
import sys

import numpy as np
import pytest
from coco_examples import RECTANGLES, H, W, compressed, rectangle
from PIL import Image
from reference import SHALLOW, meta_sam, ours

import sam_jax
from sam_jax import cli
from sam_jax.evaluation import evaluate
from sam_jax.training import open_annotations


@pytest.fixture
def folder(tmp_path):
    """A saved model, and an annotated image."""
    sam_jax.save_pretrained(ours(meta_sam(SHALLOW), SHALLOW), tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    coco = {
        "images": [{"id": 1, "file_name": "1.png", "height": H, "width": W}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "segmentation": compressed(rectangle(x0, y0, x1, y1)),
            }
            for i, (x0, y0, x1, y1) in enumerate(RECTANGLES, 1)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    def run(*arguments):
        command = ["evaluate", folder / "coco.json", "--model", folder / "model", *arguments]
        monkeypatch.setattr(sys, "argv", ["sam-jax", *map(str, command)])
        cli.main()

    return run


@pytest.mark.slow
def test_prints_the_mean_ious_as_json(run, folder, capsys):
    run("--images", folder)
    dataset = open_annotations(folder / "coco.json", folder)
    expected = evaluate(sam_jax.from_pretrained(folder / "model"), dataset)
    assert json.loads(capsys.readouterr().out) == expected


def test_annotations_without_their_images(run, folder):
    (folder / "1.png").unlink()
    with pytest.raises(SystemExit, match=r"coco\.json has bad entries;[^\n]*\n  image 1: .*1\.png"):
        run("--images", folder)
