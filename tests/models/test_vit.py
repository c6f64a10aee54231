import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    to_torch,
)

from sam_jax.config import ViTConfig

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL)
    return torch_sam.image_encoder, ours(torch_sam, SMALL).image_encoder


def pixels(config, batch=1):
    return normal((batch, config.image_size, config.image_size, 3))


def test_patch_embed(pair):
    reference, encoder = pair
    x = pixels(SMALL, batch=2)
    assert_close(run(encoder.patch_embed, x), reference.patch_embed(to_torch(x)))


@pytest.mark.parametrize("index", [0, 1], ids=["window", "global"])
@pytest.mark.parametrize("attention", ["xla", "folded", "chunked"])
def test_block(index, attention):
    torch_sam = meta_sam(SMALL)
    encoder = ours(torch_sam, SMALL, attention=attention).image_encoder
    x = normal((2, 12, 12, 48), seed=1)
    expected = torch_sam.image_encoder.blocks[index](tensor(x))
    assert_close(run(encoder.blocks[index], x), expected)


def test_neck(pair):
    reference, encoder = pair
    x = normal((2, 12, 12, 48), seed=2)
    assert_close(run(encoder.neck, x), from_torch_image(reference.neck(to_torch(x))))


def test_encoder(pair):
    reference, encoder = pair
    x = pixels(SMALL, batch=2)
    assert_close(run(encoder, x), from_torch_image(reference(to_torch(x))))


def test_hidden_states_and_attention_match_hf():
    """Compares a block with padded windows and a global block."""
    config = dataclasses.replace(
        SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, layer_norm_eps=1e-6)
    )
    model = hf_sam(config)
    model.set_attn_implementation("eager")
    x = pixels(config, batch=2)
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = model.vision_encoder(to_torch(x), **options)
    encoder = ours(model, config).image_encoder
    states = run(encoder, x, method="hidden_states")
    for found, state in zip(states, expected.hidden_states, strict=True):
        assert_close(found, state)
    for block, state, weights in zip(encoder.blocks, states, expected.attentions, strict=False):
        found = run(block, state, method="attention_weights")
        assert found.shape == ((2 * 9, 3, 25, 25) if block.attn.window else (2, 3, 144, 144))
        assert_close(found, weights.reshape(found.shape))
    assert_close(run(encoder, states, method="embed"), run(encoder, x))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [True, jax.checkpoint_policies.dots_saveable])
def test_remat(pair, policy):
    """Remat gives the same gradient with fewer residuals."""
    _, encoder = pair
    x = pixels(SMALL)

    def gradient(remat):
        return jax.jit(jax.grad(lambda x: jnp.sin(encoder(x, remat=remat)).sum()))(x)

    def saved(remat):
        _, pullback = jax.eval_shape(lambda x: jax.vjp(lambda x: encoder(x, remat=remat), x), x)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert_close(gradient(policy), gradient(False), 1e-4)
    assert saved(True) <= saved(policy) < saved(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder",
    [
        ViTConfig(embed_dim=28, num_heads=2, mlp_dim=116),  # SlimSAM-77 prunes heads to 14 channels
        ViTConfig(embed_dim=64, num_heads=2, mlp_dim=256),  # SlimSAM-50: 32 channels
        ViTConfig(embed_dim=160, num_heads=2, mlp_dim=640),  # ViT-H: 80 channels
        ViTConfig(embed_dim=32, num_heads=2, qkv_bias=False, mlp_dim=64),
        ViTConfig(embed_dim=32, num_heads=2, use_rel_pos=False, mlp_dim=64),
        ViTConfig(embed_dim=32, num_heads=2, use_abs_pos=False, mlp_dim=64),
    ],
    ids=["slim77", "slim50", "vit_h", "no_qkv_bias", "no_rel_pos", "no_abs_pos"],
)
def test_any_hf_config(encoder):
    encoder = dataclasses.replace(
        encoder, depth=2, global_attn_indexes=(1,), patch_size=8, window_size=5
    )
    config = dataclasses.replace(SMALL, image_encoder=encoder)
    model = hf_sam(config)
    x = pixels(config)
    expected = model.get_image_embeddings(to_torch(x))
    assert_close(run(ours(model, config).image_encoder, x), from_torch_image(expected))


def test_bfloat16_is_near_float32(pair):
    _, encoder = pair
    x = pixels(SMALL)
    expected = np.asarray(run(encoder, x))
    half = run(ours(meta_sam(SMALL), SMALL, dtype=jnp.bfloat16).image_encoder, x)
    assert half.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(half, np.float32) - expected)
    assert difference.max() < 0.1 * np.abs(expected).max()
