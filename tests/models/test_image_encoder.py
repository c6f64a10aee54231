import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import SHALLOW, assert_close, meta_sam, normal, ours

from sam_jax import (
    CheckpointError,
    ImageEncoder,
    SamAutomaticMaskGenerator,
    SamPredictor,
    save_pretrained,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 96, 3), np.uint8)


class OneConv(nnx.Module):
    """A custom encoder without `remat`."""

    def __init__(self, channels=32):
        self.conv = nnx.Conv(3, channels, (8, 8), strides=(8, 8), rngs=nnx.Rngs(0))

    def __call__(self, pixel_values):
        return self.conv(pixel_values)


@pytest.fixture
def model():
    return ours(meta_sam(SHALLOW), SHALLOW)


def test_custom_encoder(model):
    """The predictor and everything mode use it; it changes the masks."""
    before, _, _ = predict(model)
    model.image_encoder = encoder = OneConv()
    assert isinstance(encoder, ImageEncoder)
    masks, scores, _ = predict(model)
    assert not np.array_equal(masks, before)

    embedding = encoder(SamPredictor(model).processor.preprocess(IMAGE)[None])
    predictor = SamPredictor(model)
    predictor.set_image_embedding(jnp.moveaxis(embedding, -1, 1), IMAGE.shape[:2])
    assert_close(scores, predictor.predict(np.array([[30, 20]]), np.array([1]))[1])

    everything = {"points_per_side": 2, "pred_iou_thresh": -100.0, "stability_score_thresh": 0.0}
    assert SamAutomaticMaskGenerator(model, **everything).generate(IMAGE)


def predict(model):
    predictor = SamPredictor(model)
    predictor.set_image(IMAGE)
    return predictor.predict(np.array([[30, 20]]), np.array([1]))


class NoArguments(nnx.Module):
    def __call__(self):
        return jnp.zeros(())


class Returns(nnx.Module):
    def __init__(self, value):
        self.value = value

    def __call__(self, pixel_values):
        return self.value


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (OneConv(channels=16), r"\(OneConv\) returned embeddings of shape \(1, 12, 12, 16\), exp"),
        (len, r"\(builtin_function_or_method\) is not a flax.nnx.Module"),
        (nnx.Module(), r"\(Module\) is not a flax.nnx.Module that can be called"),
        (NoArguments(), r"\(NoArguments\) takes \(\), but is called with pixel_values: too many"),
        (Returns("nothing"), r"returned str, expected an array of floats \(1, 12, 12, 32\)"),
        (Returns(jnp.zeros((1, 12, 12, 32), int)), "returned int32, expected an array of floats"),
    ],
    ids=["width", "a function", "no call", "arguments", "no array", "integers"],
)
def test_bad_encoders(model, encoder, message):
    model.image_encoder = encoder
    for encode in (model.encode_image, lambda _: predict(model)):
        with pytest.raises((TypeError, ValueError), match=message):
            encode(normal((1, 96, 96, 3)))


@pytest.mark.usefixtures("unchecked")
def test_remat_of_an_encoder_without_remat(model):
    model.image_encoder = OneConv()
    with pytest.raises(TypeError, match=r"called with pixel_values, remat: .*'remat'"):
        jax.eval_shape(lambda x: model.encode_image(x, remat=True), normal((1, 96, 96, 3)))


def test_custom_encoders_cannot_be_saved(model, tmp_path):
    model.image_encoder = OneConv()
    with pytest.raises(CheckpointError, match=r"is a OneConv, .* save nnx.state\(model\)"):
        save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
