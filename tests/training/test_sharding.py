import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

# Trains for 20 steps and prints the losses; run with 8 simulated devices, or on 2 hosts.
SCRIPT = """
import json, sys
import jax, numpy as np

how, devices, *hosts = json.loads(sys.argv[1])
if hosts:
    jax.distributed.initialize(*hosts)
import test_step as tests
from reference import SHALLOW, meta_sam, ours
from sam_jax.training import sharding
from sam_jax.training.losses import LossWeights
from sam_jax.training.parameters import EVERYTHING, adamw, split_model
from sam_jax.training.step import Recipe, compile_step, init_state

# The IoUs that are learnt jump by a pixel where a logit is within rounding of zero: left out.
recipe = Recipe(weights=LossWeights(iou=0.0), objects_at_once=1, ema_decay=0.9)

mesh = sharding.make_mesh(jax.devices()[:devices])
tx = adamw(1e-3, EVERYTHING, clip_norm=1.0)
graphdef, trained, frozen = split_model(ours(meta_sam(SHALLOW), SHALLOW), EVERYTHING)
state = sharding.put(init_state(trained, tx, ema=True), mesh, how)
frozen = sharding.put(frozen, mesh, how)
step = compile_step(state, tx, recipe)
batch = tests.batch_of(8, objects=2)
count = 8 // jax.process_count()
mine = slice(jax.process_index() * count, (jax.process_index() + 1) * count)
batch = sharding.put_batch({name: array[mine] for name, array in batch.items()}, mesh)
losses = []
for _ in range(20):
    state, metrics = step(graphdef, state, frozen, batch, jax.random.key(3))
    losses.append(float(metrics["loss"]))
kept = max(x.addressable_shards[0].data.nbytes / x.nbytes for x in jax.tree.leaves(state.params)
           if x.size >= 2**13)
whole = sharding.gather(state.params, mesh)
total = float(sum(np.abs(x).astype(np.float64).sum() for x in jax.tree.leaves(whole)))
print(json.dumps({"losses": losses, "kept": kept, "total": total}))
"""


def start(*arguments, devices):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process):
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return result(start("data", 1, devices=1))


def assert_same_training(actual, expected):
    np.testing.assert_allclose(actual["losses"], expected["losses"], atol=1e-5)
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]
    assert actual["total"] == pytest.approx(expected["total"], rel=1e-5)


@pytest.mark.parametrize("how", ["data", "fsdp"])
def test_eight_devices_are_as_one(alone, how):
    actual = result(start(how, 8, devices=8))
    assert_same_training(actual, alone)
    # FSDP keeps an eighth of each large parameter on a device.
    assert actual["kept"] == (1 if how == "data" else 1 / 8)


def test_two_hosts_are_as_one(alone):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [start("fsdp", 4, address, 2, i, devices=2) for i in range(2)]
    for host in hosts:
        assert_same_training(result(host), alone)
