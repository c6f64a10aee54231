"""SAM-HQ: sam_jax against the original (`segment-anything-hq`) and Hugging Face's `SamHQModel`.

Masks from Hugging Face's weights are compared with the original's, because the decoder of
`SamHQModel` (5.23) upscales the embedding from before the transformer, with rows and columns
exchanged. Its weights, encoder and scores are correct.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from network import needs_package_index
from reference import (
    SMALL,
    SMALL_TINY,
    assert_close,
    assert_same_epsilons,
    hf_sam,
    meta_sam,
    normal,
    ours,
    to_torch,
)
from torch_reference import import_reference

from sam_jax import SamAutomaticMaskGenerator, SamPredictor, from_pretrained, save_pretrained
from sam_jax.checkpoints import load_params, write_checkpoint
from sam_jax.checkpoints.names import from_torch
from sam_jax.checkpoints.package_index import PackageMember, download_package
from sam_jax.checkpoints.params import build_model, flat_params, param_shapes
from sam_jax.config import vit_b
from sam_jax.ops.prompts import join_prompts
from sam_jax.training.rules import HQ_ONLY, combine, partition
from sam_jax.training.step import batch_losses, mean_loss

HQ = dataclasses.replace(
    SMALL, hq=True, mask_decoder=dataclasses.replace(SMALL.mask_decoder, num_heads=8)
)
HQ_HF = dataclasses.replace(
    HQ, mask_decoder=dataclasses.replace(HQ.mask_decoder, layer_norm_eps=1e-6)
)
# The reference hardcodes a grid of 64.
HQ_TINY = dataclasses.replace(SMALL_TINY, hq=True, image_size=1024)
WIDE = dataclasses.replace(
    vit_b(),
    hq=True,
    image_size=512,
    image_encoder=dataclasses.replace(vit_b().image_encoder, depth=2, global_attn_indexes=(1,)),
)

POINTS = np.array([[[[30.0, 41.5], [70.0, 20.0]], [[10.5, 80.0], [60.0, 60.0]]]], np.float32)
LABELS = np.array([[[1, 0], [1, 1]]], np.int32)
BOXES = np.array([[[5.0, 10.0, 60.0, 70.5], [20.0, 20.0, 90.0, 95.0]]], np.float32)
MASKS = np.random.default_rng(3).normal(size=(1, 2, 48, 48)).astype(np.float32)
PROMPTS = {
    "points": (POINTS, LABELS, None, None),
    "all": (POINTS, LABELS, BOXES, MASKS),
}


@pytest.fixture(scope="module", autouse=True)
def segment_anything_hq(tmp_path_factory):
    """The original's code, imported from its unmodified wheel."""
    package = PackageMember(
        requirement="segment-anything-hq==0.3",
        sha256="722d6cb9157074f84d83144401216f0dd2ab1ca972a2d1c491c73b20d689d006",
        member="segment_anything_hq",
        wheel=True,
    )
    with needs_package_index():
        wheel = download_package(package, tmp_path_factory.mktemp("segment_anything_hq"))
    sys.path.append(str(wheel))
    yield
    sys.path.remove(str(wheel))


@pytest.fixture(scope="module")
def original():
    return meta_sam(HQ)


@pytest.fixture(scope="module")
def model(original):
    return ours(original, HQ)


def test_epsilons_match_the_original(original, model):
    assert_same_epsilons(model, original)


def encode(model, pixels):
    embedding = jnp.moveaxis(model.get_image_embeddings(pixels), 1, -1)
    dim = model.config.prompt_embed_dim
    return embedding[..., :dim], embedding[..., dim:]


def test_embeddings_match_the_original(original, model):
    pixels = normal((2, 96, 96, 3), seed=1)
    with torch.no_grad():
        expected, early = original.image_encoder(to_torch(pixels))
        features = original.mask_decoder.embedding_encoder(
            expected
        ) + original.mask_decoder.compress_vit_feat(early[0].permute(0, 3, 1, 2))
    found, found_early = encode(model, pixels)
    assert_close(jnp.moveaxis(found, -1, 1), expected)
    assert_close(found_early, early[0])
    for i in range(2):
        both = jnp.concatenate([found[i], found_early[i]], -1)
        embedding, hq_features = model.mask_decoder.image_features(both)
        assert_close(embedding, found[i])
        assert_close(jnp.moveaxis(hq_features, -1, 0), features[i])


def torch_decode(original, embedding, early, points, labels, boxes, masks, multimask, **options):
    """Decodes one image with the original."""
    prompts = None if points is None else (torch.tensor(points[0]), torch.tensor(labels[0]))
    sparse, dense = original.prompt_encoder(
        points=prompts,
        boxes=None if boxes is None else torch.tensor(boxes[0]),
        masks=None if masks is None else torch.tensor(masks[0][:, None]),
    )
    decoder = original.mask_decoder
    arguments = {
        "image_embeddings": embedding,
        "image_pe": original.prompt_encoder.get_dense_pe(),
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
    }
    if multimask is None:  # SAM's masks and the HQ mask, separately
        features = decoder.embedding_encoder(embedding) + decoder.compress_vit_feat(
            early.permute(0, 3, 1, 2)
        )
        return decoder.predict_masks(**arguments, hq_features=features)
    return decoder(
        **arguments, multimask_output=multimask, interm_embeddings=[early], hq_token_only=False
    )


