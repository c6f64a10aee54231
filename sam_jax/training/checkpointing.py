"""Checkpoints of a run, by Orbax: written while training continues; the last and best are kept."""

import contextlib
import datetime
import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.metadata import get_step_metadata

from sam_jax.checkpoints.native import open_arrays
from sam_jax.files import folder_size, read_json
from sam_jax.training.sharding import any_host
from sam_jax.training.step import TrainState

__all__ = ["load_state", "non_finite_error", "open_checkpoints", "save_state"]

_METRIC = "miou"
_MAX_DESCRIPTION_BYTES = 1 << 20
_MAX_METADATA_BYTES = 64 << 20  # ViT-H and its optimizer have about 1 MB


@contextlib.contextmanager
def open_checkpoints(folder: str | os.PathLike) -> Iterator[ocp.training.Checkpointer]:
    """Opens a run's checkpoints; keeps the best one and the last two, since the last may be bad.

    Leaving the context waits for pending writes.

    Partly written checkpoints of an interrupted run are removed. Damaged files that only describe a
    checkpoint are also removed, with a warning that names them, since its arrays may be intact.

    Raises:
        OSError: at the end, if a checkpoint could not be written, for example on a full disk.
    """
    folder = Path(folder).absolute()
    _remove_damaged_descriptions(folder)
    keep = ocp.training.preservation_policies
    best = keep.BestN(
        get_metric_fn=lambda metrics: metrics[_METRIC], n=1, keep_checkpoints_without_metrics=False
    )
    checkpoints = ocp.training.Checkpointer(
        str(folder),
        # Orbax's own policies do not have the signature that its type asks for.
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(2), best]),  # pyright: ignore[reportArgumentType]
        cleanup_tmp_directories=True,
    )
    try:
        yield checkpoints
    finally:
        with _writing(folder):
            checkpoints.close()


def save_state(
    checkpoints: ocp.training.Checkpointer, state: TrainState, *, miou: float | None = None
) -> None:
    """Starts to write a copy of a state; training can continue immediately.

    Args:
        checkpoints: from `open_checkpoints`.
        state: the whole state: parameters, optimizer, moving average, step. Batches and random
            numbers depend only on the seed and the step.
        miou: the state's mean IoU, if known.

    Raises:
        OSError: if this checkpoint or the previous one cannot be written, for example on a full
            disk.
    """
    metrics = None if miou is None else {_METRIC: miou}
    # Overwrite: an existing checkpoint of this step is damaged and was skipped by `load_state`.
    options = {"force": True, "overwrite": True, "metrics": metrics}
    with _writing(Path(checkpoints.directory)):
        checkpoints.save_async(int(state.step), _flat(state), **options)


def load_state(
    checkpoints: ocp.training.Checkpointer, like: TrainState, *, best: bool = False
) -> TrainState | None:
    """The last state, or the best known one, sharded like `like`; None if there is none.

    Damaged checkpoints are skipped with a warning that names their folder. They stay until the run
    reaches their step again. With several hosts, all must call this together.

    Raises:
        ValueError: if the state is from another model, optimizer or table, or if all are damaged.
    """
    found = list(checkpoints.checkpoints)
    if best:  # those without a metric first
        found.sort(key=_miou)
    damaged = []
    for checkpoint in reversed(found):
        folder = checkpoints.directory / str(checkpoint.step)
        state, problem = None, None
        try:
            state = _load(checkpoints, checkpoint.step, like)
        except _DoesNotFit as error:
            raise ValueError(
                f"the checkpoint {folder} does not match this run; was it made with different "
                f"settings? {error}"
            ) from error
        except Exception as error:  # anything that Orbax raises for a damaged folder
            problem = f"{folder} is damaged: {_first_line(error)[:200]}"
        if any_host(state is None):
            damaged.append(problem or f"{folder} is damaged: another host cannot read it")
            continue
        for problem in damaged:
            warnings.warn(
                f"the checkpoint {problem}; using that of step {checkpoint.step} instead",
                stacklevel=2,
            )
        return state
    if damaged:
        raise ValueError(
            f"no checkpoint in {checkpoints.directory} can be read; remove this folder to restart "
            "the run, or remove the newest checkpoints in it if you have copies of older ones:\n"
            + "\n".join(f"  {problem}" for problem in damaged)
        )
    return None


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # anything that Orbax and its threads raise
        # The message ends with the cause, after every path that leads to it.
        cause = _first_line(error).rpartition('": ')[2]
        raise OSError(
            f"cannot write a checkpoint in {folder}: {cause}; the run can be resumed from the "
            "previous one"
        ) from error


