"""Image encoders in OpenVINO give what they give in JAX."""

import dataclasses
import json
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from everything import ALL, random_image
from flax import nnx
from PIL import Image
from reference import (
    SHALLOW,
    SMALL,
    SMALL_TINY,
    TINIEST,
    assert_close,
    mask_iou,
    normal,
    random_sam,
)

import sam_jax
from sam_jax import SamAutomaticMaskGenerator, SamPredictor, cli, load_image
from sam_jax.errors import MissingExtra
from sam_jax.export import openvino
from sam_jax.export.openvino import OpenVinoEncoder, encoder_for
from sam_jax.training import add_lora


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def in_jax(model, pixels):
    return jax.jit(lambda sam, pixels: sam.encode_image(pixels))(model, pixels)


def pixels_of(config, count=1):
    return np.asarray(normal((count, config.image_size, config.image_size, 3)))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="vit"),
        pytest.param(SMALL_TINY, id="tiny_vit", marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(SMALL, hq=True), id="vit_hq", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(TINIEST, hq=True), id="tiny_vit_hq", marks=pytest.mark.slow
        ),
    ],
)
def test_embeddings_match_jax(config):
    model, pixels = random_sam(config), pixels_of(config, 2)
    found = OpenVinoEncoder(model)(pixels)
    assert found.dtype == np.float32
    assert_close(found, in_jax(model, pixels), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_low_precision(config, dtype):
    """At least as exact as JAX in this dtype: a CPU without it computes in float32."""
    model, pixels = random_sam(config), pixels_of(config)
    low = sam_jax.checkpoints.build_model(
        dict(sam_jax.checkpoints.flat_params(model)), config, dtype
    )
    found, exact = OpenVinoEncoder(low)(pixels), in_jax(model, pixels)
    assert found.dtype == low.dtype

    def error(embeddings):
        return np.square(np.asarray(embeddings, np.float32) - exact).mean() ** 0.5

    assert 0 < error(found) < 1.5 * error(in_jax(low, pixels))


@pytest.mark.slow
def test_parameters_in_half_precision(cache):
    model = jax.tree.map(lambda x: x.astype(jnp.float16), random_sam(SHALLOW))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    pixels = pixels_of(SHALLOW)
    assert_close(OpenVinoEncoder(model)(pixels), in_jax(exact, pixels), 1e-4)


@pytest.mark.slow
def test_predictor_and_generator():
    model, image = random_sam(SMALL), random_image(50, 70)
    found, expected = (SamPredictor(model, runtime=runtime) for runtime in ("openvino", "jax"))
    for predictor in (found, expected):
        predictor.set_image(image)
    for options in ({"multimask_output": True}, {"multimask_output": False}):
        prompt = {"point_coords": [[30, 20]], "point_labels": [1], **options}
        a, b = (predictor.predict(**prompt) for predictor in (found, expected))
        assert_close(a.logits, b.logits, 1e-4)
        assert mask_iou(a.masks, b.masks).min() > 0.999
    options = {**ALL, "points_per_side": 3, "box_nms_thresh": 1.0}
    a, b = (
        SamAutomaticMaskGenerator(model, runtime=r, **options).generate(image)
        for r in ("openvino", "jax")
    )
    assert len(a) == len(b) > 3
    for one, other in zip(a, b, strict=True):
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert mask_iou(one["segmentation"], other["segmentation"]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_weights(mobile_sam_file, dtype):
    """The masks match JAX's in float32; in bfloat16, they are nearly the same."""
    image = load_image("examples/predictor.jpg")
    exact = sam_jax.from_pretrained(mobile_sam_file)
    model = sam_jax.from_pretrained(mobile_sam_file, dtype=dtype)
    predictors = [SamPredictor(model, runtime="openvino"), SamPredictor(exact)]
    rng = np.random.default_rng(0)
    points = rng.uniform((0, 0), image.shape[1::-1], (32, 1, 2))
    for predictor in predictors:
        predictor.set_image(image)
    a, b = (p.predict_batch(points, np.ones((32, 1), int)) for p in predictors)
    best = b.scores.argmax(1)
    ious = mask_iou(*(x.masks[np.arange(32), best] for x in (a, b)))
    assert ious.min() > (0.999 if dtype == "float32" else 0.5)
    assert ious.mean() > (0.9999 if dtype == "float32" else 0.95)


def test_an_export_is_made_once(cache, monkeypatch):
    model, pixels = random_sam(SHALLOW), pixels_of(SHALLOW)
    expected = OpenVinoEncoder(model)(pixels)
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "_write", None)
        np.testing.assert_array_equal(OpenVinoEncoder(model)(pixels), expected)
    (folder,) = cache.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".onnx", ".blob"}

    # Other parameters, and other settings with the same parameters, make another encoder.
    kernel = model.image_encoder.neck.conv1.kernel
    kernel[...] = 2 * kernel[...]
    other = OpenVinoEncoder(model)
    assert not np.array_equal(other(pixels), expected)
    assert len([*cache.iterdir()]) == 2
    vit = dataclasses.replace(SHALLOW.image_encoder, layer_norm_eps=0.1)
    config = dataclasses.replace(SHALLOW, image_encoder=vit)
    params = dict(sam_jax.checkpoints.flat_params(model))
    changed = sam_jax.checkpoints.build_model(params, config)
    assert not np.array_equal(OpenVinoEncoder(changed)(pixels), other(pixels))


