import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from batches import batch_of
from cores import all_cores
from reference import SHALLOW, meta_sam, ours

from sam_jax import save_pretrained
from sam_jax.training import sharding

pytestmark = pytest.mark.slow

# Trains for 10 steps with each kind of parallelism and number of devices, and prints the results.
# Runs with 8 simulated devices or on 2 hosts, without PyTorch: model and batch are in files.
SCRIPT = '''
import functools, json, math, sys
import jax, numpy as np

folder, runs, hosts = json.loads(sys.argv[1])
if hosts:
    jax.distributed.initialize(*hosts)
from sam_jax import from_pretrained
from sam_jax.training import sharding
from sam_jax.training.rules import EVERYTHING, adamw, partition
from sam_jax.training.step import TrainConfig, compile_step, init_state

config = TrainConfig(num_rounds=2, objects_chunk_size=1, ema_decay=0.9)
tx = adamw(1e-3, EVERYTHING, clip_norm=1.0)
model = from_pretrained(folder + "/model")
whole_batch = dict(np.load(folder + "/batch.npz"))

def on_first_device(arrays):
    """Bytes of them."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in arrays
        if jax.local_devices()[0] in x.sharding.device_set
    )

def train(how, devices):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    trained, rest = partition(model, EVERYTHING)
    held = [on_first_device(jax.live_arrays())]

    def init(params):
        held.append(on_first_device(jax.live_arrays()))
        return tx.init(params)

    trained, rest = sharding.shard_tree((trained, rest), mesh, parallelism=how)
    begin = functools.partial(init_state, tx=tx._replace(init=init), ema=True)
    state = sharding.init_sharded(begin, trained, mesh=mesh, parallelism=how)
    held.append(on_first_device(jax.live_arrays()))
    share = on_first_device(jax.tree.leaves((trained, rest, state)))
    step = compile_step(state, tx, config=config)
    count = 8 // jax.process_count()
    mine = slice(jax.process_index() * count, (jax.process_index() + 1) * count)
    batch = sharding.put_batch({name: array[mine] for name, array in whole_batch.items()}, mesh)
    losses = []
    for _ in range(10):
        state, metrics = step(state, rest, batch, jax.random.key(3))
        losses.append(float(metrics["loss"]))
    kept = max(x.addressable_shards[0].data.nbytes / x.nbytes for x in jax.tree.leaves(state)
               if x.size >= 2**13)
    params = jax.tree.leaves(sharding.fetch(state.params, mesh))
    total = float(sum(np.abs(x).astype(np.float64).sum() for x in params))
    held = (max(held) - held[0]) / share
    return {"losses": losses, "kept": kept, "held": held, "total": total}

print(json.dumps([train(*run) for run in runs]))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, and a batch of 8 images."""
    path = tmp_path_factory.mktemp("sharding")
    save_pretrained(ours(meta_sam(SHALLOW), SHALLOW), path / "model")
    np.savez(path / "batch.npz", **batch_of(8, objects=2))
    return path


def start(folder, runs, hosts=(), *, devices):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps([str(folder), runs, hosts])]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(process):
    # The timeout is long, since other tests run at the same time on few cores.
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(folder):
    """Results of one device and of eight, with both kinds, from one process: it starts slowly."""
    runs = {"alone": ("data", 1), "data": ("data", 8), "fsdp": ("fsdp", 8)}
    found = results(start(folder, list(runs.values()), devices=8))
    return dict(zip(runs, found, strict=True))


def assert_same_training(actual, expected):
    np.testing.assert_allclose(actual["losses"], expected["losses"], atol=1e-5)
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]
    assert actual["total"] == pytest.approx(expected["total"], rel=1e-5)


@pytest.mark.parametrize("how", ["data", "fsdp"])
def test_eight_devices_match_one(trained, how):
    assert_same_training(trained[how], trained["alone"])
    # FSDP keeps an eighth of each large array of the state on a device. In addition to the loaded
    # model, the first device never holds more than its share, even while the state is created.
    assert trained[how]["kept"] == (1 if how == "data" else 1 / 8)
    assert trained[how]["held"] == pytest.approx(1, rel=0.01)


def test_two_hosts_match_one_device(folder, trained):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with all_cores():
        hosts = [start(folder, [("fsdp", 4)], (address, 2, i), devices=2) for i in range(2)]
    for host in hosts:
        (actual,) = results(host)
        assert_same_training(actual, trained["alone"])


def test_a_batch_that_the_devices_cannot_share(unchecked):
    class Mesh:
        size, local_devices = 6, [None] * 3

    entries = {"masks": np.zeros((4, 1)), "valid": np.zeros((3, 1))}
    with pytest.raises(ValueError, match=r"arrays have {'masks': 4, 'valid': 3} entries, expected"):
        sharding.put_batch(entries, Mesh())
    with pytest.raises(ValueError, match="a batch of 4 cannot be split among 3 devices; choose a"):
        sharding.put_batch({"valid": np.ones((4, 2))}, Mesh())


def test_a_mesh_needs_devices(unchecked):
    for devices in (9, ["cpu"]):
        with pytest.raises(TypeError, match=r"devices are .*, expected some of jax"):
            sharding.make_mesh(devices)


def test_unknown_parallelism(unchecked):
    with pytest.raises(ValueError, match="parallelism is 'ddp', expected data or fsdp"):
        sharding.shard_tree({"a": np.ones(8)}, sharding.make_mesh(), parallelism="ddp")