@pytest.mark.optimized
@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=() if x == "points" else pytest.mark.slow) for x in PROMPTS],
)
def test_masks_match_the_original(original, model, kind):
    pixels = normal((1, 96, 96, 3), seed=2)
    prompts = PROMPTS[kind]
    with torch.no_grad():
        embedding, early = original.image_encoder(to_torch(pixels))
        everything, all_scores = torch_decode(original, embedding, early[0], *prompts, None)
        best, best_score = torch_decode(original, embedding, early[0], *prompts, True)
        single, single_score = torch_decode(original, embedding, early[0], *prompts, False)
    names = "input_points", "input_labels", "input_boxes", "input_masks"
    inputs = {k: v for k, v in zip(names, prompts, strict=True) if v is not None}
    found = model(pixels, **inputs)
    assert_close(found.pred_masks[0], everything[:, 1:4] + everything[:, 4:])
    assert_close(found.iou_scores[0], all_scores[:, 1:])
    for i in range(2):
        choice = int(found.iou_scores[0, i].argmax())
        assert_close(found.pred_masks[0, i, choice], best[i, 0])
        assert_close(found.iou_scores[0, i, choice], best_score[i, 0])
    found = model(pixels, **inputs, multimask_output=False)
    assert_close(found.pred_masks[0], single)
    assert_close(found.iou_scores[0], single_score)
    found = model(pixels, **inputs, multimask_output=False, hq_token_only=True)
    assert_close(found.pred_masks[0], everything[:, 4:])
    assert_close(found.iou_scores[0], single_score)


@pytest.mark.slow
def test_gradients_match_the_original(original, model):
    pixels, weights = normal((1, 96, 96, 3), seed=4), normal((2, 4, 48, 48), seed=5)
    for parameter in original.parameters():
        parameter.grad = None
    embedding, early = original.image_encoder(to_torch(pixels))
    masks, scores = torch_decode(original, embedding, early[0], POINTS, LABELS, None, None, None)
    masks = masks[:, :4] + masks[:, 4:]
    ((masks * torch.tensor(np.asarray(weights))).sum() + scores.sum()).backward()

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    points, labels = (jnp.asarray(x) for x in join_prompts(POINTS, LABELS, None))

    @jax.jit
    @jax.grad
    def gradient(params):
        sam = nnx.merge(graphdef, params, rest)
        masks, scores = sam.decode(sam.encode_image(pixels), points, labels, multimask_output=None)
        return (masks[0] * weights).sum() + scores.sum()

    found = flat_params(nnx.merge(graphdef, gradient(params), rest))
    tensors = {
        name: p.grad.numpy() for name, p in original.named_parameters() if p.grad is not None
    }
    zeros = {k: np.zeros(p.shape, np.float32) for k, p in original.state_dict().items()}
    expected = flat_params(ours_of({**zeros, **tensors}))
    largest = max(np.abs(np.asarray(v)).max() for v in expected.values())
    compared = 0
    for path, value in expected.items():
        if path.startswith(("mask_decoder.", "image_encoder.")) and np.abs(value).max() > 0:
            atol = 1e-6 * largest if path.endswith("k_proj.bias") else 1e-4 * np.abs(value).max()
            assert np.abs(np.asarray(found[path]) - value).max() <= atol, path
            compared += path.startswith("mask_decoder.hq.")
    assert compared == 1 + 6 + 12 + 6


def ours_of(tensors):
    """A sam_jax model that holds the original's gradients."""
    return build_model(from_torch(tensors, HQ, param_shapes(HQ)), HQ)


@pytest.mark.slow
@pytest.mark.parametrize("config", [HQ_TINY, WIDE], ids=["tiny_vit", "vit_b_at_reduced_depth"])
def test_other_encoders(config):
    reference = meta_sam(config)
    model = ours(reference, config)
    size = config.image_size
    pixels = normal((1, size, size, 3), seed=6)
    points = np.array([[[[0.3 * size, 0.4 * size]]]], np.float32)
    labels = np.ones((1, 1, 1), np.int32)
    with torch.no_grad():
        embedding, early = reference.image_encoder(to_torch(pixels))
        expected, scores = torch_decode(
            reference, embedding, early[0], points, labels, None, None, False
        )
    found = model(pixels, points, labels, multimask_output=False)
    assert_close(found.pred_masks[0], expected)
    assert_close(found.iou_scores[0], scores)