def test_encoders_do_not_change_with_the_model(cache):
    """Later changes of the model affect neither the encoder nor its copies."""
    model, pixels = random_sam(SHALLOW), pixels_of(SHALLOW)
    predictor = SamPredictor(model, runtime="openvino")
    image = random_image(40, 40)
    predictor.set_image(image)
    expected = predictor.get_image_embedding()
    kernel = model.image_encoder.neck.conv1.kernel
    kernel[...] = 2 * kernel[...]
    for same in (predictor, pickle.loads(pickle.dumps(predictor))):
        same.set_image(image)
        np.testing.assert_array_equal(same.get_image_embedding(), expected)
    assert pixels.shape[0] == len([*cache.iterdir()])


def test_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "file"))
    model, pixels = random_sam(SHALLOW), pixels_of(SHALLOW)
    assert_close(OpenVinoEncoder(model)(pixels), in_jax(model, pixels), 1e-4)


@pytest.mark.usefixtures("unchecked")
def test_unsupported_encoders(monkeypatch):
    model = random_sam(SHALLOW)
    with pytest.raises(ValueError, match=r"runtime is 'onnx', expected one of \['jax', 'openvino'"):
        encoder_for(model, "onnx")
    adapted = add_lora(model, r"image_encoder\..*qkv", rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has other parameters than its .*; merge adapters, or"):
        SamPredictor(adapted, runtime="openvino")

    class Another(type(model.image_encoder)):
        """An encoder with the same parameters and different code."""

    another = random_sam(SHALLOW)
    another.image_encoder.__class__ = Another
    with pytest.raises(ValueError, match="the image encoder is a Another, expected one of"):
        SamPredictor(another, runtime="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r'run: pip install "sam_jax\[openvino\]"'):
        SamAutomaticMaskGenerator(model, runtime="openvino")
    assert encoder_for(model, "jax") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "segment {0}/1.png --point 30,20 --output {0}/out",
        "generate {0}/1.png --points-per-side 2 --output {0}/out",
        "evaluate {0}/coco.json --images {0}",
    ],
    ids=lambda command: command.split()[0],
)
def test_commands(command, tmp_path, monkeypatch):
    """The commands use OpenVINO's encoder."""
    sam_jax.save_pretrained(random_sam(SHALLOW), tmp_path / "model")
    Image.fromarray(random_image(40, 60)).save(tmp_path / "1.png")
    square = {"segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]], "image_id": 1, "id": 1, "iscrowd": 0}
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}
    coco = {"images": [image], "annotations": [square], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    calls, encode = [], OpenVinoEncoder.__call__
    monkeypatch.setattr(
        OpenVinoEncoder, "__call__", lambda self, x: calls.append(1) or encode(self, x)
    )
    arguments = [*command.format(tmp_path).split(), "--model", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["sam-jax", *arguments, "--runtime", "openvino"])
    cli.main()
    assert calls == [1]
