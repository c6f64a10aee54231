import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from prompts import BOXES, LABELS, MASKS, POINTS, PROMPTS, SMALL_HF, torch_inputs
from reference import (
    assert_close,
    hf_sam,
    normal,
    ours,
    tensor,
    to_torch,
)

from sam_jax.models import hf_api
from sam_jax.ops.prompts import join_prompts


@pytest.mark.optimized
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(inputs, id=name, marks=() if name == "points" else pytest.mark.slow)
        for name, inputs in PROMPTS.items()
    ],
)
def test_the_api_matches_hugging_face(hf, model, embeddings, inputs):
    with torch.no_grad():
        expected = hf(image_embeddings=embeddings, **torch_inputs(inputs))
    actual = model(image_embeddings=embeddings.numpy(), **inputs)
    assert_close(actual.pred_masks, expected.pred_masks)
    assert_close(actual.iou_scores, expected.iou_scores)


def test_padding_is_removed_on_the_accelerator(model, embeddings, monkeypatch):
    """On a simulated accelerator, three prompts are padded to four."""
    points = np.float32([[[[30, 20]], [[50, 60]], [[9, 80]]]])
    expected = model(image_embeddings=embeddings[:1].numpy(), input_points=points)
    monkeypatch.setattr(hf_api, "on_accelerator", lambda x: isinstance(x, jax.Array))
    with jax.transfer_guard("disallow"):
        found = model(image_embeddings=jax.device_put(embeddings[:1].numpy()), input_points=points)
    assert found.pred_masks.shape == (1, 3, 3, 48, 48)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_pixels_to_masks(hf, model, pixels):
    inputs = PROMPTS["points"]
    with torch.no_grad():
        expected = hf(pixel_values=to_torch(pixels), **torch_inputs(inputs))
    actual = model(pixel_values=pixels, **inputs, original_sizes=None, reshaped_input_sizes=None)
    assert_close(actual.pred_masks, expected.pred_masks)
    assert_close(actual.iou_scores, expected.iou_scores)


@pytest.mark.slow
def test_personalization(hf, model, embeddings):
    # No gradients: with a target, `transformers` changes the tokens in place.
    similarity, target = normal((1, 1, 1, 144), seed=2), normal((1, 1, 32), seed=3)
    inputs = PROMPTS["points"]
    with torch.no_grad():
        expected = hf(
            image_embeddings=embeddings,
            attention_similarity=tensor(similarity),
            target_embedding=tensor(target),
            **torch_inputs(inputs),
        )
    actual = model(
        image_embeddings=embeddings.numpy(),
        attention_similarity=similarity,
        target_embedding=target,
        **inputs,
    )
    assert_close(actual.pred_masks, expected.pred_masks)
    assert_close(actual.iou_scores, expected.iou_scores)


def test_attention_similarity_per_prompt(hf, model, embeddings):
    similarity = normal((6, 4, 10, 144), seed=4)  # 5 output tokens, 4 points and one more
    inputs = PROMPTS["points"]
    with torch.no_grad():
        expected = hf(
            image_embeddings=embeddings,
            attention_similarity=tensor(similarity),
            **torch_inputs(inputs),
        )
    actual = model(image_embeddings=embeddings.numpy(), attention_similarity=similarity, **inputs)
    assert_close(actual.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("name", ["points", "boxes", "points_and_boxes", "mask_per_image"])
def test_prompt_embeddings(hf, model, name):
    inputs = {"input_labels": None, **PROMPTS[name]}
    expected = hf.get_prompt_embeddings(**torch_inputs(inputs))
    actual = model.get_prompt_embeddings(**inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


def test_embeddings(hf, model, pixels, embeddings):
    assert_close(model.get_image_embeddings(pixels), embeddings)
    assert_close(
        model.get_image_wide_positional_embeddings(), hf.get_image_wide_positional_embeddings()
    )


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_points": np.where(POINTS > 90, np.nan, POINTS)}, "not finite"),
        (
            {"input_points": POINTS, "input_labels": LABELS + 4},
            r"have labels \[4, 5\]; known are 1",
        ),
        ({"input_boxes": BOXES[..., ::-1]}, "expected x0, y0, x1, y1 with x0 <= x1"),
        ({"input_boxes": BOXES + np.inf}, "not finite"),
    ],
)
def test_bad_values(model, embeddings, inputs, message, asarray):
    inputs = {k: asarray(v) for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        model(image_embeddings=embeddings.numpy(), **inputs)
    with pytest.raises(ValueError, match=message):
        model.get_prompt_embeddings(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention_similarity", (144,)),
        ("attention_similarity", (1, 1, 1, 100)),
        ("attention_similarity", (3, 1, 1, 144)),  # neither one nor 2 * 3 prompts
        ("attention_similarity", (1, 1, 9, 144)),  # there are 5 + 4 + 1 tokens
        ("attention_similarity", (1, 1, 1, 1, 144)),
        ("target_embedding", (32,)),
        ("target_embedding", (1, 1, 31)),
        ("target_embedding", (6, 1, 32)),
    ],
    ids=str,
)
def test_guidance_must_broadcast(model, embeddings, name, shape):
    def call():
        return model(
            image_embeddings=embeddings.numpy(), **PROMPTS["points"], **{name: np.ones(shape)}
        )

    if len(shape) == 1:  # the simplest shape, for every prompt, head and token
        assert call().pred_masks.shape == (2, 3, 3, 48, 48)
        return
    with pytest.raises(ValueError, match=rf"{name} has shape .*, expected one that broadcasts to"):
        call()


