"""Ours beside PyTorch, part by part: the same numbers? how much faster?

    python -m benchmarks.run
    python -m benchmarks.run --models vit_b --parts encoder --compile
    python -m benchmarks.run --models vit_b --parts global windows --attention folded chunked
    python -m benchmarks.run --device gpu --models vit_h --dtype bfloat16 --batch 8 --compile

Each model and part has a process of its own, in which every contender (`benchmarks.contenders`) has
the same weights and the same inputs. Outputs are compared before anything is timed: who gives other
numbers than the first is not timed. Then all take turns, again and again, in each a run to get warm
and one that is timed, blocked until its result is there, and the median counts.

* Difference: the root of the mean square of the difference from the first, over that of the first
  (of masks and of scores, and the larger counts);
  of everything-mode's masks, the share that has none among the first's of IoU 0.99 or better
  (bfloat16 0.9, float16 0.97).
* Rate and share: the work per second, also over that of a large matrix product of the same dtype
  on the same device in the same run.
* Peak: memory during a run: on a CPU what the process took more than it had before, on a GPU the
  device's, weights and inputs of all contenders included (none of ours if there are several, which
  JAX counts together).
* Compiling: how much longer ours takes the first time, with JAX's persistent cache empty; and
  again, all that the process knew forgotten, with the cache full.
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
from benchmarks.contenders import ALONE, LAYERS, PARTS, PROMPTS, Contenders, Setting, torch
from benchmarks.convert_memory import read_status
from sam_jax.ops import attention

# 2 floating-point operations per multiplication and addition, of an image's encoder. (MobileSAM's
# is what PyTorch's FlopCounterMode counts.)
ENCODER_FLOPS = {"vit_b": 0.96e12, "vit_l": 2.96e12, "vit_h": 5.93e12, "mobile_sam": 0.0775e12}
DECODER_FLOPS = 3.5e9  # of a prompt, when nothing is shared
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
# Without the first step's update the losses of two steps differ by 1.6e-2.
TRAINING_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
# A mask of everything-mode is the same if its IoU is as good, as `benchmarks.accuracy` finds nearly
# all to be with a random image encoder: masks of noise, whose rims rounding moves.
SAME_MASK = {"float32": 0.99, "bfloat16": 0.9, "float16": 0.97}
MASKS_TOLERANCE = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}


class Failures(dict[str, Exception]):
    """Of contenders: whoever cannot run here is no reason to leave out the others."""

    @contextlib.contextmanager
    def of(self, who: str) -> Iterator[None]:
        """Takes what the block raises."""
        try:
            yield
        except Exception as error:
            self[who] = error


def seconds(contenders: Contenders, repeat: int, failures: Failures) -> dict[str, float]:
    """The median time of each; all take turns, so that what else the machine does hits them all.

    Each starts its turn with a run that does not count: after another's, whose memory the process
    has given back and whose data fill the caches, it would pay for what no user alternates.
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
    if part == "training":  # two steps: the second shows what the first did
        return [np.stack([on_host(run()) for _ in range(2)])]
    return on_host(run())


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.reshape(expected.shape) - expected
    return float(np.sqrt(np.square(difference).mean() / np.square(expected).mean()))


def differences(
    part: str, contenders: Contenders, dtype: str, failures: Failures
) -> dict[str, float]:
    """How far each one's output is from the first's, without which none is known to be right."""
    first = next(iter(contenders))
    found: dict[str, float] = {}
    for who, run in contenders.items():
        with failures.of(who):
            if first in failures:
                raise RuntimeError(f"not compared, since {first} failed")
            actual = output(part, run)
            expected = actual if who == first else expected
            if part == "everything":
                found[who] = missing(actual, expected, SAME_MASK[dtype])
            else:
                pairs = zip(actual, expected, strict=True)
                found[who] = max(error(*pair) for pair in pairs)
        if torch:
            torch.cuda.empty_cache()  # JAX gets none of what PyTorch keeps
    return found


def missing(records: list[dict], expected: list[dict], iou: float) -> float:
    if not records or not expected:
        return float(len(records) != len(expected))
    ious, _ = match(records, expected)
    return 1 - float((ious >= iou).sum()) / max(len(records), len(expected))


