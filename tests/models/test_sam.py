import dataclasses
import functools
import math
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from flax import nnx
from prompts import BOXES, LABELS, MASKS, POINTS, PROMPTS, SMALL_HF
from reference import (
    SHALLOW,
    SMALL,
    SMALL_TINY,
    assert_close,
    assert_same_epsilons,
    lowered_for_cuda,
    meta_sam,
    normal,
    ours,
    random_sam,
    tensor,
    to_torch,
    torch_encode,
)

import sam_jax.config
from sam_jax.checkpoints.names import torch_name
from sam_jax.checkpoints.params import abstract_model, build_model, flat_params
from sam_jax.config import ViTConfig
from sam_jax.models import compiled as sam_module
from sam_jax.models import two_way_transformer
from sam_jax.models.layers import Buffer
from sam_jax.models.sam import Sam
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.prompts import join_prompts


@pytest.fixture(scope="module")
def model():
    """One block: whole models are compared with the reference in test_hf_api.py."""
    return random_sam(SHALLOW)


@pytest.mark.slow
def test_mask_per_prompt(model, embeddings):
    """One mask per prompt gives the same as one prompt at a time with its own mask."""
    points = {"input_points": POINTS, "input_labels": LABELS}
    together = model(image_embeddings=embeddings.numpy(), **points, input_masks=MASKS)
    for i in range(2):
        for j in range(3):
            alone = model(
                image_embeddings=embeddings.numpy()[i : i + 1],
                input_points=POINTS[i : i + 1, j : j + 1],
                input_labels=LABELS[i : i + 1, j : j + 1],
                input_masks=MASKS[i : i + 1, j : j + 1],
            )
            assert_close(together.pred_masks[i, j], alone.pred_masks[0, 0])
            assert_close(together.iou_scores[i, j], alone.iou_scores[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masks", "chunk_sizes"),
    [(None, (1, 2)), (MASKS[:, :1], (64,)), (MASKS, (2, 64))],
    ids=["none", "shared", "own"],
)
def test_prompts_chunk_size_changes_nothing(model, embeddings, masks, chunk_sizes):
    """Prompts may be mapped, in groups or, as on a GPU or TPU, all together."""
    image_embeddings = jnp.moveaxis(jnp.asarray(embeddings.numpy()), 1, -1)
    points, labels = join_prompts(POINTS, LABELS, None)
    *arguments, masks = jax.tree.map(jnp.asarray, (image_embeddings, points, labels, masks))
    expected = model.decode(*arguments, masks=masks)
    for prompts_chunk_size in chunk_sizes:
        found = model.decode(*arguments, masks=masks, prompts_chunk_size=prompts_chunk_size)
        jax.tree.map(assert_close, found, expected)
    with pytest.raises(ValueError, match="prompts_chunk_size is 0, expected a whole number"):
        model.decode(*arguments, prompts_chunk_size=0)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "together"), [(1, 64), (4, 16), (100, 2)])
def test_memory_of_many_prompts_on_a_gpu(model, images, together):
    """However many prompts there are, only 64, or two per image, are upscaled together."""
    grid, channels = model.config.image_embedding_size, model.config.prompt_embed_dim
    embedding = jax.ShapeDtypeStruct((images, grid, grid, channels), jnp.float32)
    points = jax.ShapeDtypeStruct((images, 256, 2, 2), jnp.float32)
    labels = jax.ShapeDtypeStruct((images, 256, 2), jnp.int32)
    text = lowered_for_cuda(jax.jit(model.decode), embedding, points, labels)
    upscaled = re.findall(rf"<([\dx]*?)x?{grid}x{grid}x2x2x2x2x{channels // 8}x", text)
    assert {math.prod(map(int, sizes.split("x"))) for sizes in upscaled} == {images * together}


def test_batch_equals_one_at_a_time(model, pixels):
    """JAX arrays are not padded, so this compares padded prompts with unpadded ones."""
    together = model(pixels, **PROMPTS["points_and_boxes"])
    for i in range(2):
        for j in range(3):
            alone = model(
                jnp.asarray(pixels[i : i + 1]),
                jnp.asarray(POINTS[i : i + 1, j : j + 1]),
                jnp.asarray(LABELS[i : i + 1, j : j + 1]),
                jnp.asarray(BOXES[i : i + 1, j : j + 1]),
            )
            assert_close(together.pred_masks[i, j], alone.pred_masks[0, 0])
            assert_close(together.iou_scores[i, j], alone.iou_scores[0, 0])


