"""The options of automatic mask generation, and their checks."""

import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from sam_jax.arrays import as_numpy
from sam_jax.ops.boxes import (
    build_point_grid,
)

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]


def check_arguments(
    *,
    points_per_side: int | None = 32,
    points_per_batch: int = 64,
    crop_n_layers: int = 0,
    crop_n_points_downscale_factor: int = 1,
    crop_overlap_ratio: float = 512 / 1500,
    point_grids: Sequence[Any] | None = None,
    output_mode: OutputMode = "binary_mask",
    **others: float,
) -> list[np.ndarray]:
    """Checks arguments of `SamAutomaticMaskGenerator`, without a model; the grids that they mean.

    Raises:
        ValueError: for what cannot be; the message says which.
    """
    if (points_per_side is None) == (point_grids is None):
        raise ValueError(
            f"points_per_side is {points_per_side} and point_grids is "
            f"{'None' if point_grids is None else 'given'}, expected exactly one of them"
        )
    _check_numbers(crop_overlap_ratio=crop_overlap_ratio, **others)
    if others.get("stability_score_offset", 1.0) < 0:
        raise ValueError(
            f"stability_score_offset is {others['stability_score_offset']}, expected 0 or more"
        )
    _check_at_least(1, points_per_batch=points_per_batch)
    _check_at_least(0, crop_n_layers=crop_n_layers)
    _check_at_least(1, crop_n_points_downscale_factor=crop_n_points_downscale_factor)
    if not 0 <= crop_overlap_ratio < 1:
        raise ValueError(f"crop_overlap_ratio is {crop_overlap_ratio}, expected 0 to below 1")
    if output_mode not in get_args(OutputMode):
        raise ValueError(
            f"output_mode is {output_mode!r}, expected one of {', '.join(get_args(OutputMode))}"
        )
    if point_grids is None:
        _check_at_least(1, points_per_side=points_per_side)
        sides = [
            int(points_per_side / crop_n_points_downscale_factor**i)
            for i in range(crop_n_layers + 1)
        ]
        if 0 in sides:
            raise ValueError(
                f"points_per_side {points_per_side} over crop_n_points_downscale_factor "
                f"{crop_n_points_downscale_factor} leaves no points for layer {sides.index(0)}"
            )
        point_grids = [build_point_grid(n) for n in sides]
    return _check_grids(point_grids, crop_n_layers + 1)


def _check_numbers(**arguments: Any) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or np.isnan(value):
            raise ValueError(f"{name} is {value!r}, expected a number")


def _check_at_least(least: int, **arguments: Any) -> None:
    for name, value in arguments.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")


def _check_grids(grids: Sequence[Any], layers: int) -> list[np.ndarray]:
    if not hasattr(grids, "__len__"):
        raise ValueError(f"point_grids are {grids!r}, expected a list of arrays [n, 2]")
    if len(grids) != layers:
        raise ValueError(
            f"there are {len(grids)} point_grids, expected {layers}: one for the whole picture "
            "and one for each of the crop_n_layers"
        )
    try:
        grids = [as_numpy(grid, "point_grids").astype(np.float64) for grid in grids]
    except (ValueError, TypeError) as error:
        raise ValueError(f"point_grids hold no lists of points (x, y): {error}") from error
    for i, grid in enumerate(grids):
        if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
            raise ValueError(f"point_grids[{i}] has shape {grid.shape}, expected (n, 2)")
        inside = (grid >= 0) & (grid <= 1)
        if not inside.all():
            raise ValueError(
                f"point_grids[{i}] holds {grid[~inside.all(axis=1)][0].tolist()}, expected x and y "
                "from 0 to 1, as fractions of the picture"
            )
    return grids
