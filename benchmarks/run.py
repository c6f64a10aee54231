"""sam_jax compared with PyTorch, part by part: same numbers? how much faster?

    python -m benchmarks.run
    python -m benchmarks.run --models vit_b --parts encoder --compile
    python -m benchmarks.run --models mobile_sam --runtimes "ONNX Runtime" OpenVINO
    python -m benchmarks.run --models vit_b --parts global windows --attention folded chunked
    python -m benchmarks.run --device gpu --models vit_h --dtype bfloat16 --batch 8 --compile

Each model and part runs in its own process, in which all contenders (`benchmarks.contenders`) have
the same weights and inputs. Outputs are compared first: contenders whose numbers differ from those
of the first one are not timed. Then all contenders take turns several times. In each turn, a run
warms up and another one is timed until its result is ready; the median counts.

* Difference: the root mean square of the difference from the first contender, relative to the root
  mean square of the first (the larger of masks and scores); for everything mode, the share of masks
  without a counterpart in the first with an IoU of at least 0.99 (bfloat16 0.9, float16 0.97).
* Rate and share: the work per second, also relative to that of a large matrix product of the same
  dtype on the same device in the same run.
* Peak: memory during a run: on a CPU, the increase of the process's memory; on a GPU, the device's
  memory including weights and inputs of all contenders (not given for sam_jax if it has several
  contenders, which JAX counts together).
* Compiling: how much longer sam_jax's first run takes, with JAX's persistent cache empty; and again
  with the cache full and everything in the process's memory dropped.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.common import (
    VITS,
    Table,
    check_at_least_one,
    find_device,
    machine_line,
    machine_slug,
    match,
    matrix_rate,
    reason,
    timed,
)
from benchmarks.contenders import LAYERS, PARTS, PROMPTS
from benchmarks.convert_memory import read_status
from benchmarks.setting import ALONE, RUNTIMES, Contenders, Setting, torch
from sam_jax.ops import attention

# 2 floating-point operations per multiplication and addition, of an image's encoder. (MobileSAM's
# is what PyTorch's FlopCounterMode counts.)
ENCODER_FLOPS = {"vit_b": 0.96e12, "vit_l": 2.96e12, "vit_h": 5.93e12, "mobile_sam": 0.0775e12}
DECODER_FLOPS = 3.5e9  # per prompt, if nothing is shared
PER_RUN = {"decoder": PROMPTS, "click": 1}  # prompts
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
# Without the first step's update the losses of two steps differ by 1.6e-2.
TRAINING_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
# IoU from which masks of everything mode count as the same. With a random image encoder, nearly all
# masks reach it in `benchmarks.accuracy`: they are masks of noise, whose edges depend on rounding.
SAME_MASK = {"float32": 0.99, "bfloat16": 0.9, "float16": 0.97}
MASKS_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}


class Failures(dict[str, Exception]):
    """Errors of contenders by name: if one cannot run here, the others are measured anyway."""

    @contextlib.contextmanager
    def of(self, who: str) -> Iterator[None]:
        """Records an exception of the block."""
        try:
            yield
        except Exception as error:
            self[who] = error


def seconds(contenders: Contenders, repeat: int, failures: Failures) -> dict[str, float]:
    """The median time of each contender; they take turns, so that other load affects all of them.

    Each turn starts with a run that does not count. Otherwise a contender would pay for memory that
    the process released and for caches filled by another, although no user alternates them.
    """
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(repeat):
        for who, run in contenders.items():
            with failures.of(who):
                timed(run)
                times[who].append(timed(run)[1])
    return {who: statistics.median(found) for who, found in times.items() if who not in failures}


def on_host(result) -> list[np.ndarray]:
    if isinstance(result, tuple):
        return [array for part in result for array in on_host(part)]
    if hasattr(result, "detach"):
        result = result.detach().float().cpu().numpy()
    return [np.asarray(result, np.float32)]


def output(part: str, run) -> list[np.ndarray] | list[dict]:
    if part == "everything":
        return run()
    if "training" in part:  # two steps: the second shows the effect of the first
        return [np.stack([on_host(run()) for _ in range(2)])]
    return on_host(run())


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.reshape(expected.shape) - expected
    return float(np.sqrt(np.square(difference).mean() / np.square(expected).mean()))


def differences(
    part: str, contenders: Contenders, dtype: str, failures: Failures
) -> dict[str, float]:
    """Each contender's difference from the first one, which has to run for others to be correct."""
    first = next(iter(contenders))
    found: dict[str, float] = {}
    for who, run in contenders.items():
        with failures.of(who):
            if first in failures:
                raise RuntimeError(f"not compared because {first} failed")
            actual = output(part, run)
            expected = actual if who == first else expected
            if part == "everything":
                found[who] = missing(actual, expected, SAME_MASK[dtype])
            else:
                pairs = zip(actual, expected, strict=True)
                found[who] = max(error(*pair) for pair in pairs)
        if torch:
            torch.cuda.empty_cache()  # JAX cannot use memory that PyTorch caches
    return found


