"""`examples/prompt_tuning.py`: four prompt tokens that change what a click means."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from reference import SHALLOW, random_sam

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import prompt_tuning

pytestmark = pytest.mark.slow


def test_tokens_learn_the_annotations(tmp_path, monkeypatch):
    model = random_sam(SHALLOW)
    cells = prompt_tuning.draw_cells(model, 2, seed=0)
    tokens, losses = prompt_tuning.tune(model, cells, jax.random.key(0), steps=40)
    assert tokens.shape == (4, SHALLOW.prompt_embed_dim)
    assert losses[-10:].mean() < losses[:10].mean()

    monkeypatch.setattr(prompt_tuning, "from_pretrained", lambda name: model)
    ious = prompt_tuning.main(tmp_path / "drawn.png", train=1, steps=1)
    assert all(0 <= iou <= 1 for iou in ious)
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.size == (900, 320)
        assert np.ptp(image) > 0


def test_clicks_are_inside_the_cells():
    model = random_sam(SHALLOW)
    cells = prompt_tuning.draw_cells(model, 1, seed=3)
    scale = SHALLOW.mask_size / SHALLOW.image_size
    x, y = (np.asarray(cells.points[0, :, 0]) * scale).astype(int).T
    assert np.asarray(cells.masks)[0, np.arange(len(x)), y, x].all()