def peak(who: str, run) -> float:
    """Bytes during one run."""
    device = jax.local_devices()[0]
    gc.collect()
    if device.platform == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
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
    """What was found of each contender: who has no time was wrong, or could not run."""

    differences: dict[str, float]
    times: dict[str, float]
    peaks: dict[str, float]
    failures: Failures

    def row(self, who: str) -> dict[str, str]:
        """The cells of the table that these fill."""
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
    """Compares all, then times those who agree with the first."""
    failures = Failures()
    found = differences(part, contenders, dtype, failures)
    tolerances = {"everything": MASKS_TOLERANCE, "training": TRAINING_TOLERANCE}
    limit = tolerances.get(part, TOLERANCE)[dtype]
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
    """Rivals may be unable to run, and so may an attention that is asked for."""
    return any(
        r["Who"].startswith("ours")
        and (r["Time"] == "differs" or (r["Who"] == "ours" and r["Time"] == "none"))
        for r in rows
    )


def measure(part: str, name: str, args: argparse.Namespace) -> list[dict]:
    """A row for each contender."""
    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    if torch:
        torch.set_grad_enabled(False)
        torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if args.device == "gpu" else "cpu"
    has_images = part in ("encoder", "training", *LAYERS)
    batch = args.batch if has_images else 1
    setting = Setting(
        name=name,
        device=device,
        dtype=args.dtype,
        batch=batch,
        compiled=args.compile,
        attention=tuple(args.attention) if has_images else (),
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
    del ours  # and its memory
    contenders = contenders_of(setting)  # anew, since a step of training leaves its mark
    raced = race(part, contenders, args.dtype, args.repeat)
    rate = matrix_rate(args.dtype)
    work = {
        "encoder": batch * ENCODER_FLOPS[name],
        "training": 3 * batch * ENCODER_FLOPS[name],
        "decoder": PROMPTS * DECODER_FLOPS,
    }.get(part, 0)
    rows = []
    for who in contenders:
        row = {"Model, part": f"{name}, {part}", "Who": who, **raced.row(who)}
        if took := raced.times.get(who):
            row["Per s"] = f"{(PROMPTS if part == 'decoder' else batch) / took:.3g}"
            row["Rate"] = f"{work / took / 1e12:.3g} TFLOP/s" if work else ""
            row["Share"] = f"{work / took / rate:.0%}" if work else ""
            if who == "ours":
                compiling = [f"{max(x - took, 0):.1f} s" for x in (first, cached)]
                row["Compiling, from cache"] = ", ".join(compiling)
        rows.append(row)
    return rows


# As README tells users to, but here also for what compiles quickly.
CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
COLUMNS = (
    *("Model, part", "Who", "Difference", "Time", "Per s", "Rate", "Share", "Peak"),
    *("Compiling, from cache", "Ours is faster by"),
)


def describe(dtype: str) -> tuple[str, str]:
    """The machine in words, and what its results file is named after."""
    device = find_device()
    packages = ("jax", "torch", "transformers") if torch else ("jax",)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        rate = matrix_rate(dtype)
    alone = f"; ours alone ({ALONE})" if ALONE else ""
    line = f"{device.device_kind}, {machine_line(packages, rate)}, {dtype}{alone}"
    return line, machine_slug(device)


def alone(function, *arguments):
    """Its result, in a process of its own, whose end takes nothing else with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    models = [*VITS, "mobile_sam"]
    parser.add_argument("--models", nargs="+", default=["vit_b", "mobile_sam"], choices=models)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, *LAYERS])
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--batch", type=int, default=1, help="images, of encoder and training")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="PyTorch's under torch.compile, too")
    known = [*attention._IMPLEMENTATIONS]
    parser.add_argument(
        "--attention", nargs="+", default=[], choices=known, help="ours of a ViT with these, too"
    )
    args = parser.parse_args()
    check_at_least_one(parser, batch=args.batch, repeat=args.repeat)
    if layers := [part for part in args.parts if part in LAYERS and "mobile_sam" in args.models]:
        parser.error(f"{', '.join(layers)}: of ViTs alone; name them with --models")

    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    # Memory is shared with PyTorch.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    failed = False
    machine, slug = alone(describe, args.dtype)
    table = Table("sam_jax and PyTorch, part by part", COLUMNS, machine, slug, texts=2)
    for name in args.models:
        for part in args.parts:
            try:
                rows = alone(measure, part, name, args)
            except Exception:  # ours cannot, or the memory is too small for all
                traceback.print_exc()
                failed = True
                continue
            failed |= ours_fails(rows)
            for row in rows:
                table.add(row)
    sys.exit(failed)


if __name__ == "__main__":
    main()
