"""All programs lower for every platform, so GPU and TPU users are not the first to try."""

import dataclasses
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from reference import SMALL, TINIEST, flash_attentions, lowered_for_cuda

from sam_jax.automatic.device import encode
from sam_jax.models import compiled
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import join_prompts
from sam_jax.training.rules import EVERYTHING, adamw, partition
from sam_jax.training.step import TrainConfig, init_state, train_step

pytestmark = pytest.mark.slow

PLATFORMS = ("cpu", "cuda", "tpu")
MODELS = {
    "vit": (SMALL, "portable"),
    "xla": (SMALL, "xla"),
    "chunked": (SMALL, "chunked"),
    "tiny_vit": (TINIEST, "portable"),
}


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


@pytest.fixture(params=MODELS)
def model(request):
    config, attention = MODELS[request.param]
    build = lambda: Sam(config, dtype=jnp.bfloat16, attention=attention, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(build)


def lowered(function, *arguments):
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    return exported


def test_encoder(model):
    graphdef, params = nnx.split(model)
    size, grid = model.config.image_size, model.config.image_embedding_size
    exported = lowered(
        lambda params, pixels: nnx.merge(graphdef, params).encode_image(pixels),
        params,
        shape(2, size, size, 3),
    )
    assert exported.out_avals[0].shape == (2, grid, grid, model.config.prompt_embed_dim)


def test_encoder_of_no_images(model):
    graphdef, params = nnx.split(model)
    size, grid = model.config.image_size, model.config.image_embedding_size
    encode = lambda params, pixels: nnx.merge(graphdef, params).encode_image(pixels)  # noqa: E731
    out = jax.eval_shape(encode, params, shape(0, size, size, 3))
    assert out.shape == (0, grid, grid, model.config.prompt_embed_dim)


# The attention matters only in the encoder, which is lowered above; training steps lower slowly.
OF_EACH_KIND = pytest.mark.parametrize("model", ["xla", "tiny_vit"], indirect=True)


@OF_EACH_KIND
@pytest.mark.parametrize("with_masks", [False, True])
def test_decoder(model, with_masks):
    graphdef, params = nnx.split(model)
    grid, side = model.config.image_embedding_size, model.config.mask_size
    exported = lowered(
        lambda params, masks, *arrays: nnx.merge(graphdef, params).decode(
            *arrays, masks=masks, prompts_chunk_size=4
        ),
        params,
        shape(1, 4, side, side) if with_masks else None,
        shape(1, grid, grid, model.config.prompt_embed_dim),
        shape(1, 4, 3, 2),
        shape(1, 4, 3, dtype=jnp.int32),
    )
    assert exported.out_avals[0].shape == (1, 4, 3, side, side)


def training_step(model):
    """A training step as a function of (state, rest, batch, key data), and their shapes."""
    tx = adamw(1e-4, EVERYTHING, clip_norm=1.0)
    trained, rest = partition(model, EVERYTHING)
    state = jax.eval_shape(lambda trained: init_state(trained, tx, ema=True), trained)
    size, side = model.config.image_size, model.config.mask_size
    batch = {
        "pixel_values": shape(2, size, size, 3),
        "masks": shape(2, 3, side, side, dtype=bool),
        "boxes": shape(2, 3, 4),
        "valid": shape(2, 3),
    }
    config = TrainConfig(
        num_rounds=2, remat=True, accumulate=2, ema_decay=0.9, objects_chunk_size=3
    )

    def step(state, rest, batch, key):
        key = jax.random.wrap_key_data(key)
        return train_step(state, rest, batch, key, tx=tx, config=config)

    return step, (state, rest, batch, shape(2, dtype=jnp.uint32))


@OF_EACH_KIND
def test_training_step(model):
    step, arguments = training_step(model)
    lowered(step, *arguments)


@OF_EACH_KIND
def test_training_step_with_64_bits(model):
    """Parameters keep their dtypes: `jax_enable_x64` is for a program's other computations."""
    step, arguments = training_step(model)
    with jax.enable_x64(True):
        state, _ = jax.eval_shape(step, *arguments)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, arguments[0])


