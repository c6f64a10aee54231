"""A run's states on disk, by Orbax: written while training goes on; the last and the best stay."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from sam_jax.training.step import TrainState

_METRIC = "miou"


def open_checkpoints(folder: str | os.PathLike) -> ocp.training.Checkpointer:
    """A run's checkpoints: the best, and the last two, since the last may turn out to be no good.

    To be closed, which waits for what is being written.

    What an interrupted run left half-written is removed.
    """
    keep = ocp.training.preservation_policies
    best = keep.BestN(
        get_metric_fn=lambda metrics: metrics[_METRIC], n=1, keep_checkpoints_without_metrics=False
    )
    return ocp.training.Checkpointer(
        Path(folder).absolute(),
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(2), best]),
        cleanup_tmp_directories=True,
    )


def save_state(
    checkpoints: ocp.training.Checkpointer, state: TrainState, miou: float | None = None
) -> None:
    """Begins to write a state, which is copied first: the run may go on at once.

    Args:
        checkpoints: of `open_checkpoints`.
        state: all of it: parameters, optimiser, moving average, step. The batches and all that is
            by chance depend on the step alone.
        miou: how good it is, if that is known.
    """
    metrics = None if miou is None else {_METRIC: miou}
    step = int(state.step)
    if any(found.step == step for found in checkpoints.checkpoints):
        return
    checkpoints.save_async(step, _flat(state), force=True, metrics=metrics)


def load_state(
    checkpoints: ocp.training.Checkpointer, like: TrainState, *, best: bool = False
) -> TrainState | None:
    """The last state, or the best that is known, placed as `like` is; None if there is none.

    Raises:
        ValueError: if it is of another model, optimiser or table.
    """
    found = checkpoints.latest
    if best:
        rated = [c for c in checkpoints.checkpoints if c.metrics is not None]
        found = max(rated, key=lambda c: c.metrics[_METRIC], default=found)
    if found is None:
        return None
    expected = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _flat(like).items()
    }
    # First, since Orbax would say so of one array while it reads others.
    saved = checkpoints.metadata(found.step).metadata
    differing = [
        name
        for name in sorted(expected.keys() | saved.keys())
        if name not in expected
        or name not in saved
        or (expected[name].shape, expected[name].dtype) != (saved[name].shape, saved[name].dtype)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {checkpoints.directory / str(found.step)} does not fit this run; was "
            f"it made with other settings? {len(differing)} arrays differ, the first is "
            f"{differing[0]!r}"
        )
    flat = checkpoints.load(found.step, expected)
    return jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))


def not_finite(
    step: int,
    metrics: dict[str, float],
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
