"""Helpers of several benchmarks: photos, models, timing and comparison of results."""

import argparse
import datetime
import functools
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pycocotools.mask
import skimage.data
from PIL import Image
from scipy.optimize import linear_sum_assignment

from sam_jax import from_pretrained
from sam_jax.checkpoints.names import Format, to_torch
from sam_jax.checkpoints.params import build_model, flat_params, param_shapes
from sam_jax.config import vit_b, vit_h, vit_l
from sam_jax.models.sam import Sam
from sam_jax.ops import attention

RESULTS = Path(__file__).parent / "results"
VITS = {"vit_b": vit_b, "vit_l": vit_l, "vit_h": vit_h}
# For a random image encoder: masks that the decoder finds in noise score lower than objects.
RANDOM_ENCODER = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.7}


def photos() -> dict[str, np.ndarray]:
    """Photos from scikit-image's wheel: landscape, portrait, small, larger than 1024 pixels."""

    def resized(image, width, height):
        return np.asarray(Image.fromarray(image).resize((width, height)))

    return {
        "landscape 600x400": skimage.data.coffee(),
        "portrait 300x512": np.ascontiguousarray(skimage.data.astronaut()[:, 100:400]),
        "small 226x150": resized(skimage.data.chelsea(), 226, 150),
        "large 1601x1068": resized(skimage.data.rocket(), 1601, 1068),
    }


def chosen_photos(parser: argparse.ArgumentParser, beginnings: list[str]) -> dict[str, np.ndarray]:
    """The photos whose names have one of the prefixes; all photos without prefixes."""
    known = photos()
    if unknown := [b for b in beginnings if not any(name.startswith(b) for name in known)]:
        parser.error(f"--photos is {' '.join(unknown)}, but photos are: {', '.join(known)}")
    return {k: v for k, v in known.items() if k.startswith(tuple(beginnings or [""]))}


def check_at_least_one(parser: argparse.ArgumentParser, **values: int) -> None:
    """Ends the program for an argument that is less."""
    for name, value in values.items():
        if value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")


def reason(error: Exception) -> str:
    """The error as text for a table's cell."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].replace("|", "/")


def attention_with_bias(q, k, v, tables, grid):
    """cuDNN's flash attention with the relative positions as a bias on all logits.

    An alternative to "cudnn" of `sam_jax.ops.attention`, which avoids the bias, for head widths
    that cuDNN supports on all current GPUs.
    """
    rel_h, rel_w = attention.position_terms(q, tables)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).astype(q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    bias = bias.reshape(*bias.shape[:3], -1)
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn").transpose(0, 2, 1, 3)


attention._IMPLEMENTATIONS["cudnn, bias"] = attention_with_bias


@functools.cache
def model_of(name: str, dtype: str = "float32", attention: str = "portable") -> Sam:
    """MobileSAM, or a ViT with random weights and MobileSAM's neck, prompt encoder and decoder."""
    mobile = from_pretrained("mobile_sam", dtype=jnp.dtype(dtype))
    if name == "mobile_sam":
        return mobile
    config = VITS[name]()
    rng, official = np.random.default_rng(0), flat_params(mobile)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        is_encoder = path.startswith("image_encoder.")
        if not is_encoder or ("neck" in path and "neck.conv1" not in path):
            return np.asarray(official[path])
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        return 0.02 * rng.standard_normal(shape, np.float32)

    params = {path: values(path, shape) for path, shape in param_shapes(config).items()}
    return build_model(params, config, jnp.dtype(dtype), attention)


def in_pytorch(model: Sam, fmt: Format = "meta") -> Any:
    """Meta's or MobileSAM's model, or "hf" for `transformers`', with a sam_jax model's weights."""
    import torch
    from torch_reference import hf_sam, meta_sam

    params = {path: np.asarray(value) for path, value in flat_params(model).items()}
    tensors = to_torch(params, model.config, fmt)
    reference = {"meta": meta_sam, "hf": hf_sam}[fmt](model.config)
    # Hugging Face's model has one matrix under two names.
    tensors = {k: torch.tensor(v) for k, v in tensors.items()}
    reference.load_state_dict(tensors, strict=fmt == "meta")
    return reference.eval()


def find_device() -> jax.Device:
    """JAX's first device; exits if there is none of the kind in JAX_PLATFORMS."""
    try:
        return jax.local_devices()[0]
    except (AssertionError, RuntimeError):  # raised by JAX if it finds none
        wanted = os.environ.get("JAX_PLATFORMS")
        sys.exit(f"JAX finds no device (JAX_PLATFORMS={wanted}): see docs/troubleshooting.md")