@pytest.mark.slow
def test_hugging_faces_folder(tmp_path):
    """Weights and sorted scores match; the masks match the original's with these weights."""
    reference = hf_sam(HQ_HF)
    reference.save_pretrained(tmp_path / "hf")
    model = from_pretrained(tmp_path / "hf")
    assert model.config == dataclasses.replace(
        HQ_HF, pixel_mean=model.config.pixel_mean, pixel_std=model.config.pixel_std
    )
    pixels = normal((1, 96, 96, 3), seed=7)
    with torch.no_grad():
        expected = reference(
            to_torch(pixels), input_points=torch.tensor(POINTS), input_labels=torch.tensor(LABELS)
        )
    found = model(pixels, POINTS, LABELS)
    assert_close(-np.sort(-np.asarray(found.iou_scores), -1), expected.iou_scores)

    params, config = load_params(tmp_path / "hf")
    write_checkpoint(tmp_path / "meta.pth", params, config=config, fmt="meta")
    write_checkpoint(tmp_path / "again" / "model.safetensors", params, config=config, fmt="hf")
    again, _ = load_params(tmp_path / "again")
    assert all(np.array_equal(again[name], value) for name, value in params.items())
    original = meta_sam(config)
    original.load_state_dict(torch.load(tmp_path / "meta.pth", weights_only=True))
    for module in original.mask_decoder.transformer.modules():
        # Only in the blocks: the final norm's epsilon is 1e-5 in Hugging Face's model, too.
        for i in (1, 2, 3, 4):
            if hasattr(module, f"norm{i}"):
                getattr(module, f"norm{i}").eps = 1e-6
    with torch.no_grad():
        embedding, early = original.image_encoder(to_torch(pixels))
        masks, _ = torch_decode(original, embedding, early[0], POINTS, LABELS, None, None, None)
    assert_close(found.pred_masks[0], masks[:, 1:4] + masks[:, 4:])


def test_original_file_and_our_folder(tmp_path, original, model):
    torch.save(original.state_dict(), tmp_path / "sam_hq.pth")
    loaded = from_pretrained(tmp_path / "sam_hq.pth")
    assert loaded.config == HQ
    save_pretrained(loaded, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    assert again.config == HQ
    expected = flat_params(model)
    for found in (flat_params(loaded), flat_params(again)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
def test_predictor_and_everything_mode(model):
    image = np.random.default_rng(8).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    predictor = SamPredictor(model)
    predictor.set_image(image)
    embedding = predictor.get_image_embedding()
    assert embedding.shape == (1, 32 + 48, 12, 12)
    expected = predictor.predict([[40, 30]], [1])
    predictor.set_image_embedding(embedding, image.shape[:2])
    for a, e in zip(predictor.predict([[40, 30]], [1]), expected, strict=True):
        np.testing.assert_array_equal(a, e)
    _, _, alone = predictor.predict([[40, 30]], [1], hq_token_only=True)
    np.testing.assert_array_equal(alone[0], alone[2])
    assert np.abs(alone - expected[2]).max() > 0.1
    generator = SamAutomaticMaskGenerator(
        model, 2, pred_iou_thresh=-100, stability_score_thresh=0, box_nms_thresh=1
    )
    records = generator.generate(image)
    assert records
    for record in records:
        masks, scores, _ = predictor.predict(record["point_coords"], [1])
        which = np.abs(scores - record["predicted_iou"]).argmin()
        assert (masks[which] != record["segmentation"]).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_everything_mode_has_the_originals_masks(original, model):
    """The original has one mask per point; sam_jax has that and two more."""
    amg = import_reference("segment_anything_hq").automatic_mask_generator
    options = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    options["box_nms_thresh"] = 1.0  # keeps every mask
    image = np.random.default_rng(0).integers(0, 256, (64, 90, 3), dtype=np.uint8)
    expected = amg.SamAutomaticMaskGenerator(original, **options).generate(image)
    found = SamAutomaticMaskGenerator(model, **options).generate(image)
    assert len(expected) == 16
    assert len(found) == 3 * 16
    for record in expected:
        same = [r for r in found if r["point_coords"] == record["point_coords"]]
        best = max(same, key=lambda r: r["predicted_iou"])
        assert best["predicted_iou"] == pytest.approx(record["predicted_iou"], abs=1e-5)
        assert np.array_equal(best["segmentation"], record["segmentation"])
        assert (best["bbox"], best["area"]) == (record["bbox"], record["area"])


def test_hq_token_needs_a_sam_hq_model():
    plain = dataclasses.replace(HQ, hq=False)
    with pytest.raises(ValueError, match="hq_token_only is True, but the model is not a SAM-HQ"):
        ours(meta_sam(plain), plain)(
            np.zeros((1, 96, 96, 3), np.float32), POINTS, LABELS, hq_token_only=True
        )


@pytest.mark.slow
def test_hq_parameters_train(model):
    trained, rest = partition(model, HQ_ONLY)
    batch = {
        "pixel_values": normal((1, 96, 96, 3), seed=9),
        "masks": jnp.zeros((1, 1, 48, 48), bool).at[..., 10:30, 5:25].set(True),
        "boxes": jnp.array([[[10.0, 20.0, 50.0, 60.0]]]),
        "valid": jnp.ones((1, 1)),
    }

    @jax.jit
    @jax.grad
    def gradient(trained):
        losses = batch_losses(combine(trained, rest), batch, jax.random.split(jax.random.key(0), 1))
        return mean_loss(losses, batch["valid"])[0]

    found = nnx.to_pure_dict(gradient(trained))
    assert list(found) == ["mask_decoder"]
    assert list(found["mask_decoder"]) == ["hq"]
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(found))