@pytest.mark.parametrize(
    ("length", "boxes"), [(5, None), (40, jnp.asarray(BOXES))], ids=["no_boxes", "boxes"]
)
def test_padded_points_change_nothing(model, embeddings, length, boxes):
    plain = model(
        image_embeddings=embeddings.numpy(),
        input_points=jnp.asarray(POINTS),
        input_labels=jnp.asarray(LABELS),
        input_boxes=boxes,
    )
    points = np.full((2, 3, length, 2), -10, np.float32)
    labels = np.full((2, 3, length), -10, np.int32)
    points[:, :, :4], labels[:, :, :4] = POINTS, LABELS
    padded = model(
        image_embeddings=embeddings.numpy(),
        input_points=jnp.asarray(points),
        input_labels=jnp.asarray(labels),
        input_boxes=boxes,
    )
    assert_close(padded.pred_masks, plain.pred_masks)
    assert_close(padded.iou_scores, plain.iou_scores)


def test_ragged_points_equal_each_alone(model, embeddings):
    """In Hugging Face's model, a padding point wrongly changes the result."""
    labels = LABELS.copy()
    labels[0, 1, 2:] = labels[1, 2, 1:] = -10
    together = model(image_embeddings=embeddings.numpy(), input_points=POINTS, input_labels=labels)
    for i, j, n in ((0, 1, 2), (1, 2, 1)):
        alone = model(
            image_embeddings=embeddings.numpy()[i : i + 1],
            input_points=jnp.asarray(POINTS[i : i + 1, j : j + 1, :n]),
            input_labels=jnp.asarray(LABELS[i : i + 1, j : j + 1, :n]),
        )
        assert_close(together.pred_masks[i, j], alone.pred_masks[0, 0])


def test_image_projections_are_computed_once(model):
    """The first layer's projections of the image: two images' [144, 32] @ [32, 16], not six."""

    def products(masks):
        prompts = join_prompts(jnp.asarray(POINTS), jnp.asarray(LABELS), None)
        decode = functools.partial(model.decode, prompts_chunk_size=len(POINTS[0]))
        jaxpr = jax.make_jaxpr(decode)(jnp.zeros((2, 12, 12, 32)), *prompts, masks=masks)
        (inner,) = (
            eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.params.get("name") == "_decode"
        )
        sizes = [v.aval.size for eqn in inner.eqns for v in eqn.outvars if "dot" in str(eqn)]
        return sizes.count(2 * 144 * 16)

    # Keys and values of token-to-image attention, queries of image-to-token attention.
    assert products(None) == 3
    # A mask per image adds two of its convolutions. With a mask per prompt, nothing is shared.
    assert products(jnp.asarray(MASKS[:, :1])) == 3 + 2
    assert products(jnp.asarray(MASKS)) == 0


@pytest.mark.parametrize(
    "masks",
    [
        pytest.param(None, id="none", marks=pytest.mark.slow),
        pytest.param(MASKS[:, :1], id="shared", marks=pytest.mark.slow),
        pytest.param(MASKS, id="own"),
    ],
)
def test_embeddings_instead_of_prompts(model, embeddings, masks):
    """`decode` accepts what `get_prompt_embeddings` returns, also in addition to points."""
    image_embeddings = jnp.moveaxis(jnp.asarray(embeddings.numpy()), 1, -1)
    points, labels = map(jnp.asarray, join_prompts(POINTS, LABELS, None))
    masks = None if masks is None else jnp.asarray(masks)
    expected = model.decode(image_embeddings, points, labels, masks=masks)

    sparse, dense = model.get_prompt_embeddings(POINTS, LABELS, None, masks)
    dense = jnp.moveaxis(dense, 1, -1).reshape(2, -1, 12, 12, 32)
    prompts = {"sparse_embeddings": sparse, "dense_embeddings": dense}
    jax.tree.map(assert_close, model.decode(image_embeddings, **prompts), expected)

    more = model.decode(
        image_embeddings, points, labels, sparse_embeddings=sparse[:, :, :2], masks=masks
    )
    both = jnp.concatenate([sparse, sparse[:, :, :2]], 2)
    found = model.decode(image_embeddings, sparse_embeddings=both, dense_embeddings=dense)
    jax.tree.map(assert_close, found, more)
    assert not np.allclose(found.masks, expected.masks)


