"""Memory of a training step of ViT-B on one image of 1024 x 1024 pixels, all parameters.

    python -m benchmarks.training_memory

With float32 and bfloat16 compute, with and without remat, each in its own process. Reports two
numbers: the memory that the image encoder's forward pass keeps for the backward pass, parameters
included, which is a property of the program; and the step's peak. On a GPU, the peak is the
device's own count; on a CPU (Linux only: it reads /proc), the increase of the process's memory.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from benchmarks.common import Table, find_device, machine_line, machine_slug

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from benchmarks.training_memory import measure
print(json.dumps(measure(sys.argv[1], sys.argv[2] == "1")))
"""


def measure(dtype: str, remat: bool) -> dict:
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.convert_memory import read_status
    from sam_jax.config import vit_b
    from sam_jax.models.sam import Sam
    from sam_jax.training.rules import EVERYTHING, adamw, combine, partition
    from sam_jax.training.step import TrainConfig, compile_step, init_state

    model = Sam(vit_b(), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    trained, rest = partition(model, EVERYTHING)
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(1, 1024, 1024, 3)).astype(np.float32),
        "masks": np.zeros((1, 1, 256, 256), bool),
        "boxes": np.array([[[40.0, 40.0, 399.0, 799.0]]], np.float32),
        "valid": np.ones((1, 1), np.float32),
    }
    batch["masks"][..., 10:200, 10:100] = True

    def encode(trained):
        sam = combine(trained, rest)
        return sam.encode_image(batch["pixel_values"], remat=remat)

    kept = jax.eval_shape(lambda trained: jax.vjp(encode, trained)[1], trained)
    result = {"kept": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))}

    tx = adamw(1e-4, EVERYTHING)
    state = init_state(trained, tx)
    step = compile_step(state, tx, config=TrainConfig(remat=remat))
    compiled = step.lower(state, rest, batch, jax.random.key(0)).compile()
    jax.block_until_ready(state)
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = read_status("self")["VmRSS"]
    _, metrics = jax.block_until_ready(compiled(state, rest, batch, jax.random.key(0)))
    assert np.isfinite(float(metrics["loss"]))
    if device.platform == "cpu":
        result["peak"] = read_status("self")["VmHWM"] - before
    else:
        result["peak"] = device.memory_stats()["peak_bytes_in_use"]
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory for other processes
    device = find_device()
    columns = ("Computation", "Remat", "Kept for the backward pass", "Peak of the step")
    machine = f"{device.device_kind}, {machine_line()}"
    table = Table("Memory of a training step", columns, machine, machine_slug(device), texts=2)
    for dtype in ("float32", "bfloat16"):
        for remat in (False, True):
            command = [sys.executable, "-c", SCRIPT, dtype, str(int(remat))]
            run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            kept, peak = (f"{found[name] / 1e9:.2f} GB" for name in ("kept", "peak"))
            table.add([dtype, "yes" if remat else "no", kept, peak])


if __name__ == "__main__":
    main()