class _DoesNotFit(Exception):
    pass


def _load(checkpoints: ocp.training.Checkpointer, step: int, like: TrainState) -> TrainState:
    expected = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _flat(like).items()
    }
    folder = Path(checkpoints.directory) / str(step)
    folder_size(folder)  # raises if reading it might not end
    # Checked first, since Orbax would report a single array, after reading others.
    saved = open_arrays(folder / "state", _MAX_METADATA_BYTES)
    differing = [
        name
        for name in sorted(expected.keys() | saved.keys())
        if name not in expected
        or name not in saved
        or expected[name].shape != saved[name].shape
        or expected[name].dtype != saved[name].dtype.numpy_dtype
    ]
    if differing:
        raise _DoesNotFit(f"{len(differing)} arrays differ, the first is {differing[0]!r}")
    flat = checkpoints.load(step, expected)
    return jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))


def _miou(checkpoint: ocp.training.CheckpointMetadata) -> float:
    miou = checkpoint.metrics.get(_METRIC) if isinstance(checkpoint.metrics, dict) else None
    return miou if isinstance(miou, (int, float)) else -math.inf


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _remove_damaged_descriptions(folder: Path) -> None:
    """Orbax reads these of all checkpoints first, and stops at one that is damaged."""
    if jax.process_index() == 0:
        for step in sorted(path for path in folder.glob("*") if path.name.isdigit()):
            for name, check in (
                ("_CHECKPOINT_METADATA", _check_description),
                ("metrics/metrics", _check_metrics),
            ):
                file = step / name
                if _is_damaged(file, functools.partial(check, step)):
                    if file.is_dir() and not file.is_symlink():
                        shutil.rmtree(file)
                    else:
                        file.unlink()
                    warnings.warn(f"{file} was damaged, and is removed", stacklevel=3)
    multihost_utils.sync_global_devices("checked the checkpoints")


def _is_damaged(file: Path, check: Callable[[Any], object]) -> bool:
    try:
        found = read_json(file, max_bytes=_MAX_DESCRIPTION_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return file.is_symlink()  # a dangling link
    except (IsADirectoryError, ValueError):
        return True
    try:
        check(found)
    except Exception:  # anything that would make Orbax fail
        return True
    return False


def _check_description(step: Path, _: Any) -> None:
    nanoseconds = get_step_metadata(step).commit_timestamp_nsecs  # Orbax checks all types
    datetime.datetime.fromtimestamp((nanoseconds or 0) / 1e9, tz=datetime.UTC)  # and does this


def _check_metrics(_: Path, found: Any) -> None:
    if not (isinstance(found, dict) and math.isfinite(found[_METRIC])):
        raise ValueError(f"expected a number named {_METRIC}")


def non_finite_error(
    step: int,
    metrics: dict[str, float],
    *,
    image_ids: Sequence,
    checkpoints: ocp.training.Checkpointer,
) -> FloatingPointError:
    """The error for a run whose loss or gradients are not finite; names the step and its images.

    It also names the last good checkpoint: one from which a step with a finite loss was made.
    """
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    good = max((c.step for c in checkpoints.checkpoints if c.step < step - 1), default=None)
    last = "there is no good checkpoint yet"
    if good is not None:
        last = f"the last good checkpoint is {checkpoints.directory / str(good)}"
    return FloatingPointError(
        f"at step {step} {', '.join(bad)}, for the images {', '.join(map(str, image_ids))}; "
        f"{last}. Check these images and their annotations, or try a lower learning rate in a new "
        "folder"
    )


def _flat(state: TrainState) -> dict[str, jax.Array]:
    """The leaves by name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {f"{i:05} {jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}
