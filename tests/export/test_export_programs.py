"""Exported programs compute what the model does, and the examples run them without sam_jax."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
import torch_reference
from exports import CONFIG, run_command
from flax import nnx
from image_files import eps
from PIL import Image
from reference import (
    SHALLOW,
    SMALL,
    SMALL_TINY,
    assert_close,
    mask_iou,
    meta_sam,
    mobile_sam_torch,
    ours,
)
from safetensors.numpy import load_file

import sam_jax
from sam_jax import Sam, SamProcessor
from sam_jax.export import export_jax, export_onnx
from sam_jax.models.compiled import encode_image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def jax_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "jax"
    export_jax(model, folder)
    return folder


@pytest.fixture(scope="module")
def onnx_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export_onnx(model, folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """113 x 71 pixels, which is larger than the model's input."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(coarse).resize((113, 71), Image.Resampling.BICUBIC).save(path)
    return path


def random_prompts(b, p, n, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, CONFIG.image_size, (b, p, n, 2)).astype(np.float32)
    return points, rng.choice([-10, -1, 0, 1, 2, 3], (b, p, n)).astype(np.int32)


def random_arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def program(folder, name):
    exported = jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    return lambda *arrays: exported.call(load_file(folder / "params.safetensors"), *arrays)


# `jax.export`


@pytest.mark.slow
def test_jax_encoder(jax_folder, model):
    size = CONFIG.image_size
    for b in (1, 3):
        (pixels,) = random_arrays((b, size, size, 3))
        graphdef, state = nnx.split(model)
        assert_close(program(jax_folder, "encoder")(pixels), encode_image(graphdef, state, pixels))


@pytest.mark.slow
@pytest.mark.parametrize(("b", "p", "n", "with_masks"), [(2, 3, 2, False), (1, 2, 13, True)])
def test_jax_decoder(jax_folder, model, b, p, n, with_masks):
    grid, side = CONFIG.image_embedding_size, CONFIG.mask_size
    embeddings, masks = random_arrays(
        (b, grid, grid, CONFIG.prompt_embed_dim), (b, p, side, side), seed=n
    )
    points, labels = random_prompts(b, p, n)
    arrays = (embeddings, points, labels, *([masks] if with_masks else []))
    name = "decoder_with_masks" if with_masks else "decoder"
    logits, scores = program(jax_folder, name)(*arrays)

    @jax.jit
    def decode(embeddings, points, labels, masks=None):
        one = model.decode(embeddings, points, labels, masks=masks, multimask_output=False)
        three = model.decode(embeddings, points, labels, masks=masks, multimask_output=True)
        return [jnp.concatenate(parts, 2) for parts in zip(one, three, strict=True)]

    expected_logits, expected_scores = decode(*arrays)
    assert logits.shape == (b, p, 4, side, side)
    assert_close(logits, expected_logits)
    assert_close(scores, expected_scores)


@pytest.mark.slow
def test_jax_programs_in_bfloat16(tmp_path):
    """The decoder takes the encoder's embeddings unchanged; one platform may be a string."""
    model = ours(meta_sam(SHALLOW), SHALLOW, dtype=jnp.bfloat16)
    export_jax(model, tmp_path / "out", platforms="tpu")
    encoder, decoder = (
        jax.export.deserialize(bytearray((tmp_path / "out" / f"{name}.jax").read_bytes()))
        for name in ("encoder", "decoder")
    )
    assert encoder.platforms == decoder.platforms == ("tpu",)
    assert encoder.out_avals[0].dtype == jnp.bfloat16
    assert encoder.out_avals[0].dtype in [aval.dtype for aval in decoder.in_avals]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["platforms"] == ["tpu"]


@pytest.mark.slow
def test_jax_programs_with_a_gradient(tmp_path):
    """With respect to every input, parameters included, the gradients are the model's."""
    model = ours(meta_sam(SHALLOW), SHALLOW)
    export_jax(model, tmp_path / "out", platforms=["cpu"], vjp_order=1)
    encoder, decoder = (
        jax.export.deserialize(bytearray((tmp_path / "out" / f"{name}.jax").read_bytes())).call
        for name in ("encoder", "decoder")
    )
    params = load_file(tmp_path / "out" / "params.safetensors")
    size = SHALLOW.image_size
    (pixels,) = random_arrays((2, size, size, 3))
    points = np.array([[[[0.3 * size, 0.6 * size], [0, 0]]]] * 2, np.float32)
    labels = jnp.array([[[1, -1]]] * 2)
    graphdef, state = nnx.split(model)

    def by_program(params, pixels, points):
        logits, scores = decoder(params, encoder(params, pixels), points, labels)
        return (logits[:, :, 1:] ** 2).mean() + (scores[:, :, 1:] ** 2).sum()

    def by_model(state, pixels, points):
        sam = nnx.merge(graphdef, state)
        logits, scores = sam.decode(sam.encode_image(pixels), points, labels, multimask_output=None)
        return (logits[:, :, 1:] ** 2).mean() + (scores[:, :, 1:] ** 2).sum()

    of_params, *found = jax.jit(jax.grad(by_program, (0, 1, 2)))(params, pixels, points)
    of_state, *expected = jax.jit(jax.grad(by_model, (0, 1, 2)))(state, pixels, points)
    for a, e in zip(found, expected, strict=True):
        assert abs(e).max() > 0
        assert_close(a, e)
    for name in ("mask_decoder.iou_token", "image_encoder.patch_embed.kernel"):
        leaf = of_state
        for part in name.split("."):
            leaf = leaf[part]
        assert_close(of_params[name], leaf[...])


