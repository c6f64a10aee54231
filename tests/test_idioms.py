"""Every idiom in `docs/migrating.md` works, or fails with a hint; its replacement works."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from reference import SHALLOW, random_sam

import sam_jax
from sam_jax.training.rules import DECODER_ONLY, partition

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
ROWS = re.findall(r"^\| (`.+`) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
# Idioms that fail inside other libraries, whose errors cannot say what to write here.
THEIRS = r"\.cpu\(\)$|^from segment_anything|^sam_model_registry|^torch\."


@pytest.fixture(scope="module")
def model():
    return random_sam(SHALLOW)


@pytest.fixture(scope="module")
def objects(model):
    """The names used in the rows, except for those that they define."""
    image = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    processor = sam_jax.SamProcessor(SHALLOW)
    inputs = processor(image, input_points=[[[45, 60]]])
    everything = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    return {
        "np": np,
        "jnp": jnp,
        "jax": jax,
        "nnx": nnx,
        "torch": torch,
        "sam": model,
        "model": model,
        "processor": processor,
        "image": image,
        "pixels": image,
        "raw_image": Image.fromarray(image),
        "segmentation_map": image[..., 0].astype(int),
        "partition": partition,
        "DECODER_ONLY": DECODER_ONLY,
        "from_pretrained": lambda name, dtype=None: model,
        "save_pretrained": lambda model, folder: None,
        "SamProcessor": sam_jax.SamProcessor,
        "SamPredictor": sam_jax.SamPredictor,
        "SamAutomaticMaskGenerator": sam_jax.SamAutomaticMaskGenerator,
        "pipeline": sam_jax.pipeline,
        "pipe": sam_jax.pipeline(model=model, points_per_crop=2, **everything),
        "generator": sam_jax.SamAutomaticMaskGenerator(model, points_per_side=2, **everything),
        "outputs": model(**inputs),
        "inputs": inputs,
        "coords": np.array([[45, 60]]),
        "labels": np.array([1]),
        "box": np.array([10, 20, 60, 50]),
        "boxes": np.array([[10, 20, 60, 50], [5, 5, 90, 70]]),
        "size": (80, 96),
        "input_size": (80, 96),
        "masks": [],
        "scores": np.array([0.5, 0.9, 0.7]),
        "logits": np.random.default_rng(1).normal(size=(3, 48, 48)).astype(np.float32),
        "embeddings": model.get_image_embeddings(inputs["pixel_values"]),
        "batched_input": [{"image": torch.zeros(3, 80, 96), "original_size": (80, 96)}],
    }


def test_the_page_has_rows():
    assert len(ROWS) > 80


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("idiom", "here"), ROWS, ids=[idiom for idiom, _ in ROWS])
def test_row(idiom, here, objects, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "segment_anything", None)  # as if it were not installed
    monkeypatch.setattr(sam_jax.processing, "load_config", lambda name: SHALLOW)
    objects["raw_image"].save("photo.jpg")

    def run(code):
        predictor = sam_jax.SamPredictor(objects["model"])
        predictor.set_image(objects["image"])
        names = {**objects, "inputs": type(objects["inputs"])(objects["inputs"])}
        exec(code, {**names, "predictor": predictor})

    (idiom,) = re.fullmatch(r"`(.+)`", idiom).groups()
    if here.startswith("the same"):
        run(idiom)
        return
    instead = re.match(r"`([^`]+)`", here)[1]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(idiom)
    if not re.search(THEIRS, idiom):
        assert re.search(
            "; .*(use|leave|call|pass|give|download|arrays|is a)|expected 'np'", str(caught.value)
        )
    run(instead)