def missing(records: list[dict], expected: list[dict], iou: float) -> float:
    if not records or not expected:
        return float(len(records) != len(expected))
    ious, _ = match(records, expected)
    return 1 - float((ious >= iou).sum()) / max(len(records), len(expected))


def peak(who: str, run) -> float:
    """Peak memory of one run, in bytes."""
    device = jax.local_devices()[0]
    gc.collect()
    if device.platform == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = read_status("self")["VmRSS"]
        timed(run)
        return read_status("self")["VmHWM"] - before
    if who.startswith("ours"):
        timed(run)
        return device.memory_stats()["peak_bytes_in_use"]
    torch.cuda.reset_peak_memory_stats()
    timed(run)
    return torch.cuda.max_memory_allocated()


class Raced(NamedTuple):
    """The measurements of all contenders; one without a time was wrong or could not run."""

    differences: dict[str, float]
    times: dict[str, float]
    peaks: dict[str, float]
    failures: Failures

    def row(self, who: str) -> dict[str, str]:
        """The table's cells with these measurements."""
        if error := self.failures.get(who):
            return {"Difference": reason(error), "Time": "none"}
        row = {"Difference": f"{self.differences[who]:.0e}", "Time": "differs"}
        if took := self.times.get(who):
            row["Time"] = f"{took:.2f} s" if took > 1 else f"{1e3 * took:.0f} ms"
            if who in self.peaks:
                row["Peak"] = f"{self.peaks[who] / 1e9:.2f} GB"
            if "ours" in self.times:
                row["Ours is faster by"] = f"{took / self.times['ours']:.2f}"
        return row


def race(part: str, contenders: Contenders, dtype: str, repeat: int) -> Raced:
    """Compares all contenders, then times those that agree with the first one."""
    failures = Failures()
    found = differences(part, contenders, dtype, failures)
    tolerance = TRAINING_TOLERANCE if "training" in part else TOLERANCE
    limit = (MASKS_TOLERANCE if part == "everything" else tolerance)[dtype]
    agreeing = {who: contenders[who] for who, difference in found.items() if difference <= limit}
    times = seconds(agreeing, repeat, failures)
    peaks: dict[str, float] = {}
    ours = [who for who in times if who.startswith("ours")]
    for who in times:
        if who in ours and len(ours) > 1 and jax.default_backend() != "cpu":
            continue
        with failures.of(who):
            peaks[who] = peak(who, contenders[who])
    return Raced(found, times, peaks, failures)


def ours_fails(rows: list[dict]) -> bool:
    """Whether sam_jax differs or its default cannot run. Other contenders may be unable to run."""
    return any(
        r["Who"].startswith("ours")
        and (r["Time"] == "differs" or (r["Who"] == "ours" and r["Time"] == "none"))
        for r in rows
    )


