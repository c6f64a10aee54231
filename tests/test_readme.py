"""What README.md tells to do in Python, done."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import skimage.data
from PIL import Image
from reference import SMALL_TINY, meta_sam, ours

from sam_jax import SamProcessor

EXAMPLES = Path(__file__).parents[1] / "examples"
README = Path(__file__).parents[1] / "README.md"


def test_quickstart(mobile_sam_file, tmp_path):
    """It makes README's picture, but for how another matplotlib might draw it."""
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]
    main(tmp_path / "quickstart.png")
    made, shown = (
        np.asarray(Image.open(folder / "quickstart.png").convert("RGB"), np.float32)
        for folder in (tmp_path, EXAMPLES)
    )
    assert made.shape == shown.shape
    assert (abs(made - shown).max(-1) > 50).mean() < 0.01


def test_everything(mobile_sam_file, tmp_path):
    main = runpy.run_path(str(EXAMPLES / "everything.py"))["main"]
    main(tmp_path / "everything.png", points_per_side=4)
    with Image.open(tmp_path / "everything.png") as picture:
        assert picture.size == (1024, 512)


def test_python_blocks(mobile_sam_file, tmp_path, monkeypatch):
    """In one session, as one reads; the picture is the one whose coordinates README uses."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    photo = Image.fromarray(skimage.data.coffee()).resize((1800, 1200))
    photo.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    names = {}
    exec(blocks[0], names)
    masks = names["masks"]
    assert masks.shape == (3, 1200, 1800)
    assert masks[:, 600, 450].any()
    exec(blocks[1], names)
    (same,) = names["masks"]
    assert np.array_equal(same[0], masks)
    assert names["scores"].shape == (1, 1, 3)
    # A few of the 32 x 32 points, since all of them take half a minute.
    exec(blocks[2].replace('"mobile_sam")', '"mobile_sam"), points_per_side=4'), names)
    assert len(names["records"]) >= 2
    assert names["records"][0]["segmentation"].shape == (1200, 1800)
    # Gradients of the whole model take long to compile: a small one stands for MobileSAM.
    jax.config.update("jax_disable_most_optimizations", True)
    small = ours(meta_sam(SMALL_TINY), SMALL_TINY)
    inputs = SamProcessor(small.config)("photo.jpg", input_points=[[[450, 600]]])
    names |= {"model": small, "inputs": inputs, "outputs": small(**inputs)}
    exec(blocks[3], names)
    assert np.allclose(names["scores"], names["outputs"].iou_scores, atol=1e-5)
    gradients = names["gradients"]["mask_decoder"]["iou_token"][...]
    assert np.isfinite(gradients).all()
    assert gradients.any()
    command = [sys.executable, EXAMPLES / "cells.py", "--output", "cells", "--train", "2"]
    subprocess.run([*command, "--test", "1"], check=True)
    exec(blocks[4], names)
    assert np.isfinite(names["metrics"]["loss"])
    gradients = jax.tree.leaves(names["gradients"])
    assert sum(bool(np.any(g)) for g in gradients) > 0.5 * len(gradients)