def cpu_name() -> str:
    """The CPU's model (on Linux) or its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search("model name\\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def cpu_features() -> list[str]:
    """The vector and matrix extensions that determine a CPU's speed (Linux only)."""
    info = Path("/proc/cpuinfo")
    found = re.search("flags\\s*: (.*)", info.read_text()) if info.exists() else None
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    return [flag for flag in known if found and flag in found[1].split()]


def machine_slug(device: jax.Device | None = None) -> str:
    """The machine in the name of the results file: "2-core-avx512", or the device's name."""
    if device is not None and device.platform != "cpu":
        return re.sub(r"\W+", "-", device.device_kind.lower()).strip("-")
    vectors = {"amx_tile": "amx", "avx512f": "avx512", "avx2": "avx2"}
    fastest = next((vectors[f] for f in vectors if f in cpu_features()), platform.machine())
    return f"{os.cpu_count()}-core-{fastest}"


def machine_line(packages: Sequence[str] = ("jax",), rate: float | None = None) -> str:
    """The CPU, versions, and the rate of a large matrix product, if measured, in FLOP/s."""
    features = f" ({', '.join(cpu_features())})" if cpu_features() else ""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    line = f"{os.cpu_count()} cores, {cpu_name()}{features}; Python {platform.python_version()}, "
    return line + versions + (f"; {rate / 1e9:.0f} GFLOP/s" if rate else "")


class Table:
    """A table whose rows are printed and appended to the results file as they are measured.

    Args:
        heading: the question that the table answers.
        columns: names of the columns.
        machine: the machine and device, such as a `machine_line`.
        slug: the machine in the results file's name; None for this machine's CPU.
        texts: how many of the first columns are text instead of numbers.
    """

    def __init__(
        self,
        heading: str,
        columns: Sequence[str],
        machine: str,
        slug: str | None = None,
        texts: int = 1,
    ):
        today = datetime.date.today()
        self.path = RESULTS / f"{today}-{slug or machine_slug()}.md"
        self.columns = columns
        arguments = shlex.join(sys.argv[1:])
        command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {arguments}".strip()
        rule = "---|" * texts + "---:|" * (len(columns) - texts)
        self._head = (
            f"\n## {heading}\n\n`{command}`, {today}, {machine}\n\n"
            f"| {' | '.join(columns)} |\n|{rule}\n"
        )

    def add(self, cells: Sequence[str] | dict[str, str]) -> None:
        """Prints and appends a row; writes the table's header before the first one."""
        if isinstance(cells, dict):
            cells = [cells.get(column, "") for column in self.columns]
        text = f"{self._head}| {' | '.join(map(str, cells))} |"
        self._head = ""
        print(text, flush=True)
        self.path.parent.mkdir(exist_ok=True)
        if not self.path.exists():
            title = self.path.stem
            self.path.write_text(f"# {title}\n\nWritten by the scripts of `benchmarks/`.\n")
        with self.path.open("a") as file:
            file.write(f"{text}\n")


def timed(function, *args) -> tuple[Any, float]:
    """The function's result, once it is computed on its device, and the seconds that it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def matrix_rate(dtype: str = "float32") -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    # Several in one program, so that the time to start it is negligible.
    count = 1 if jax.default_backend() == "cpu" else 20
    products = jax.jit(lambda a: jax.lax.fori_loop(0, count, lambda _, x: (a @ x) / side**0.5, a))
    timed(products, a)
    times = [timed(products, a)[1] for _ in range(10)]
    return count * 2 * side**3 / float(np.median(times))


def match(actual: list[dict], expected: list[dict]) -> tuple[np.ndarray, list[tuple[dict, dict]]]:
    """Records matched one to one, and the IoUs of their masks."""
    masks = [[record["segmentation"] for record in records] for records in (actual, expected)]
    ious = np.array(pycocotools.mask.iou(*masks, [0] * len(expected)))
    ious = ious.reshape(len(actual), len(expected))  # pycocotools returns [] for no masks
    rows, columns = linear_sum_assignment(-ious)
    pairs = [(actual[i], expected[j]) for i, j in zip(rows, columns, strict=True)]
    return ious[rows, columns], pairs


def compare(actual: list[dict], expected: list[dict], pixels: int) -> tuple[np.ndarray, float]:
    """IoUs of masks matched one to one, and the largest difference of their scores.

    A few pixels more or less above the thresholds of the stability score are ignored.
    """
    ious, pairs = match(actual, expected)
    scores = []
    for ours, theirs in pairs:
        scores.append(abs(ours["predicted_iou"] - theirs["predicted_iou"]))
        difference = abs(ours["stability_score"] - theirs["stability_score"])
        scores.append(max(difference - pixels / theirs["area"], 0))
    return ious, max(scores, default=0.0)
