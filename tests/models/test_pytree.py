"""The model is a pytree: JAX's transformations take it as any other argument."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from reference import SHALLOW, TINIEST, assert_close, normal, random_sam

from sam_jax import combine, join_prompts, partition
from sam_jax.training import DECODER_ONLY


@pytest.fixture(scope="module", params=[SHALLOW, TINIEST], ids=["vit", "tiny_vit"])
def model(request):
    return random_sam(request.param)


@pytest.fixture(scope="module")
def arrays(model):
    """Pixels of two images, with one prompt each."""
    size = model.config.image_size
    points = np.float32([[[[30, 20]]], [[[9, 50]]]])
    prompts = join_prompts(points, np.ones((2, 1, 1), np.int32), None)
    return jnp.asarray(normal((2, size, size, 3))), *map(jnp.asarray, prompts)


def scores_of(model, pixels, points, labels):
    return model.decode(model.encode_image(pixels), points, labels)[1]


@pytest.fixture(scope="module")
def expected(model, arrays):
    return jax.jit(scores_of)(model, *arrays)


# For tests that compile slowly, and do not depend on the kind of encoder.
VIT_ALONE = pytest.mark.parametrize("model", [SHALLOW], ids=["vit"], indirect=True)


@pytest.mark.slow
@VIT_ALONE
def test_without_jit(model, arrays, expected):
    assert_close(scores_of(model, *arrays), expected)


@pytest.mark.parametrize(
    "model",
    [pytest.param(SHALLOW, id="vit", marks=pytest.mark.slow), pytest.param(TINIEST, id="tiny_vit")],
    indirect=True,
)
def test_gradients_of_the_trained_part(model, arrays, expected):
    params, rest = partition(model, DECODER_ONLY)

    @jax.jit
    def gradient(params, rest):
        return jax.grad(lambda params: scores_of(combine(params, rest), *arrays).sum())(params)

    found = gradient(params, rest)
    assert {key[0] for key, _ in nnx.to_flat_state(found)} == {"mask_decoder"}
    assert jax.tree.structure(found) == jax.tree.structure(params)
    lower = jax.tree.map(lambda p, g: p - 1e-2 * g, params, found)
    assert jax.jit(scores_of)(combine(lower, rest), *arrays).sum() < expected.sum()


def test_a_combined_model_shares_no_variables(model):
    params, rest = partition(model)
    combined = combine(params, rest)
    before = jnp.array(model.mask_decoder.iou_token)
    combined.mask_decoder.iou_token[...] += 1
    for other in (model, combine(params, rest)):
        np.testing.assert_array_equal(other.mask_decoder.iou_token, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [pytest.param(SHALLOW, id="vit"), pytest.param(TINIEST, id="tiny_vit", marks=pytest.mark.slow)],
    indirect=True,
)
def test_vmap_over_two_models(model, arrays, expected):
    other = jax.tree.map(lambda x: 1.01 * x, model)
    both = jax.tree.map(lambda *x: jnp.stack(x), model, other)
    found = jax.jit(jax.vmap(scores_of, (0, None, None, None)))(both, *arrays)
    assert_close(found[0], expected)
    assert_close(found[1], jax.jit(scores_of)(other, *arrays))


@VIT_ALONE
def test_a_donated_step(model, arrays):
    params, rest = partition(jax.tree.map(jnp.array, model))
    optimizer = optax.sgd(1e-3)

    def step(params, state, rest):
        loss, gradients = jax.value_and_grad(
            lambda params: scores_of(combine(params, rest), *arrays).sum()
        )(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(step, donate_argnums=0)
    given, state, losses = params, optimizer.init(params), []
    for _ in range(3):
        params, state, loss = compiled(params, state, rest)
        losses.append(loss)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_sharded_by_device_put(model, arrays, expected, axes):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (axes,))
    everywhere = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    spread = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    found = jax.jit(scores_of)(everywhere, *spread)
    assert found.sharding.mesh == mesh
    assert_close(found, expected)


@pytest.mark.slow
def test_a_mesh_with_explicit_axes(model, arrays):
    """The mesh has eight devices, which tracing does not need: types carry the sharding."""
    mesh = AbstractMesh((8,), ("data",), (AxisType.Explicit,))
    spread = [
        jax.ShapeDtypeStruct(
            (16, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        for x in arrays
    ]
    found = jax.jit(scores_of).trace(model, *spread).out_info
    assert found.shape == (16, 1, 3)
    assert found.sharding.spec[0] == "data"

    def total(pixels, model):
        policy = jax.checkpoint_policies.dots_saveable
        return model.encode_image(pixels, remat=policy).sum()

    gradient = jax.jit(jax.grad(total)).trace(spread[0], model).out_info
    assert gradient.sharding.spec[0] == "data"


def test_pickle(model, arrays, expected):
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(jax.jit(scores_of)(again, *arrays), expected)


def test_display(model, capsys):
    nnx.display(model)
    assert "Sam(" in capsys.readouterr().out
