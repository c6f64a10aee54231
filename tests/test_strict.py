"""Inference under all of JAX's strict switches at once."""

import contextlib
import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import SHALLOW, SMALL, TINIEST

from sam_jax import Sam, SamAutomaticMaskGenerator, SamPredictor, pipeline
from sam_jax.ops.prompts import join_prompts

pytestmark = pytest.mark.slow

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
MASK = np.zeros((60, 90), bool)
MASK[10:40, 20:70] = True


@pytest.fixture
def strict():
    with contextlib.ExitStack() as stack:
        for switch in (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.transfer_guard("disallow"),
            jax.debug_nans(True),
            jax.enable_checks(True),
        ):
            stack.enter_context(switch)
        yield


@pytest.fixture
def leaks():
    """Checks that no tracer outlives its trace.

    JAX searches the memory for what still refers to one. Objects of earlier tests do not, and
    there are millions of them.
    """
    gc.freeze()
    with jax.checking_leaks():
        yield
    gc.unfreeze()


HQ = dataclasses.replace(SMALL, mask_decoder=SHALLOW.mask_decoder, hq=True)


@pytest.fixture(params=[SHALLOW, TINIEST, HQ], ids=["vit", "tiny_vit", "hq"])
def model(request):
    return Sam(request.param, rngs=nnx.Rngs(0))  # Flax's own initializers fail under the switches


def test_inference(model, strict):
    infer(model)


@pytest.mark.parametrize("model", [SHALLOW], ids=["vit"], indirect=True)
def test_inference_leaks_no_tracer(model, strict, leaks):
    """Only one kind of model: JAX caches nothing while it checks for leaks, which is slow."""
    infer(model)


def infer(model):
    predictor = SamPredictor(model)
    predictor.set_image(IMAGE)
    # A ragged batch, whose padding is masked by -inf in every softmax.
    masks, _, logits = predictor.predict_batch(
        [[[3, 4]], [[30, 40], [5, 6]]], [[1], [1, 0]], multimask_output=False
    )
    assert masks.shape == (2, 1, 60, 90)
    masks, _, _ = predictor.predict(
        box=[1, 2, 30, 40],
        mask_input=predictor.processor.mask_to_logits(MASK),
        multimask_output=False,
        return_logits=True,
    )
    assert np.isfinite(masks).all()
    predictor.predict(mask_input=logits[0], multimask_output=False)
    predictor.set_image_embedding(predictor.get_image_embedding(), predictor.original_size)

    inputs = predictor.processor([IMAGE, IMAGE[:50]], input_points=[[[[3, 4]]], [[[5, 6]]]])
    outputs = model(**inputs)
    predictor.processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    model.get_prompt_embeddings(inputs["input_points"])
    for prompts in ({}, {"input_boxes": np.array([[[1, 2, 30, 40]]] * 2)}):
        arrays = jax.device_put({**inputs, **prompts})
        found = model(**arrays)
        model.get_prompt_embeddings(arrays["input_points"], input_boxes=arrays.get("input_boxes"))
        arrays.pop("input_labels")
        model(**arrays)
        if not prompts:
            pairs = zip(*jax.device_get((found, outputs)), strict=True)
            assert all(np.allclose(a, b, atol=1e-4) for a, b in pairs)
    model.get_image_wide_positional_embeddings()

    graphdef, state = nnx.split(model)
    points, labels = join_prompts(inputs["input_points"], inputs["input_labels"], None)

    @jax.jit
    def masks_of(state, *arrays):
        sam = nnx.merge(graphdef, state)
        pixels, points, labels = arrays
        return sam.decode(sam.encode_image(pixels), points, labels)

    masks, _ = masks_of(state, *jax.device_put((inputs["pixel_values"], points, labels)))
    assert np.allclose(masks, jax.device_get(outputs.pred_masks), atol=1e-4)


def test_models_leak_no_tracer(model, leaks):
    """Traces only the parts that differ between kinds of models."""
    size = model.config.image_size
    prompts = join_prompts(np.ones((1, 3, 1, 2), np.float32), np.ones((1, 3, 1), np.int32), None)
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    embeddings = jax.eval_shape(model.encode_image, pixels)
    jax.eval_shape(model.decode, embeddings, *prompts)


def test_guidance_of_another_dtype(strict):
    with jax.transfer_guard("allow"), jax.numpy_dtype_promotion("standard"):
        model = Sam(SMALL, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    grid, dim = SMALL.image_embedding_size, SMALL.prompt_embed_dim
    model(
        image_embeddings=np.ones((1, dim, grid, grid), np.float32),
        input_points=np.ones((1, 1, 1, 2), np.float32),
        target_embedding=np.ones((1, 1, 1, dim), np.float32),
        attention_similarity=np.ones((1, 1, 1, grid * grid), np.float32),
    )


@pytest.mark.parametrize("model", [HQ], ids=["hq"], indirect=True)
def test_everything_mode(model, strict, leaks):
    everything = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    generator = SamAutomaticMaskGenerator(
        model, points_per_side=2, crop_n_layers=1, min_mask_region_area=5, **everything
    )
    generator.generate(IMAGE)
    pipeline(model=model, points_per_crop=2, **everything)(IMAGE)
