"""A run's states on disk, by Orbax: written while training goes on; the last and the best stay."""

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
_MAX_METADATA_BYTES = 64 << 20  # of ViT-H and its optimizer about 1 MB


@contextlib.contextmanager
def open_checkpoints(folder: str | os.PathLike) -> Iterator[ocp.training.Checkpointer]:
    """A run's checkpoints: the best, and the last two, since the last may turn out to be no good.

    The end of the context waits for what is being written.

    What an interrupted run left half-written is removed, and so are damaged files that only
    describe a checkpoint, whose arrays may still be good; a warning names them.

    Raises:
        OSError: at the end, if a checkpoint could not be written, for instance on a full disk.
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
    """Begins to write a state, which is copied first: the run may go on at once.

    Args:
        checkpoints: of `open_checkpoints`.
        state: all of it: parameters, optimiser, moving average, step. The batches and all that is
            by chance depend on the step alone.
        miou: how good it is, if that is known.

    Raises:
        OSError: if this or the one before cannot be written, for instance on a full disk.
    """
    metrics = None if miou is None else {_METRIC: miou}
    # What is there already is damaged, and was passed over by `load_state`.
    options = {"force": True, "overwrite": True, "metrics": metrics}
    with _writing(Path(checkpoints.directory)):
        checkpoints.save_async(int(state.step), _flat(state), **options)


def load_state(
    checkpoints: ocp.training.Checkpointer, like: TrainState, *, best: bool = False
) -> TrainState | None:
    """The last state, or the best that is known, placed as `like` is; None if there is none.

    A damaged checkpoint is passed over with a warning that names its folder. It stays until the run
    comes to its step again. Of several hosts all have to call this together.

    Raises:
        ValueError: if it is of another model, optimizer or table, or if all are damaged.
    """
    found = list(checkpoints.checkpoints)
    if best:  # those that have no metric first
        found.sort(key=_miou)
    damaged = []
    for checkpoint in reversed(found):
        folder = checkpoints.directory / str(checkpoint.step)
        state, problem = None, None
        try:
            state = _load(checkpoints, checkpoint.step, like)
        except _DoesNotFit as error:
            raise ValueError(
                f"the checkpoint {folder} does not fit this run; was it made with other settings? "
                f"{error}"
            ) from error
        except Exception as error:  # whatever Orbax meets in a damaged folder
            problem = f"{folder} is damaged: {_first_line(error)[:200]}"
        if any_host(state is None):
            damaged.append(problem or f"{folder} is damaged: another host cannot read it")
            continue
        for problem in damaged:
            warnings.warn(
                f"the checkpoint {problem}; the one of step {checkpoint.step} takes its place",
                stacklevel=2,
            )
        return state
    if damaged:
        raise ValueError(
            f"no checkpoint in {checkpoints.directory} can be read; remove this folder to begin "
            "the run again, or the newest checkpoints in it if you have copies of older ones:\n"
            + "\n".join(f"  {problem}" for problem in damaged)
        )
    return None


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever Orbax and its threads raise
        # The cause comes last, after every path on the way to it.
        cause = _first_line(error).rpartition('": ')[2]
        raise OSError(
            f"cannot write a checkpoint in {folder}: {cause}; the run can be resumed from the one "
            "before it"
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
    # First, since Orbax would say so of one array while it reads others.
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
        return file.is_symlink()  # which leads nowhere
    except (IsADirectoryError, ValueError):
        return True
    try:
        check(found)
    except Exception:  # whatever Orbax would meet in it
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
    """What stops a run whose loss or gradients are no numbers: the step, its images, a way back.

    A checkpoint is good if a step was made from it whose loss was a number.
    """
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    good = max((c.step for c in checkpoints.checkpoints if c.step < step - 1), default=None)
    last = "there is no good checkpoint yet"
    if good is not None:
        last = f"the last good checkpoint is {checkpoints.directory / str(good)}"
    return FloatingPointError(
        f"at step {step} {', '.join(bad)}, for the images {', '.join(map(str, image_ids))}; "
        f"{last}. Look at these images and their annotations, or try a lower learning rate, in a "
        "new folder"
    )


def _flat(state: TrainState) -> dict[str, jax.Array]:
    """The leaves by name, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {f"{i:05} {jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}
