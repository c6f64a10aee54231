"""Gradients and the memory that they take: frozen parts, accumulation, remat, and drop path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import CONFIG, KEYS, batch_of
from flax import nnx
from reference import SMALL, TINIEST, meta_sam, normal, ours, random_sam

from sam_jax.training.losses import MaskLosses
from sam_jax.training.rules import DECODER_ONLY, EVERYTHING, partition
from sam_jax.training.step import grads_and_metrics

DEEP = dataclasses.replace(SMALL, image_encoder=dataclasses.replace(SMALL.image_encoder, depth=4))


@functools.cache
def compiled_gradients(model, everything, config):
    """Compiles `grads_and_metrics` for a batch of 4; returns it and the memory that it takes."""
    split = partition(model, EVERYTHING if everything else DECODER_ONLY)
    run = jax.jit(lambda batch, keys: grads_and_metrics(*split, batch, keys, config=config))
    compiled = run.lower(batch_of(4), KEYS).compile()
    return compiled, compiled.memory_analysis()


def assert_same_gradients(actual, expected):
    leaves = jax.tree.leaves(expected)
    scale = max(float(np.abs(x).max()) for x in leaves)
    for a, e in zip(jax.tree.leaves(actual), leaves, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-6 * scale, rtol=1e-5)


@pytest.mark.slow
def test_frozen_parameters_take_no_gradient_memory(model):
    sizes = {name: sum(v.nbytes for v in jax.tree.leaves(tree)) for name, tree in {
        "decoder": nnx.state(model.mask_decoder, nnx.Param),
        "all": nnx.state(model, nnx.Param),
    }.items()}  # fmt: skip
    _, some = compiled_gradients(model, False, CONFIG)
    _, every = compiled_gradients(model, True, CONFIG)
    # In addition to the gradients there are a few metrics.
    assert some.output_size_in_bytes <= 1.02 * sizes["decoder"]
    assert every.output_size_in_bytes >= sizes["all"]
    # Training the decoder alone does not keep the encoder's activations, either.
    assert some.temp_size_in_bytes < every.temp_size_in_bytes


@pytest.mark.slow
def test_accumulation_changes_nothing(model):
    batch = batch_of(4)
    expected, _ = compiled_gradients(model, False, CONFIG)
    actual, _ = compiled_gradients(model, False, dataclasses.replace(CONFIG, accumulate=2))
    assert_same_gradients(actual(batch, KEYS), expected(batch, KEYS))
    with pytest.raises(ValueError, match="accumulate is 3, expected a divisor of the batch of 4"):
        compiled_gradients(model, False, dataclasses.replace(CONFIG, accumulate=3))


def test_parts_are_weighted_by_their_objects(model, monkeypatch):
    """The parts have 2 and 6 objects; the loss is one that compiles quickly."""

    def losses(model, _batch, keys, *, config):
        weights = jax.vmap(lambda key: jax.random.uniform(key, (3, config.num_rounds)))(keys)
        total = weights * jnp.square(model.mask_decoder.iou_token[...]).sum()
        return MaskLosses(*[total] * len(MaskLosses._fields))

    monkeypatch.setattr("sam_jax.training.step.batch_losses", losses)
    batch, split = batch_of(4), partition(model, DECODER_ONLY)
    batch["valid"] = np.float32([[1, 0, 0], [1, 1, 1]] * 2)  # each part has every second image
    batch = jax.tree.map(jnp.asarray, batch)
    expected, actual = (
        grads_and_metrics(*split, batch, KEYS, config=dataclasses.replace(CONFIG, accumulate=parts))
        for parts in (1, 2)
    )
    assert_same_gradients(actual, expected)
    with pytest.raises(ValueError, match="accumulate is 3, expected a divisor of the batch of 4"):
        grads_and_metrics(*split, batch, KEYS, config=dataclasses.replace(CONFIG, accumulate=3))


def encoder_loss(config):
    """A loss as a function of an image encoder's parameters, and the parameters."""
    graphdef, params, rest = nnx.split(random_sam(config), nnx.Param, ...)
    pixels = normal((2, config.image_size, config.image_size, 3))

    def loss(params, remat):
        embedding = nnx.merge(graphdef, params, rest).encode_image(pixels, remat=remat)
        return (embedding * jnp.sin(jnp.arange(embedding.size)).reshape(embedding.shape)).sum()

    return loss, params


def test_remat_changes_no_gradient():
    loss, params = encoder_loss(SMALL)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_same_gradients(gradient(params, True), gradient(params, False))


@pytest.mark.slow
@pytest.mark.parametrize("config", [DEEP, TINIEST], ids=["vit", "tiny_vit"])
def test_remat_keeps_less_for_the_backward_pass(config):
    loss, params = encoder_loss(config)

    def kept(remat):
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, remat), p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

    assert kept(True) < kept(False) / 2


def test_drop_path_is_drawn_per_image():
    model = ours(meta_sam(SMALL), SMALL)
    pixels = jnp.asarray(batch_of(1)["pixel_values"])

    @jax.jit
    def encode(keys):
        images = jnp.broadcast_to(pixels, (len(keys), *pixels.shape[1:]))
        return model.encode_image(images, drop_path_rate=0.5, keys=keys)

    keys = jax.random.split(jax.random.key(0), 16)
    embeddings = encode(keys)
    # Each of the last block's two branches may be dropped: up to four different embeddings.
    kinds = {np.asarray(e).round(3).tobytes() for e in embeddings}
    assert 2 < len(kinds) <= 4
    np.testing.assert_array_equal(encode(keys[::-1])[::-1], embeddings)
    with pytest.raises(ValueError, match="needs a ViT encoder and keys"):
        model.encode_image(pixels, drop_path_rate=0.5)
