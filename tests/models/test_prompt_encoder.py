import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import (
    SMALL,
    assert_close,
    from_torch_image,
    hf_sam,
    meta_sam,
    normal,
    ours,
    run,
    tensor,
)

from sam_jax.models.prompt_encoder import PositionEmbeddingRandom
from sam_jax.ops.prompts import join_prompts

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL)
    return torch_sam.prompt_encoder, ours(torch_sam, SMALL).prompt_encoder


POINTS = np.array([[3.0, 90.5], [0.0, 0.0], [95.0, 17.25]], np.float32)
LABELS = np.array([1, 0, 1], np.int32)
BOX = np.array([10.0, 20.0, 60.5, 91.0], np.float32)


@pytest.mark.parametrize(
    ("points", "labels", "box"),
    [
        (POINTS, LABELS, None),
        (POINTS, LABELS, BOX),
        (None, None, BOX),
        (POINTS, np.array([-1, 0, 1], np.int32), None),
        (POINTS[:1], np.array([0], np.int32), None),
    ],
    ids=["points", "points_and_box", "box", "label_-1", "background"],
)
def test_sparse_tokens(pair, points, labels, box):
    reference, encoder = pair
    expected, _ = reference(
        points=None if points is None else (tensor(points)[None], tensor(labels)[None]),
        boxes=None if box is None else tensor(box)[None],
        masks=None,
    )
    joined, kinds = join_prompts(points, labels, box)
    tokens, mask = run(encoder, joined, kinds)
    assert mask.all()
    assert_close(tokens, expected[0])


def test_padding_is_zero_and_masked(pair):
    _, encoder = pair
    tokens, mask = run(encoder, POINTS, np.array([1, -10, 0], np.int32))
    assert np.asarray(mask).tolist() == [True, False, True]
    assert not np.asarray(tokens[1]).any()


def test_padding_token_matches_hf():
    config = dataclasses.replace(
        SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, layer_norm_eps=1e-6)
    )
    model = hf_sam(config)
    labels = np.array([1, -10, -1], np.int32)
    expected, _ = model.prompt_encoder(
        tensor(POINTS)[None, None], tensor(labels)[None, None], None, None
    )
    points, kinds = join_prompts(POINTS, labels, None)
    assert_close(run(ours(model, config).prompt_encoder, points, kinds)[0], expected[0, 0])


def test_mask(pair):
    reference, encoder = pair
    mask = normal((48, 48), scale=5)
    _, expected = reference(points=None, boxes=None, masks=tensor(mask)[None, None])
    assert_close(run(encoder, mask, method="embed_mask"), from_torch_image(expected)[0])


def test_no_mask(pair):
    reference, encoder = pair
    _, expected = reference(points=None, boxes=tensor(BOX)[None], masks=None)
    expected = from_torch_image(expected)[0]
    assert_close(np.broadcast_to(encoder.embed_mask(None), expected.shape), expected)


def test_dense_pe(pair):
    reference, encoder = pair
    expected = from_torch_image(reference.get_dense_pe())[0]
    assert_close(run(encoder, method="get_dense_pe"), expected)


def test_dense_pe_at_full_size(pair):
    """The numbers of rows and columns differ, and angles are as large as in a real model."""
    gaussian = normal((2, 128), scale=1.5)
    reference = type(pair[0].pe_layer)(128)
    reference.positional_encoding_gaussian_matrix = tensor(gaussian)
    layer = PositionEmbeddingRandom(128, rngs=nnx.Rngs(0))
    layer.positional_encoding_gaussian_matrix[...] = gaussian
    x, y = ((jnp.arange(n) + 0.5) / n for n in (64, 48))
    assert_close(run(layer, x, y, method="of_grid"), from_torch_image(reference((48, 64))[None])[0])


def test_positions_stay_float32_in_bfloat16():
    torch_sam = meta_sam(SMALL)
    encoder = ours(torch_sam, SMALL, dtype=jnp.bfloat16).prompt_encoder
    points, kinds = join_prompts(POINTS, LABELS, None)
    expected, _ = torch_sam.prompt_encoder(
        points=(tensor(POINTS)[None], torch.tensor(LABELS)[None]), boxes=None, masks=None
    )
    tokens, _ = run(encoder, points, kinds)
    assert tokens.dtype == jnp.float32
    assert_close(tokens, expected[0])
