import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from prompts import BOXES, LABELS, MASKS, POINTS
from reference import (
    normal,
)

from sam_jax import SamPredictor
from sam_jax.ops.prompts import join_prompts


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either pixel_values or image_embeddings"),
        (
            {"pixel_values": np.zeros((1, 3, 96, 96))},
            r"\(1, 3, 96, 96\), expected \(any, 96, 96, 3\)",
        ),
        ({"image_embeddings": np.zeros((1, 12, 12, 32))}, r"expected \(any, 32, 12, 12\)"),
        (
            {"image_embeddings": np.zeros((2, 32, 12, 12)), "input_points": POINTS[:, :, 0]},
            "points",
        ),
        ({"image_embeddings": np.zeros((2, 32, 12, 12)), "input_labels": LABELS}, "without"),
        (
            {
                "image_embeddings": np.zeros((2, 32, 12, 12)),
                "input_points": POINTS,
                "input_labels": LABELS[:, :, :2],
            },
            "input_labels have shape",
        ),
        ({"image_embeddings": np.zeros((2, 32, 12, 12)), "input_boxes": BOXES[0]}, "boxes"),
        (
            {
                "image_embeddings": np.zeros((2, 32, 12, 12)),
                "input_points": POINTS,
                "input_boxes": BOXES[:, :2],
            },
            "one box per prompt",
        ),
        (
            {
                "image_embeddings": np.zeros((2, 32, 12, 12)),
                "input_boxes": BOXES,
                "input_masks": MASKS[:, :2],
            },
            "one mask per image",
        ),
        ({"image_embeddings": np.zeros((1, 32, 12, 12)), "input_boxes": BOXES}, "1 images"),
        ({"image_embeddings": np.zeros((1, 32, 12, 12)), "input_masks": MASKS}, "1 images"),
    ],
)
def test_shapes_that_do_not_fit(model, inputs, message):
    inputs = {k: v.astype(np.float32) if v.dtype == float else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


BAD_POINTS = {
    "boolean masks": ({"masks": np.ones((2, 1, 48, 48), bool)}, "looks like a binary mask"),
    "uint8 masks": ({"masks": np.ones((2, 1, 48, 48), np.uint8)}, "looks like a binary mask"),
    "binary floats": ({"masks": np.ones((2, 1, 48, 48), np.float32)}, "looks like a binary mask"),
    "complex masks": ({"masks": np.ones((2, 1, 48, 48), complex)}, "masks are complex.*floats"),
    "whole embeddings": (
        {"image_embeddings": np.ones((2, 12, 12, 32), np.int32)},
        "image_embeddings are int32, expected floats",
    ),
    "a box inside out": (
        {
            "points": np.tile([[50.0, 50], [10, 10], [0, 0], [0, 0], [0, 0]], (2, 3, 1, 1)),
            "labels": np.tile([2, 3, -10, -10, -10], (2, 3, 1)),
        },
        r"points have \[50.0, 50.0, 10.0, 10.0\], expected x0, y0, x1, y1",
    ),
    "large masks": ({"masks": np.ones((2, 1, 96, 96), np.float32)}, "masks have shape .*to_logits"),
    "no prompt axis of masks": ({"masks": MASKS[:, 0]}, "masks have shape"),
    "label 7": ({"labels": np.full((2, 3, 5), 7)}, r"labels have labels \[7\]"),
    "half a box": ({"labels": np.full((2, 3, 5), 2)}, "one corner of a box .* without the other"),
    "float labels": ({"labels": np.ones((2, 3, 5))}, "labels are float.*, expected integers"),
    "NaN": ({"points": np.full((2, 3, 5, 2), np.nan)}, "points have numbers that are not finite"),
    "boolean points": ({"points": np.ones((2, 3, 5, 2), bool)}, "points are bool"),
    "lengths": ({"labels": np.ones((2, 3, 4), int)}, "labels have shape .*join_prompts"),
    "no prompt axis": ({"points": np.ones((2, 5, 2))}, "points have shape"),
    "images": ({"points": np.ones((1, 3, 5, 2))}, r"points have shape .* expected \(2, any"),
    "similarity": (
        {"attention_similarity": np.ones((2, 3, 4, 9, 144))},
        "attention_similarity has shape",
    ),
    "boolean similarity": (
        {"attention_similarity": np.ones((2, 3, 1, 1, 144), bool)},
        "attention_similarity are bool, expected floats",
    ),
    "chunks": ({"prompts_chunk_size": "1"}, "prompts_chunk_size is '1', expected a whole number"),
    "kind of masks": ({"multimask_output": "one"}, "multimask_output is 'one', expected a bool"),
    "no labels": ({"labels": None}, "points and labels belong together"),
    "no prompts": ({"points": None, "labels": None}, "neither points nor sparse_embeddings"),
    "prompts without points": (
        {"points": np.ones((2, 3, 0, 2)), "labels": np.ones((2, 3, 0), int)},
        "neither points nor sparse_embeddings",
    ),
    "prompts without tokens": (
        {
            "points": None,
            "labels": None,
            "sparse_embeddings": np.ones((2, 3, 0, 32), np.float32),
        },
        "neither points nor sparse_embeddings",
    ),
    "tokens": (
        {"sparse_embeddings": np.ones((2, 3, 4, 31), np.float32)},
        r"sparse_embeddings have shape .*, expected \(2, 3, any, 32\)",
    ),
    "integer tokens": (
        {"sparse_embeddings": np.ones((2, 3, 4, 32), int)},
        "sparse_embeddings are int.*, expected floats",
    ),
    "dense": (
        {"dense_embeddings": np.ones((2, 2, 12, 12, 32), np.float32)},
        "dense_embeddings have shape .* one for each of its 3 prompts",
    ),
    "masks twice": (
        {
            "dense_embeddings": np.ones((2, 1, 12, 12, 32), np.float32),
            "masks": np.ones((2, 1, 48, 48), np.float32) / 2,
        },
        "masks and dense_embeddings are both given",
    ),
    "target": ({"target_embedding": np.ones((2, 1, 1, 32))}, "target_embedding have shape"),
}


VALUES = "binary floats", "label 7", "half a box", "NaN", "a box inside out"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", BAD_POINTS)
def test_prompts_that_join_prompts_would_not_return(model, kind):
    wrong, message = BAD_POINTS[kind]
    points, labels = join_prompts(POINTS, LABELS, None)
    right = {"image_embeddings": np.zeros((2, 12, 12, 32), np.float32)}
    right |= {"points": points, "labels": labels}
    options = {name: value for name, value in wrong.items() if isinstance(value, str)}
    arrays = {name: value for name, value in (right | wrong).items() if name not in options}
    for arguments in (arrays, jax.tree.map(jnp.asarray, arrays)):
        with pytest.raises((TypeError, ValueError), match=message):
            model.decode(**arguments, **options)
    if kind not in VALUES:  # a trace does not know values
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(lambda arguments: model.decode(**arguments, **options), arrays)


@pytest.mark.usefixtures("unchecked")
def test_options_are_not_arrays(model):
    """A compiled program has a fixed number of masks. NumPy's scalars work like Python's."""
    embeddings, (points, labels) = np.zeros((2, 12, 12, 32)), join_prompts(POINTS, LABELS, None)
    decode = functools.partial(model.decode, embeddings, points, labels)
    predictor = SamPredictor(model)
    predictor.set_image(np.zeros((96, 96, 3), np.uint8))
    for value in (np.array([True, False]), jnp.array(True), 1):
        for call in (
            decode,
            functools.partial(model, image_embeddings=np.moveaxis(embeddings, -1, 1)),
            functools.partial(predictor.predict, box=np.array([1, 2, 30, 40])),
        ):
            with pytest.raises(TypeError, match=r"multimask_output is .+, expected a bool or None"):
                call(multimask_output=value)
    for value in (True, jnp.array(1), 1.0):
        with pytest.raises(ValueError, match=r"prompts_chunk_size is .+, expected a whole number"):
            decode(prompts_chunk_size=value)
    found = jax.eval_shape(
        lambda: decode(multimask_output=np.False_, prompts_chunk_size=np.int64(2))
    )
    assert found.masks.shape == (2, 3, 1, 48, 48)


@pytest.mark.usefixtures("unchecked")
def test_prompts_of_any_dtype(model):
    embeddings = normal((1, 12, 12, 32))
    points, labels = np.array([[[[10, 20], [50, 60]]]]), np.array([[[2, 3]]])
    expected, _ = model.decode(embeddings, points, labels)
    dtypes = (np.float16, np.uint8), (np.float64, np.int8), (np.uint8, np.uint32)
    for kinds in dtypes:
        arrays = (array.astype(kind) for array, kind in zip((points, labels), kinds, strict=True))
        assert np.array_equal(model.decode(embeddings, *arrays)[0], expected)


@pytest.mark.usefixtures("unchecked")
def test_decode_refuses_mixed_up_arguments(model, embeddings):
    last = jnp.moveaxis(jnp.asarray(embeddings.numpy()), 1, -1)
    with pytest.raises(ValueError, match=r"image_embeddings have shape .*channels first"):
        model.decode(embeddings.numpy(), *join_prompts(POINTS, LABELS, None))
    with pytest.raises(ValueError, match=r"image_embeddings have shape .*channels last"):
        model(image_embeddings=last, input_points=POINTS)
    for points, labels in ((POINTS, LABELS), (jnp.asarray(POINTS), jnp.asarray(LABELS))):
        with pytest.raises(
            ValueError, match=r"lack the end .*join_prompts\(points, labels, boxes\)"
        ):
            model.decode(last, points, labels)
    binary = (MASKS > 0).astype(np.float32)
    for masks in (MASKS > 0, binary, jnp.asarray(binary), binary.astype(int)):
        with pytest.raises(ValueError, match=r"input_masks .* looks like a binary mask"):
            model(image_embeddings=embeddings.numpy(), input_masks=masks)
    with pytest.raises(TypeError, match="batched_input; call model"):
        model([{"image": torch.zeros(3, 96, 96)}])
    with pytest.warns(UserWarning, match=r"input_points have \(450, 20\), outside.*SamProcessor"):
        model(image_embeddings=embeddings.numpy()[:1], input_points=np.array([[[[450.0, 20]]]]))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_of_encoder_and_attention(model, pixels):
    for encode in (model.encode_image, model.image_encoder.hidden_states):
        with pytest.raises(ValueError, match=r"pixel_values .*one alone is array\[None\]"):
            encode(pixels[0])
    with pytest.raises(TypeError, match="pixel_values are uint8, expected floats, normalized"):
        model.encode_image(pixels.astype(np.uint8))
    with pytest.raises(TypeError, match="remat is 'yes', expected a bool or a policy"):
        model.encode_image(pixels, remat="yes")
    with pytest.raises(ValueError, match="drop_path_rate is 2, expected 0 to 1"):
        model.encode_image(pixels, drop_path_rate=2, keys=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match="one for each of the 2 images"):
        model.encode_image(pixels, drop_path_rate=0.1, keys=jax.random.key(0))
    for keys in (jax.random.PRNGKey(0), [1, 2]):  # a key is two numbers, and there are two images
        with pytest.raises(ValueError, match="one for each of the 2 images"):
            model.encode_image(pixels, drop_path_rate=0.1, keys=keys)
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    jax.eval_shape(lambda: model.encode_image(pixels, drop_path_rate=0.1, keys=keys))
    with pytest.raises(TypeError, match="decoder_attention does not take heads; it takes points"):
        model.decoder_attention(np.zeros((2, 12, 12, 32), np.float32), heads=1)