@pytest.mark.slow
def test_jax_programs_without_a_gradient(jax_folder):
    """The documented limits: gradients only on request, and no vmap."""
    encoder, (pixels,) = (
        program(jax_folder, "encoder"),
        random_arrays((1, *[CONFIG.image_size] * 2, 3)),
    )
    with pytest.raises(ValueError, match="No VJP is available"):
        jax.grad(lambda pixels: encoder(pixels).sum())(pixels)
    with pytest.raises(NotImplementedError, match="Batching rule"):
        jax.vmap(encoder)(pixels[None])


# ONNX


def onnx_session(folder, name):
    return onnxruntime.InferenceSession(folder / f"{name}.onnx")


def onnx_inputs(config, n, has_mask, size, seed=0):
    """Inputs of Meta's decoder, with coordinates in the resized image."""
    grid, side = config.image_embedding_size, config.mask_size
    embedding, mask = random_arrays(
        (1, config.prompt_embed_dim, grid, grid), (1, 1, side, side), seed=seed
    )
    rng = np.random.default_rng(seed)
    return {
        "image_embeddings": embedding,
        "point_coords": rng.uniform(0, config.image_size, (1, n, 2)).astype(np.float32),
        "point_labels": rng.integers(-1, 4, (1, n)).astype(np.float32),
        "mask_input": mask,
        "has_mask_input": np.array([has_mask], np.float32),
        "orig_im_size": np.array(size, np.float32),
    }


def meta_onnx_model(sam, single_mask):
    onnx = torch_reference.import_reference("segment_anything.utils.onnx")
    return onnx.SamOnnxModel(sam, return_single_mask=single_mask)


NAMES = ["masks", "iou_predictions", "low_res_masks"]


SIZES = [(71, 113), (96, 96), (400, 30), (7, 5)]


@pytest.mark.parametrize("single_mask", [False, True])
def test_onnx_decoder(torch_sam, model, onnx_folder, single_mask, tmp_path):
    folder = onnx_folder
    if single_mask:
        folder = tmp_path / "single"
        export_onnx(model, folder, single_mask=True)
    session = onnx_session(folder, "decoder")
    reference = meta_onnx_model(torch_sam, single_mask)
    for n, size in zip((1, 2, 3, 17), SIZES, strict=True):
        inputs = onnx_inputs(CONFIG, n, has_mask=n % 2, size=size, seed=n)
        assert [x.name for x in session.get_inputs()] == list(inputs)
        assert [x.name for x in session.get_outputs()] == NAMES
        outputs = session.run(None, inputs)
        expected = reference(*map(torch.tensor, inputs.values()))
        assert outputs[0].shape == (1, 1 if single_mask else 4, *size)
        for actual, wanted in zip(outputs, expected, strict=True):
            assert_close(actual, wanted)


def test_onnx_encoder(torch_sam, onnx_folder):
    session = onnx_session(onnx_folder, "encoder")
    for shape in ((96, 96, 3), (96, 51, 3), (4, 96, 3)):
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
        (embedding,) = session.run(["image_embeddings"], {"input_image": image})
        with torch.no_grad():
            pixels = torch_sam.preprocess(torch.tensor(image.transpose(2, 0, 1)))
            expected = torch_sam.image_encoder(pixels[None])
        assert_close(embedding, expected)


@pytest.mark.slow
def test_onnx_of_real_weights(mobile_sam_file, tmp_path):
    """MobileSAM, exported by the command, matches PyTorch's encoder and Meta's decoder."""
    image = skimage.data.coffee()
    Image.fromarray(image).save(tmp_path / "photo.png")
    run_command("export", mobile_sam_file, "--format", "onnx", "--output", tmp_path / "out")
    # The model's size: attention biases are not copied for each window.
    assert (tmp_path / "out" / "encoder.onnx").stat().st_size < 30e6
    session = onnx_session(tmp_path / "out", "decoder")
    (embedding,) = onnx_session(tmp_path / "out", "encoder").run(
        None, {"input_image": resized(image, 1024)}
    )
    sam = mobile_sam_torch(mobile_sam_file)
    predictor = torch_reference.import_reference("segment_anything").SamPredictor(sam)
    predictor.set_image(image)
    assert_close(embedding, predictor.features, 1e-4)

    inputs = {
        "image_embeddings": embedding,
        "point_coords": np.array([[[512, 307], [0, 0]]], np.float32),
        "point_labels": np.array([[1, -1]], np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([400, 600], np.float32),
    }
    outputs = session.run(None, inputs)
    expected = meta_onnx_model(sam, False)(*map(torch.tensor, inputs.values()))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted, 1e-4)
    assert mask_iou(outputs[0] > 0, expected[0].numpy() > 0).min() >= 0.9999


