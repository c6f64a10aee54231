import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from reference import SHALLOW, meta_sam, ours

from sam_jax.checkpoints.params import build_model, flat_params
from sam_jax.config import with_preprocessing
from sam_jax.evaluation import draw_clicks, evaluate
from sam_jax.predictor import SamPredictor
from sam_jax.training.datasets import CocoInstances
from sam_jax.training.embeddings import CachedEmbeddings
from sam_jax.training.transform import ExampleTransform


@pytest.fixture
def dataset():
    images = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    return [{"image": image, "masks": np.ones((1, 40, 60), bool)} for image in images]


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.npy")}


def test_embeddings_match_the_predictor(model, dataset, tmp_path):
    seen = []
    cached = CachedEmbeddings(dataset, model, folder=tmp_path, on_image=lambda: seen.append(1))
    assert len(cached) == len(seen) == 3
    predictor = SamPredictor(model)
    for i in range(3):
        predictor.set_image(dataset[i]["image"])
        expected = np.moveaxis(predictor.get_image_embedding()[0], 0, -1)
        np.testing.assert_array_equal(cached[i]["image_embedding"], expected)
    transformed = ExampleTransform(SHALLOW, 1, target_size=SHALLOW.mask_size)(
        cached[0], np.random.default_rng(0)
    )
    assert "pixel_values" not in transformed
    with pytest.raises(ValueError, match="embedding is cached cannot be augmented"):
        ExampleTransform(SHALLOW, 1, target_size=SHALLOW.mask_size, flip=0.5)(
            cached[0], np.random.default_rng(0)
        )


def test_existing_embeddings_are_reused(model, dataset, tmp_path):
    CachedEmbeddings(dataset, model, folder=tmp_path)
    before = files(tmp_path)
    assert len(before) == 3
    CachedEmbeddings(dataset, model, folder=tmp_path)
    assert files(tmp_path) == before


def test_images_of_any_kind(model, dataset, tmp_path, unchecked):
    images = [{**example, "image": Image.fromarray(example["image"])} for example in dataset]
    cached = CachedEmbeddings(images, model, folder=tmp_path)
    expected = CachedEmbeddings(dataset, model, folder=tmp_path)
    for i in (0, -1):
        np.testing.assert_array_equal(
            cached[i]["image_embedding"], expected[i % 3]["image_embedding"]
        )
    with pytest.raises(IndexError):
        cached[3]
    with pytest.raises(TypeError, match="the model is 'mobile_sam', expected a Sam"):
        CachedEmbeddings(dataset, "mobile_sam", folder=tmp_path)


def test_images_are_not_read_again(model, coco, tmp_path):
    """Training needs the embeddings and the masks; pixels are read on access."""
    dataset = CocoInstances(coco / "coco.json", coco, on_bad_annotation="skip")
    whole, unreadable = dataset[0], coco / "2.png"
    unreadable.write_bytes(unreadable.read_bytes()[:60])
    with pytest.warns(UserWarning, match="left out"):
        cached = CachedEmbeddings(dataset, model, folder=tmp_path / "cache")
    transform = ExampleTransform(SHALLOW, 4, target_size=SHALLOW.mask_size)
    expected = transform(whole, np.random.default_rng(0))
    np.testing.assert_array_equal(cached[0]["image"], whole["image"])
    np.testing.assert_array_equal(draw_clicks(model, cached, count=1), draw_clicks(model, [whole]))
    with pytest.warns(UserWarning, match="left out"):
        assert len(cached[2]["masks"]) == 0  # its embedding is that of a blank image
    (coco / "0.png").unlink()
    actual = transform(cached[0], np.random.default_rng(0))
    for name in ("masks", "boxes", "valid"):
        np.testing.assert_array_equal(actual[name], expected[name])
    assert evaluate(model, [cached[0]], clicks=(1,)) == evaluate(model, [whole], clicks=(1,))


def test_masks_of_a_dataset_in_memory(model, dataset, tmp_path):
    """An attribute of any name is the dataset's own matter."""

    class InMemory(list):
        masks = np.zeros((3, 40, 60), bool)

    cached = CachedEmbeddings(InMemory(dataset), model, folder=tmp_path)
    np.testing.assert_array_equal(cached[1]["masks"], dataset[1]["masks"])
    np.testing.assert_array_equal(cached[1]["image"], dataset[1]["image"])


def test_stale_embeddings_are_not_used(model, dataset, tmp_path):
    """Other images, weights, dtypes and preprocessing have their own files."""
    cached = CachedEmbeddings(dataset, model, folder=tmp_path)
    old = cached[0]["image_embedding"]
    dataset[0]["image"] = dataset[0]["image"].copy()
    dataset[0]["image"][0, 0] ^= 1
    cached = CachedEmbeddings(dataset, model, folder=tmp_path)
    assert len(files(tmp_path)) == 4
    assert not np.array_equal(cached[0]["image_embedding"], old)
    other = CachedEmbeddings(dataset, ours(meta_sam(SHALLOW, seed=1), SHALLOW), folder=tmp_path)
    assert len(files(tmp_path)) == 7
    assert not np.array_equal(other[1]["image_embedding"], cached[1]["image_embedding"])
    CachedEmbeddings(dataset, ours(meta_sam(SHALLOW), SHALLOW, dtype=jnp.bfloat16), folder=tmp_path)
    assert len(files(tmp_path)) == 10
    medsam = ours(meta_sam(SHALLOW), with_preprocessing(SHALLOW, "medsam"))
    assert CachedEmbeddings([], medsam, folder=tmp_path).folder != cached.folder


@pytest.mark.slow
def test_every_weight_of_the_encoder_counts(model, tmp_path):
    """Other weights do not count: models with different mask decoders share the files."""
    params = flat_params(model)

    def folder(name):
        changed = {**params, name: params[name] + 1}
        return CachedEmbeddings([], build_model(changed, SHALLOW), folder=tmp_path).folder

    own = [name for name in params if name.startswith("image_encoder.")]
    before = CachedEmbeddings([], model, folder=tmp_path).folder
    assert len({before, *map(folder, own)}) == 1 + len(own)
    assert folder("mask_decoder.iou_token") == before


def test_a_damaged_file(model, dataset, tmp_path):
    cached = CachedEmbeddings(dataset, model, folder=tmp_path)
    for file in files(tmp_path):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read .* restart the run"):
        cached[0]
    again = CachedEmbeddings(dataset, model, folder=tmp_path)
    assert again[0]["image_embedding"].shape == cached[1]["image_embedding"].shape


class Scaled(nnx.Module):
    """A custom encoder with a setting that is not a parameter."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, pixel_values):
        return self.scale * jnp.ones((len(pixel_values), 12, 12, 32))


def test_settings_of_a_custom_encoder(model, dataset, tmp_path):
    model = nnx.clone(model)
    for scale in (1.0, 3.0):
        model.image_encoder = Scaled(scale)
        cached = CachedEmbeddings(dataset, model, folder=tmp_path)
        assert (cached[0]["image_embedding"] == scale).all()