@pytest.mark.slow
def test_number_of_compilations(compilations):
    """Other numbers of prompts and points in the same buckets need no new program."""
    model, rng = ours(hf_sam(SMALL_HF), SMALL_HF), np.random.default_rng(0)
    embeddings = rng.normal(size=(1, 32, 12, 12)).astype(np.float32)

    def call(prompts, length):
        points = rng.uniform(0, 96, (1, prompts, length, 2)).astype(np.float32)
        masks = rng.normal(size=(1, prompts, 48, 48)).astype(np.float32)
        boxes = np.concatenate([points[:, :, 0] / 2, 48 + points[:, :, 0] / 2], axis=-1)
        for inputs in (
            {"input_points": points},
            {"input_points": points, "input_boxes": boxes},
            {"input_points": points, "input_masks": masks},
            {},
            {"input_masks": masks},
        ):
            outputs = model(image_embeddings=embeddings, **inputs)
            count = prompts if inputs else 1
            assert outputs.pred_masks.shape == (1, count, 3, 48, 48)
            assert isinstance(outputs.iou_scores, jax.Array)

    call(8, 6)
    compilations.clear()
    for prompts, length in ((5, 6), (6, 4), (8, 5)):
        call(prompts, length)
    assert compilations == []


@pytest.mark.usefixtures("unchecked")
def test_masks_must_fit_the_prompts(model, embeddings):
    for masks in (np.where(MASKS > 8, np.nan, MASKS), np.where(MASKS > 8, np.inf, MASKS)):
        with pytest.raises(ValueError, match="input_masks has logits that are not finite"):
            model(image_embeddings=embeddings.numpy(), input_masks=masks)
    points, labels = join_prompts(POINTS, LABELS, None)
    with pytest.raises(ValueError, match="one per image, or one for each of its 3 prompts"):
        model.decode(jnp.zeros((2, 12, 12, 32)), points, labels, masks=MASKS[:, :2])


@pytest.mark.usefixtures("unchecked")
def test_pixels_must_be_normalized_floats(model):
    for call in (model, model.get_image_embeddings):
        with pytest.raises(TypeError, match="pixel_values are uint8, expected floats"):
            call(np.zeros((1, 96, 96, 3), np.uint8))
        with pytest.raises(TypeError, match="pixel_values are a str, expected an array"):
            call("photo.jpg")
    with pytest.raises(TypeError, match="pixel_values are uint8, expected floats"):
        model.image_encoder.hidden_states(np.zeros((1, 96, 96, 3), np.uint8))


@pytest.mark.usefixtures("unchecked")
def test_prompts_are_numbers(model, embeddings):
    given = {"image_embeddings": embeddings[:1].numpy()}
    with pytest.raises(TypeError, match="input_points are complex128, expected numbers"):
        model(**given, input_points=np.zeros((1, 1, 1, 2), complex))
    with pytest.raises(TypeError, match=r"input_boxes are <U1, expected numbers"):
        model(**given, input_boxes=np.full((1, 1, 4), "a"))


def test_numpy_and_jax_prompts_may_be_mixed(model, embeddings):
    expected = model(image_embeddings=embeddings.numpy(), **PROMPTS["points_and_boxes"])
    for name in PROMPTS["points_and_boxes"]:
        mixed = dict(PROMPTS["points_and_boxes"])
        mixed[name] = jnp.asarray(mixed[name])
        actual = model(image_embeddings=embeddings.numpy(), **mixed)
        assert_close(actual.pred_masks, expected.pred_masks)