def resized(image, size):
    scale = size / max(image.shape)
    height, width = (int(n * scale + 0.5) for n in image.shape[:2])
    image = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32)


# Both formats


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL_TINY, SMALL], ids=["tiny_vit", "vit"])
def test_sam_hq_and_tiny_vit(config, tmp_path):
    """Both formats support them, including an early layer's channels."""
    model = Sam(dataclasses.replace(config, hq=True), rngs=nnx.Rngs(0))
    size = config.image_size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels = SamProcessor(model.config)(image)["pixel_values"]
    points = np.array([[[[0.3 * size, 0.6 * size], [0, 0]]]], np.float32)
    labels = np.array([[[1, -1]]], np.int32)
    embedding = jnp.moveaxis(model.get_image_embeddings(pixels), 1, -1)
    prompts = jnp.asarray(points), jnp.asarray(labels)
    decode = jax.jit(lambda *arrays: model.decode(*arrays, multimask_output=None))
    expected, scores = decode(embedding, *prompts)

    export_jax(model, tmp_path / "jax", platforms=["cpu"])
    params = load_file(tmp_path / "jax" / "params.safetensors")
    encoder, decoder = (
        jax.export.deserialize(bytearray((tmp_path / "jax" / f"{name}.jax").read_bytes())).call
        for name in ("encoder", "decoder")
    )
    found = encoder(params, pixels)
    assert_close(found, embedding)
    for a, e in zip(decoder(params, found, points, labels), (expected, scores), strict=True):
        assert_close(a, e)

    export_onnx(model, tmp_path / "onnx")
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx")
        for name in ("encoder", "decoder")
    )
    (found,) = encoder.run(None, {"input_image": image.astype(np.float32)})
    assert_close(np.moveaxis(found, 1, -1), embedding)
    side = model.config.mask_size
    inputs = {
        "image_embeddings": found,
        "point_coords": points[0],
        "point_labels": labels[0].astype(np.float32),
        "mask_input": np.zeros((1, 1, side, side), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([size, size], np.float32),
    }
    _, found_scores, low_res = decoder.run(None, inputs)
    assert_close(low_res, expected[0])
    assert_close(found_scores, scores[0])
    with pytest.raises(Exception, match=r"[Rr]eshape"):
        encoder.run(None, {"input_image": np.zeros((size, size + 9, 3), np.float32)})


# The examples, where sam_jax cannot be imported

WITHOUT = """
import runpy, sys
example, blocked, *sys.argv[1:] = sys.argv[1:]
for name in blocked.split(","):
    sys.modules[name] = None  # importing it is an error
runpy.run_path(example, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "folder", "blocked"),
    [
        ("load_export", "jax_folder", "sam_jax,flax,torch,orbax"),
        ("load_onnx", "onnx_folder", "sam_jax,jax,flax,torch,onnx"),
    ],
)
def test_example(example, folder, blocked, request, model, photo, tmp_path):
    folder = request.getfixturevalue(folder)
    command = [sys.executable, "-c", WITHOUT, EXAMPLES / f"{example}.py", blocked, folder, photo]
    result = subprocess.run(
        [*command, "60", "30.5"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    predictor = sam_jax.SamPredictor(model)
    predictor.set_image(photo)
    masks, scores, _ = predictor.predict([[60, 30.5]], [1])
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask_iou(np.asarray(mask), masks[scores.argmax()]) >= 0.9999
    assert result.stdout == f"mask.png  predicted IoU {scores.max():.3f}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "name"),
    [
        *(("load_export", name) for name in ("gray.png", "eps.jpg")),
        *(("load_onnx", name) for name in ("color.png", "eps.jpg")),
    ],
)
def test_examples_refuse_deep_and_executable_images(
    example, name, jax_folder, onnx_folder, tmp_path
):
    deep = np.full((9, 9, 3), 4000, np.uint16)
    cv2.imwrite(str(tmp_path / "gray.png"), deep[..., 0])
    cv2.imwrite(str(tmp_path / "color.png"), deep)
    (tmp_path / "eps.jpg").write_bytes(eps())
    folder = {"load_export": jax_folder, "load_onnx": onnx_folder}[example]
    command = [sys.executable, EXAMPLES / f"{example}.py", folder, tmp_path / name, "5", "5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    expected = "cannot identify image" if name == "eps.jpg" else "has 16 bits per channel, expected"
    assert expected in result.stderr
    assert not (tmp_path / "mask.png").exists()


@pytest.mark.parametrize(
    "change", [{}, {"normalization": "min_max"}, {"resize": "square"}], ids=str
)
def test_the_loader_preprocesses_like_the_processor(change, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import load_export

    config = dataclasses.replace(SMALL, **change)
    image = Image.fromarray(np.random.default_rng(1).integers(9, 200, (50, 70, 3), dtype=np.uint8))
    pixels, shape = load_export.preprocess(image, json.loads(json.dumps(config.to_dict())))
    processor = SamProcessor(config)
    np.testing.assert_allclose(pixels, processor(image)["pixel_values"], atol=1e-6)
    assert shape == processor.input_size((50, 70))