@pytest.mark.parametrize(("config", "attention"), MODELS.values(), ids=MODELS)
def test_gradients_with_64_bits(config, attention):
    """Gradients are still computed in float32, except for scalars."""
    model = nnx.eval_shape(lambda: Sam(config, attention=attention, rngs=nnx.Rngs(0)))
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    pixels = shape(1, config.image_size, config.image_size, 3)

    def embedding(params, buffers, pixels):
        return nnx.merge(graphdef, params, buffers).encode_image(pixels).sum()

    with jax.enable_x64(True):
        text = str(jax.make_jaxpr(jax.grad(embedding))(params, buffers, pixels))
    assert "f32[" in text
    assert not re.search(r"f64\[\d", text)


# A window layer, and a global layer whose grid of 32 x 32 is large enough to compute in chunks.
LARGER = dataclasses.replace(
    SMALL,
    image_encoder=dataclasses.replace(SMALL.image_encoder, window_size=14),
    image_size=32 * SMALL.image_encoder.patch_size,
)
ENCODERS = pytest.mark.parametrize("config", [LARGER, TINIEST], ids=["vit", "tiny_vit"])


def lowered_encoder(config, platform):
    model = nnx.eval_shape(lambda: Sam(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    pixels = shape(1, config.image_size, config.image_size, 3)
    traced = compiled.encode_image.trace(*nnx.split(model), pixels)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@ENCODERS
def test_each_platform_has_its_own_program(config, request):
    """It does not depend on the process's devices: a GPU changes no platform's program."""
    before = {platform: lowered_encoder(config, platform) for platform in PLATFORMS}
    assert before["cpu"] != before["cuda"]
    assert before["cpu"] != before["tpu"]
    request.getfixturevalue("nvidia")
    after = {platform: lowered_encoder(config, platform) for platform in PLATFORMS}
    assert before == after


@ENCODERS
def test_cpu_results_do_not_change_with_a_gpu(config, request):
    """Encoder, decoder and gradients give a CPU's results, both eager and compiled."""
    model = Sam(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    size = config.image_size
    pixels = jnp.asarray(rng.normal(size=(1, size, size, 3)), jnp.float32)
    points = rng.uniform(0, size, (1, 3, 2, 2)).astype(np.float32)
    points, labels = map(jnp.asarray, join_prompts(points, np.ones((1, 3, 2), np.int32), None))

    def run(model, pixels):
        embeddings = model.encode_image(pixels)
        return embeddings, model.decode(embeddings, points, labels)

    def loss(pixels):
        return model.encode_image(pixels).astype(jnp.float32).sum()

    def everything():
        return run(model, pixels), jax.jit(run)(model, pixels), jax.jit(jax.grad(loss))(pixels)

    before = everything()
    request.getfixturevalue("nvidia")
    jax.tree.map(np.testing.assert_array_equal, everything(), before)


def vit(attention):
    """A bfloat16 model with a window layer and a global layer, whose grid is 64 x 64."""
    config = dataclasses.replace(LARGER, image_size=512)
    build = lambda: Sam(config, dtype=jnp.bfloat16, attention=attention, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(build)


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize(("attention", "bits"), [("cudnn", 32), ("pallas", 64)])
def test_flash_attention_in_the_encoder(attention, bits):
    """All layers of everything mode's encoder use it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("images",))
    with jax.enable_x64(bits == 64):
        pixels = shape(1, 512, 512, 3)
        text = lowered_for_cuda(encode, *nnx.split(vit(attention)), pixels, mesh=mesh)
    assert flash_attentions(text) == {attention: (2, 0)}
    assert "x4096x4096x" not in text


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize(("attention", "remat"), [("cudnn", True), ("pallas", False)])
def test_flash_attention_in_training(attention, remat):
    tx = adamw(1e-4, EVERYTHING)
    trained, rest = partition(vit(attention), EVERYTHING)
    state = jax.eval_shape(lambda trained: init_state(trained, tx), trained)
    batch = {
        "pixel_values": shape(2, 512, 512, 3),
        "masks": shape(2, 1, 128, 128, dtype=bool),
        "boxes": shape(2, 1, 4),
        "valid": shape(2, 1),
    }
    step = jax.jit(train_step, static_argnames=("tx", "config"))
    key, config = jax.eval_shape(lambda: jax.random.key(0)), TrainConfig(remat=remat)
    text = lowered_for_cuda(step, state, rest, batch, key, tx=tx, config=config)
    # With remat, the backward pass repeats the forward pass.
    forward = 2 if remat else 1
    assert flash_attentions(text) == {attention: (2 * forward, 2)}
    assert "x4096x4096x" not in text
