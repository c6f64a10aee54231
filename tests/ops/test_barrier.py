import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops.barrier import barrier_on_cpu, narrow


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_cpu_programs_have_the_barrier(platform):
    exported = jax.export.export(jax.jit(lambda x: barrier_on_cpu(x) + 1), platforms=[platform])
    program = exported(jax.ShapeDtypeStruct((4,), jnp.float32)).mlir_module()
    assert ("optimization_barrier" in program) == (platform == "cpu")


def test_barrier_keeps_values_and_gradients():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.arange(4, dtype=dtype)
        np.testing.assert_array_equal(narrow(x), x)
        gradient = jax.grad(lambda x: jnp.square(narrow(x)).sum())(x)
        np.testing.assert_array_equal(gradient, 2 * x)
