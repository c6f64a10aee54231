"""Peak memory of converting and loading a ViT-H checkpoint (2.5 GB). PyTorch is not needed.

    python -m benchmarks.convert_memory

Needs Linux (it samples /proc), 12 GB of disk space in the temporary folder, and a few minutes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Table, machine_line
from sam_jax.checkpoints.names import to_torch
from sam_jax.checkpoints.params import param_shapes
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.checkpoints.torch_write import write_torch
from sam_jax.config import vit_h

ROOT = Path(__file__).parents[1]
LOAD = "import sys, jax, sam_jax; jax.block_until_ready(sam_jax.from_pretrained(sys.argv[1]))"


@dataclass
class Peak:
    """A process's peak memory, in bytes, and run time, in seconds."""

    total: int
    anonymous: int
    """Its own memory. The two peaks are at different times, so they do not add up to `total`."""
    file: int
    """Pages of mapped files: the checkpoint and libraries."""
    seconds: float


def write_random_checkpoint(path: Path) -> None:
    """Writes a file in Meta's format whose tensors are slices of one pool of random numbers."""
    config, rng = vit_h(), np.random.default_rng(0)
    shapes = param_shapes(config)
    pool = rng.standard_normal(2 * max(map(np.prod, shapes.values())), np.float32)

    def window(shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        start = rng.integers(pool.size - size)
        return pool[start : start + size].reshape(shape)

    write_torch(path, to_torch({k: window(s) for k, s in shapes.items()}, config, "meta"))


def run(*command: str | Path) -> Peak:
    """Runs Python with these arguments and samples its memory."""
    start = time.perf_counter()
    peaks = {}
    # ru_maxrss would include this process's memory when it started the child.
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT) as process:
        while process.poll() is None:
            for name, size in read_status(process.pid).items():
                peaks[name] = max(size, peaks.get(name, 0))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    seconds = time.perf_counter() - start
    return Peak(peaks["VmHWM"], peaks["RssAnon"], peaks["RssFile"], seconds)


def read_status(pid: int | str) -> dict[str, int]:
    """The sizes in /proc/<pid>/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")
    }


def check_identical(path: Path, other: Path) -> None:
    """Checks that both files have the same tensors, bit for bit."""
    tensors, others = read_tensors(path), read_tensors(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        # Compare bytes, since NaNs and signs of zeros count.
        assert np.array_equal(tensor.view(np.uint8), others[name].view(np.uint8)), name


def print_table(size: int, peaks: dict[str, Peak]) -> None:
    machine = machine_line(("jax", "orbax-checkpoint", "tensorstore"))
    columns = ("Step", "Peak memory", "/ file", "Of its own", "Mapped files", "Time")
    table = Table(
        f"Memory of converting a ViT-H checkpoint of {size / 1e9:.3f} GB", columns, machine
    )
    for step, peak in peaks.items():
        total, anonymous, file = (
            f"{n / 1e9:.2f} GB" for n in (peak.total, peak.anonymous, peak.file)
        )
        share, seconds = f"{peak.total / size:.2f}", f"{peak.seconds:.0f} s"
        table.add([step, total, share, anonymous, file, seconds])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pth, ours, half, back = (
            Path(folder, n) for n in ("sam_vit_h.pth", "ours", "half", "back.pth")
        )
        write_random_checkpoint(pth)
        convert = ("convert/torch_to_flax.py", "--checkpoint", pth, "--output")
        to_pth = ("convert/flax_to_torch.py", "--checkpoint", ours, "--output", back)
        peaks = {
            "`.pth` to our folder": run(*convert, ours),
            "the same, `--dtype bfloat16`": run(*convert, half, "--dtype", "bfloat16"),
            "our folder to `.pth`": run(*to_pth, "--format", "meta"),
            "`from_pretrained` of our folder": run("-c", LOAD, ours),
            "`from_pretrained` of the `.pth`": run("-c", LOAD, pth),
        }
        check_identical(pth, back)
        print_table(pth.stat().st_size, peaks)


if __name__ == "__main__":
    main()