def measure(part: str, name: str, args: argparse.Namespace) -> list[dict]:
    """Adds a row for each contender."""
    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    if torch:
        torch.set_grad_enabled(False)
        torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if args.device == "gpu" else "cpu"
    has_images = part in ("encoder", "training", "decoder_training", *LAYERS)
    batch = args.batch if has_images else 1
    setting = Setting(
        name=name,
        device=device,
        dtype=args.dtype,
        batch=batch,
        compiled=args.compile,
        attention=tuple(args.attention) if has_images else (),
        runtimes=tuple(args.runtimes),
    )
    contenders_of = {**PARTS, **LAYERS}[part]
    ours = contenders_of(setting)["ours"]
    with tempfile.TemporaryDirectory() as cache:
        for option, value in {**CACHE, "jax_compilation_cache_dir": cache}.items():
            jax.config.update(option, value)
        first = timed(ours)[1]
        jax.clear_caches()
        cached = timed(ours)[1]
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    del ours  # frees its memory
    contenders = contenders_of(setting)  # new ones, since a training step changes the weights
    raced = race(part, contenders, args.dtype, args.repeat)
    rate = matrix_rate(args.dtype)
    work = {
        "encoder": batch * ENCODER_FLOPS[name],
        "training": 3 * batch * ENCODER_FLOPS[name],
        **{part: prompts * DECODER_FLOPS for part, prompts in PER_RUN.items()},
    }.get(part, 0)
    rows = []
    for who in contenders:
        row = {"Model, part": f"{name}, {part}", "Who": who, **raced.row(who)}
        if took := raced.times.get(who):
            row["Per s"] = f"{PER_RUN.get(part, batch) / took:.3g}"
            row["Rate"] = f"{work / took / 1e12:.3g} TFLOP/s" if work else ""
            row["Share"] = f"{work / took / rate:.0%}" if work else ""
            if who == "ours":
                compiling = [f"{max(x - took, 0):.1f} s" for x in (first, cached)]
                row["Compiling, from cache"] = ", ".join(compiling)
        rows.append(row)
    return rows


# As README recommends, but also for programs that compile quickly.
CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
COLUMNS = (
    *("Model, part", "Who", "Difference", "Time", "Per s", "Rate", "Share", "Peak"),
    *("Compiling, from cache", "Ours is faster by"),
)


def describe(dtype: str) -> tuple[str, str]:
    """The machine in words, and its name in that of the results file."""
    device = find_device()
    packages = ("jax", "torch", "transformers") if torch else ("jax",)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        rate = matrix_rate(dtype)
    alone = f"; ours alone ({ALONE})" if ALONE else ""
    line = f"{device.device_kind}, {machine_line(packages, rate)}, {dtype}{alone}"
    return line, machine_slug(device)


def alone(function, *arguments):
    """The function's result, computed in its own process, which may crash without harm."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    models = [*VITS, "mobile_sam"]
    parser.add_argument("--models", nargs="+", default=["vit_b", "mobile_sam"], choices=models)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, *LAYERS])
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--batch", type=int, default=1, help="images for encoder and training")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also run torch.compile")
    known = [*attention._IMPLEMENTATIONS]
    parser.add_argument(
        "--attention", nargs="+", default=[], choices=known, help="further attentions of sam_jax"
    )
    parser.add_argument(
        "--runtimes", nargs="+", default=[], choices=RUNTIMES, help="on a CPU: also run these"
    )
    args = parser.parse_args()
    if args.runtimes and args.device != "cpu":
        parser.error("--runtimes are for --device cpu")
    if "ONNX Runtime" in args.runtimes and args.dtype != "float32":
        parser.error("--runtimes: ONNX Runtime computes in float32 only")
    check_at_least_one(parser, batch=args.batch, repeat=args.repeat)
    if layers := [part for part in args.parts if part in LAYERS and "mobile_sam" in args.models]:
        parser.error(f"--parts {' '.join(layers)}: only ViTs have this; omit mobile_sam")

    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    # JAX shares the GPU's memory with PyTorch.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    failed = False
    machine, slug = alone(describe, args.dtype)
    table = Table("sam_jax and PyTorch, part by part", COLUMNS, machine, slug, texts=2)
    for name in args.models:
        for part in args.parts:
            try:
                rows = alone(measure, part, name, args)
            except Exception:  # sam_jax cannot run, or the memory is too small for all
                traceback.print_exc()
                failed = True
                continue
            failed |= ours_fails(rows)
            for row in rows:
                table.add(row)
    sys.exit(failed)


if __name__ == "__main__":
    main()
