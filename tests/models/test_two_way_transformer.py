import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SMALL, assert_close, hf_sam, meta_sam, normal, ours, run, tensor

pytestmark = pytest.mark.optimized

TOKENS = 6
POSITIONS = 144
ALL = jnp.ones(TOKENS, bool)


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL)
    return (
        torch_sam.mask_decoder.transformer,
        ours(torch_sam, SMALL).mask_decoder.transformer,
    )


def inputs(tokens=TOKENS):
    return (
        normal((tokens, 32), seed=1),
        normal((POSITIONS, 32), seed=2),
        normal((tokens, 32), seed=3),
        normal((POSITIONS, 32), seed=4),
    )


# Few and many tokens, in the first and the second layer, with separate and shared keys.
@pytest.mark.parametrize(
    ("index", "tokens", "shared"),
    [(0, 3, False), (0, 6, True), (0, 40, False), (1, 3, True), (1, 6, False), (1, 40, True)],
)
def test_block(pair, index, tokens, shared):
    reference, transformer = pair
    arrays = inputs(tokens)
    expected = reference.layers[index](*(tensor(x)[None] for x in arrays))
    block = functools.partial(transformer.layers[index], keys_are_shared=shared)
    actual = jax.jit(block)(*arrays, jnp.ones(tokens, bool))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e[0])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4, 30])
@pytest.mark.parametrize("keys", [4, 30, 144])
def test_attention_at_every_size(pair, tokens, keys):
    """The order of computation differs for few queries, few keys, and neither."""
    reference, transformer = pair
    q, k, v = normal((tokens, 32)), normal((keys, 32), seed=1), normal((keys, 32), seed=2)
    for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
        expected = getattr(reference.layers[1], name)(*(tensor(x)[None] for x in (q, k, v)))
        assert_close(run(getattr(transformer.layers[1], name), q, k, v), expected[0])


@pytest.mark.parametrize(("queries", "keys"), [(3, 144), (144, 3), (40, 50)])
def test_attention_bias(pair, queries, keys):
    """Compares a bias of full shape with the definition written out."""
    attention = pair[1].layers[1].cross_attn_token_to_image
    q, k, v = normal((queries, 32)), normal((keys, 32), seed=1), normal((keys, 32), seed=2)
    bias = normal((4, queries, keys), seed=3)
    heads = [
        np.asarray(projection(x)).reshape(len(x), 4, -1)
        for projection, x in (
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
        )
    ]
    logits = np.einsum("qhd,khd->hqk", heads[0], heads[1]) / 2 + np.asarray(bias)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, heads[2]).reshape(queries, -1)
    assert_close(run(attention, q, k, v, bias), attention.out_proj(jnp.asarray(out)))


@pytest.mark.parametrize("shared", [False, True], ids=["own_image", "shared_image"])
@pytest.mark.parametrize("outputs", [None, [0, 2, 3], list(range(TOKENS))], ids=str)
def test_transformer(pair, outputs, shared):
    reference, transformer = pair
    tokens, image, _, image_pe = inputs()
    grid = (1, 32, 12, 12)
    expected = reference(
        tensor(image.T).reshape(grid), tensor(image_pe.T).reshape(grid), tensor(tokens)[None]
    )
    call = functools.partial(transformer, outputs=outputs, image_is_shared=shared)
    queries, keys = jax.jit(call)(image, image_pe, tokens, ALL)
    assert_close(queries, expected[0][0][slice(None) if outputs is None else outputs])
    assert_close(keys, expected[1][0])


def test_padding_tokens_change_nothing(pair):
    _, transformer = pair
    tokens, image, _, image_pe = inputs()
    expected = run(transformer, image, image_pe, tokens, ALL)
    padded = jnp.concatenate([tokens, 100 * normal((5, 32), seed=9)])
    mask = jnp.arange(len(padded)) < TOKENS
    actual = run(transformer, image, image_pe, padded, mask)
    assert_close(actual[0][:TOKENS], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("given", ["similarity", "target", "both"])
def test_personalization_inputs_match_hf(given):
    config = dataclasses.replace(
        SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, layer_norm_eps=1e-6)
    )
    model = hf_sam(config)
    transformer = ours(model, config).mask_decoder.transformer
    tokens, image, _, image_pe = inputs()
    similarity = normal((1, 1, POSITIONS), seed=5) if given != "target" else None
    target = normal((1, 32), seed=6) if given != "similarity" else None
    grid = (1, 32, 12, 12)
    expected = model.mask_decoder.transformer(
        point_embeddings=tensor(tokens)[None, None],
        image_embeddings=tensor(image.T).reshape(grid),
        image_positional_embeddings=tensor(image_pe.T).reshape(grid),
        attention_similarity=None if similarity is None else tensor(similarity)[None],
        target_embedding=None if target is None else tensor(target)[None, None],
    )
    given = {"attention_similarity": similarity, "target_embedding": target}
    actual = run(transformer, image, image_pe, tokens, ALL, **given)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e[0, 0])
