"""Runs README.md's Python code."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import skimage.data
from PIL import Image
from reference import SMALL_TINY, meta_sam, ours

from sam_jax import SamProcessor

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
README = Path(__file__).parents[1] / "README.md"


def test_quickstart(mobile_sam_file, tmp_path):
    """Makes README's figure, up to differences between matplotlib versions, and the photo."""
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]
    main(tmp_path / "quickstart.png")
    made, shown = (
        np.asarray(Image.open(folder / "quickstart.png").convert("RGB"), np.float32)
        for folder in (tmp_path, EXAMPLES)
    )
    assert made.shape == shown.shape
    assert (abs(made - shown).max(-1) > 50).mean() < 0.01
    with Image.open(tmp_path / "astronaut.png") as photo:
        assert np.array_equal(photo, skimage.data.astronaut())


def test_every_point_is_within_the_photo():
    """README's commands and code use the photo that comes with it, 512 x 512 pixels."""
    text = README.read_text()
    points = re.findall(r"--(?:point|box) ([\d,]+)", text) + re.findall(r"\[\[+([\d, ]+)\]\]", text)
    assert len(points) == 6
    assert max(int(number) for point in points for number in point.split(",")) < 512
    assert "photo.jpg" not in text


def test_links():
    """README's links exist, including anchors on its own page."""
    text = README.read_text()
    titles = {
        re.sub(r"\W+", "-", t.lower()).strip("-") for t in re.findall(r"^#+ (.*)", text, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    for path, _, place in (link.partition("#") for link in links):
        assert (README.parent / path).exists(), path
        assert not place or (path or place in titles), place


def test_everything(mobile_sam_file, tmp_path):
    main = runpy.run_path(str(EXAMPLES / "everything.py"))["main"]
    main(tmp_path / "everything.png", points_per_side=4)
    with Image.open(tmp_path / "everything.png") as image:
        assert image.size == (1024, 512)


def test_python_blocks(mobile_sam_file, tmp_path, monkeypatch):
    """Runs the blocks in one session, in order."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    meta, processor, transformers = blocks[0].partition("processor = ")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "astronaut.png")
    monkeypatch.chdir(tmp_path)

    names = {}
    # Uses 4 x 4 points, since the default of 32 x 32 takes half a minute.
    exec(meta.replace("Generator(model)", "Generator(model, points_per_side=4)"), names)
    masks = names["masks"]
    assert masks.shape == (3, 512, 512)
    assert masks[:, 300, 100].all()
    assert len(names["records"]) >= 2
    assert names["records"][0]["segmentation"].shape == (512, 512)
    exec(processor + transformers, names)
    (same,) = names["masks"]
    assert np.array_equal(same[0], masks)
    assert names["scores"].shape == (1, 1, 3)
    # Gradients of the whole model compile slowly: a small model stands in for MobileSAM.
    jax.config.update("jax_disable_most_optimizations", True)
    small = ours(meta_sam(SMALL_TINY), SMALL_TINY)
    inputs = SamProcessor(small.config)("astronaut.png", input_points=[[[100, 300]]])
    names |= {"model": small, "inputs": inputs, "outputs": small(**inputs)}
    exec(blocks[1], names)
    assert np.allclose(names["scores"], names["outputs"].iou_scores, atol=1e-5)
    gradients = names["gradients"]["mask_decoder"]["iou_token"][...]
    assert np.isfinite(gradients).all()
    assert gradients.any()