def test_decoder_attention(hf, embeddings):
    """Compares how tokens attend to the image in both blocks with the reference, run eagerly."""
    hf.set_attn_implementation("eager")
    weights = []
    for layer in hf.mask_decoder.transformer.layers:
        layer.cross_attn_token_to_image.register_forward_hook(lambda *x: weights.append(x[-1][1]))
    hf(
        image_embeddings=embeddings,
        input_points=torch.tensor(POINTS[:, :2]),
        input_labels=torch.tensor(LABELS[:, :2]),
    )
    prompts = map(jnp.asarray, join_prompts(POINTS[:, :2], LABELS[:, :2], None))
    model = ours(hf, SMALL_HF)
    found = model.decoder_attention(jnp.moveaxis(jnp.asarray(embeddings.numpy()), 1, -1), *prompts)
    expected = torch.stack(weights).reshape(2, 2, 2, *weights[0].shape[1:-1], 12, 12)
    assert_close(found, expected.permute(1, 2, 0, 3, 4, 5, 6))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_bfloat16(config):
    """Computing in bfloat16 gives nearly the same result, returned in float32."""
    torch_sam = meta_sam(config)
    pixels = normal((1, config.image_size, config.image_size, 3))
    prompts = {k: v[:1] for k, v in PROMPTS["points_and_boxes"].items()}
    mask = np.asarray(normal((1, 1, config.mask_size, config.mask_size), seed=5))
    exact = ours(torch_sam, config)(pixels, **prompts, input_masks=mask)
    outputs = ours(torch_sam, config, dtype=jnp.bfloat16)(pixels, **prompts, input_masks=mask)
    for actual, expected in zip(outputs, exact, strict=True):
        assert actual.dtype == jnp.float32
        assert_close(actual, expected, 0.05)
        assert not np.array_equal(actual, expected)


@pytest.mark.slow
def test_parameters_kept_in_bfloat16():
    """As after `--dtype bfloat16`; computing in float32 gives the result of the rounded values."""
    torch_sam = meta_sam(SMALL)
    params = flat_params(ours(torch_sam, SMALL))
    short = {k: v.astype(jnp.bfloat16) for k, v in params.items()}
    long = {k: v.astype(jnp.float32) for k, v in short.items()}
    pixels, prompts = normal((1, 96, 96, 3)), {"input_boxes": BOXES[:1]}
    actual, expected = (build_model(p, SMALL)(pixels, **prompts) for p in (short, long))
    assert_close(actual.pred_masks, expected.pred_masks)
    assert_close(actual.iou_scores, expected.iou_scores)


@pytest.mark.parametrize("name", ["vit_b", "mobile_sam"])
def test_epsilons_of_norms_match_the_reference(name):
    """Models with random weights and few layers hardly show wrong epsilons."""
    config = getattr(sam_jax.config, name)()
    if name == "vit_b":
        with torch.device("meta"):
            models = torch_reference.import_reference("segment_anything").sam_model_registry
            reference = models[name]()
    else:
        reference = torch_reference.meta_sam(config)
    assert_same_epsilons(abstract_model(config), reference)


