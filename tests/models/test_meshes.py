import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from reference import SMALL, SMALL_TINY

from sam_jax.checkpoints.params import abstract_model


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_hidden_states_on_a_mesh_with_explicit_axes(config):
    encoder = abstract_model(config).image_encoder
    mesh = AbstractMesh((8,), ("data",), (AxisType.Explicit,))
    pixels = jax.ShapeDtypeStruct(
        (16, config.image_size, config.image_size, 3),
        jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec("data")),
    )

    def states_and_weights(encoder, pixels):
        states = encoder.hidden_states(pixels)
        if hasattr(encoder, "blocks"):
            return states, encoder.blocks[0].attention_weights(states[0])
        return states, encoder.layers[1].blocks[0].attention_weights(states[1])

    states, weights = jax.jit(states_and_weights).trace(encoder, pixels).out_info
    assert {state.sharding.spec[0] for state in (*states, weights)} == {"data"}
    assert {state.shape[0] for state in states} == {16}
