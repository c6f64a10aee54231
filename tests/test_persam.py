"""`examples/persam.py`: PerSAM without training."""

import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from reference import assert_close, mask_iou, tensor

from sam_jax import SamPredictor, from_pretrained

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import persam

pytestmark = pytest.mark.slow


def test_the_object_is_found(mobile_sam_file, tmp_path):
    """PerSAM finds the same mask in the second image as a box around the object."""
    found, points = persam.main(tmp_path / "persam.png")
    with Image.open(tmp_path / "persam.png") as image:
        assert image.size[0] > 1000
    predictor = SamPredictor(from_pretrained("mobile_sam"))
    predictor.set_image(np.ascontiguousarray(skimage.data.stereo_motorcycle()[1][:, ::-1]))
    seat, _, _ = predictor.predict(box=[432, 155, 648, 262], multimask_output=False)
    assert mask_iou(found, seat[0]) > 0.9
    (x, y), (other_x, other_y) = points.astype(int)
    assert seat[0][y, x]
    assert not seat[0][other_y, other_x]


def test_similarity_matches_pytorch(mobile_sam_file):
    """Repeats the original's code: cosine similarities, enlarged by 4, then resized like masks."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(64, 64, 256)).astype(np.float32)
    target = rng.normal(size=256).astype(np.float32)
    features = torch.nn.functional.normalize(tensor(embedding).permute(2, 0, 1), dim=0)
    expected = torch.einsum("c,chw->hw", tensor(target) / tensor(target).norm(), features)
    alike = persam.similarity(embedding, target)
    assert_close(alike, expected)

    size, inputs = (500, 741), (691, 1024)
    expected = expected[None, None]
    for to in ((256, 256), (1024, 1024)):
        expected = torch.nn.functional.interpolate(expected, to, mode="bilinear")
    expected = expected[..., : inputs[0], : inputs[1]]
    expected = torch.nn.functional.interpolate(expected, size, mode="bilinear")[0, 0]
    assert_close(persam.enlarge(from_pretrained("mobile_sam"), alike, size), expected)