@pytest.mark.parametrize("config", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_a_model_can_be_pickled(config):
    model = ours(meta_sam(config), config)
    again = pickle.loads(pickle.dumps(model))
    jax.tree.map(np.testing.assert_array_equal, flat_params(again), flat_params(model))
    assert again.config == config


def test_a_configuration_may_be_a_subclass():
    class Mine(ViTConfig):
        pass

    config = dataclasses.replace(
        SHALLOW, image_encoder=Mine(**dataclasses.asdict(SHALLOW.image_encoder))
    )
    assert isinstance(abstract_model(config).image_encoder, ImageEncoderViT)
    assert config.to_dict()["image_encoder_type"] == "vit"


def test_bad_options():
    with pytest.raises(ValueError, match="dtype is int8, expected float32, bfloat16 or float16"):
        Sam(SMALL, dtype=jnp.int8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="attention is 'xla', but TinyViT"):
        Sam(SMALL_TINY, attention="xla", rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("unchecked")
def test_wrong_types():
    for config in (None, "mobile_sam", SMALL.to_dict()):
        with pytest.raises(TypeError, match=r"config is a .+, expected a SamConfig"):
            Sam(config, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"rngs is 0, expected nnx\.Rngs, such as nnx.Rngs\(0\)"):
        Sam(SMALL, rngs=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["flash", ""])
def test_an_unknown_attention_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"unknown attention implementation '{name}'; known: "):
        Sam(SMALL, attention=name, rngs=nnx.Rngs(0))


def objective_weights(shape):
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def torch_objective(sam, pixels, points, labels, box, mask):
    """A scalar that depends on every parameter, from points alone, then points, box and mask."""
    total, embedding = 0, torch_encode(sam, pixels)
    for boxes, masks, multimask in ((None, None, True), (box, mask, False)):
        sparse, dense = sam.prompt_encoder(
            points=(tensor(points)[None], tensor(labels)[None]),
            boxes=None if boxes is None else tensor(boxes)[None],
            masks=None if masks is None else tensor(masks)[None, None],
        )
        low_res, scores = sam.mask_decoder(
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        total = total + (low_res * tensor(objective_weights(low_res.shape))).mean()
        total = total + scores.sum()
    return total


def our_objective(sam, pixels, points, labels, box, mask):
    total, embedding = 0, sam.encode_image(pixels)
    for boxes, masks, multimask in ((None, None, True), (box, mask, False)):
        coords, kinds = join_prompts(points, labels, boxes)
        low_res, scores = sam.decode(
            embedding,
            jnp.asarray(coords)[None, None],
            jnp.asarray(kinds)[None, None],
            masks=None if masks is None else masks[None, None],
            multimask_output=multimask,
        )
        weights = objective_weights(low_res.shape[1:]).reshape(low_res.shape)
        total = total + (low_res * weights).mean() + scores.sum()
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "attention"),
    [
        pytest.param(SMALL, "xla", id="vit_xla"),
        pytest.param(SMALL, "folded", id="vit_folded"),
        pytest.param(SMALL, "chunked", id="vit_chunked", marks=pytest.mark.optimized),
        pytest.param(SMALL_TINY, "portable", id="tiny_vit", marks=pytest.mark.optimized),
    ],
)
def test_gradients(config, attention):
    torch_sam = meta_sam(config)
    for part in torch_sam.modules():
        if hasattr(part, "attention_bias_idxs"):
            part.training = True  # otherwise it uses a copy of its biases, which has no gradient
    size = config.image_size
    model = ours(torch_sam, config, attention=attention)
    pixels = normal((1, size, size, 3))
    points = np.random.default_rng(1).uniform(0, size, (3, 2)).astype(np.float32)
    labels = np.array([1, 0, -1], np.int32)
    box = np.array([0.1, 0.2, 0.8, 0.7], np.float32) * size
    mask = normal((config.mask_size, config.mask_size), seed=2)

    torch_pixels = to_torch(pixels).requires_grad_()
    expected = torch_objective(torch_sam, torch_pixels, points, labels, box, mask)
    expected.backward()

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(params, pixels):
        def scalar(params, pixels):
            sam = nnx.merge(graphdef, params, rest)
            return our_objective(sam, pixels, points, labels, box, mask)

        return jax.value_and_grad(scalar, argnums=(0, 1))(params, pixels)

    value, (param_gradients, pixel_gradient) = gradients(params, pixels)
    assert_close(value, expected, 1e-4)
    assert_close(np.moveaxis(np.asarray(pixel_gradient), -1, 1), torch_pixels.grad, 1e-4)

    actual = flat_params(nnx.merge(graphdef, param_gradients, rest))
    expected = {name: p.grad for name, p in torch_sam.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    buffers = {
        ".".join(map(str, key))
        for key, variable in nnx.to_flat_state(rest)
        if isinstance(variable, Buffer)
    }
    compared = 0
    for path, gradient in actual.items():
        if path in buffers:
            continue
        name, layout = torch_name(path, config, "meta")
        theirs = expected[name].numpy()
        difference = np.abs(layout.to_torch(np.asarray(gradient)) - theirs).max()
        if path.endswith("k_proj.bias"):  # softmax ignores it: zero up to rounding errors
            assert difference <= 1e-6 * largest, (path, difference)
        else:
            assert difference <= 1e-4 * np.abs(theirs).max(), (path, difference)
        compared += 1
    unused = {n for n, g in expected.items() if g is None}
    assert unused == {n for n in expected if ".head." in n or ".norm_head." in n}
    assert compared == len(expected) - len(unused)


@pytest.mark.slow
def test_tables_of_flax_do_not_change_the_model(model, pixels):
    expected = model(pixels, input_points=POINTS).iou_scores
    for options in ({}, {"multimask_output": False}):
        wide = {"console_kwargs": {"width": 200}}
        table = nnx.tabulate(model, jnp.asarray(pixels), depth=1, **wide, **options)
        assert "mask_decoder" in table
    assert "mask_decoder=MaskDecoder(" in str(model)
    assert np.array_equal(model(pixels, input_points=POINTS).iou_scores, expected)


@pytest.mark.slow
def test_memory_of_thousands_of_points_in_a_prompt(model, embeddings, monkeypatch):
    """All logits of the self-attention of 16,384 tokens would take 4 GB."""
    shapes = ((1, 12, 12, 32), jnp.float32), ((1, 1, 2**14, 2), jnp.float32)
    shapes = *shapes, ((1, 1, 2**14), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    graphdef, state = nnx.split(model)
    program = sam_module.decode.lower(graphdef, state, *shapes, None, multimask_output=True)
    assert program.compile().memory_analysis().temp_size_in_bytes < 1.5e9

    def scores():
        image_embeddings = embeddings.numpy()[:1]
        return model(image_embeddings=image_embeddings, input_points=POINTS[:1]).iou_scores

    expected = scores()
    monkeypatch.setattr(two_way_transformer, "_MAX_LOGITS", 100)
    jax.clear_caches()
    assert_close(scores(), expected)
    jax.clear_caches()
