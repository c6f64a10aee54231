"""The options of automatic mask generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np

from sam_jax.errors import check_bool, check_number, check_whole
from sam_jax.ops.boxes import build_point_grid
from sam_jax.types import OutputMode

_MOST_PER_SIDE = 4096  # 16 million points, whose grid is 268 MB
_MOST_LAYERS = 6  # 5,461 crops


@dataclass(frozen=True)
class MaskGenerationOptions:
    """Options of automatic mask generation, with the names, order and defaults of Meta's.

    Raises:
        ValueError: for an invalid value; the message names the option.
    """

    points_per_side: int | None = 32
    """Points along one side of the image; the grid has as many squared. None with point_grids."""
    points_per_batch: int = 64
    """Points decoded per call. On a GPU or TPU, more points need more memory; a CPU always decodes
    two at a time. Float32 results do not depend on it; with bfloat16, whose rounding depends on the
    batch, a few masks at the thresholds may differ."""
    pred_iou_thresh: float = 0.88
    """A mask's predicted IoU must be larger; 0 keeps all masks."""
    stability_score_thresh: float = 0.95
    """A mask's stability must be at least this; 0 keeps all masks. Stability is the IoU of the mask
    at a higher and at a lower threshold of the logits."""
    stability_score_offset: float = 1.0
    """Distance of these two thresholds from the mask threshold; not negative."""
    box_nms_thresh: float = 0.7
    """IoU threshold of the box NMS; the mask with the highest predicted IoU wins."""
    crop_n_layers: int = 0
    """Crop layers to segment in addition to the image: 2^i x 2^i crops in layer i."""
    crop_nms_thresh: float = 0.7
    """IoU threshold of the box NMS between crops; the mask of the smaller crop wins."""
    crop_overlap_ratio: float = 512 / 1500
    """Overlap of the first layer's crops, as a fraction of the image's shorter side; below 1."""
    crop_n_points_downscale_factor: int = 1
    """Points per side are divided by this factor to the power of i in crop layer i."""
    point_grids: Sequence[Any] | None = None
    """Points [n, 2] for the image and for each crop layer, x and y from 0 to 1; instead of
    points_per_side."""
    min_mask_region_area: float = 0
    """Fill holes and remove islands of fewer pixels; 0 leaves masks as they are."""
    output_mode: OutputMode = "binary_mask"
    """How a record holds its mask: "binary_mask", a boolean array; "uncompressed_rle", COCO's run
    lengths as a list; "coco_rle", as pycocotools' string."""
    hierarchical: bool = field(default=False, kw_only=True)
    """Measure a quarter of the grid first, and skip points if all measured neighbors have the same
    masks around them. Faster, but masks of objects smaller than the grid's distance get lost."""

    def __post_init__(self):
        if (self.points_per_side is None) == (self.point_grids is None):
            raise ValueError(
                f"points_per_side is {self.points_per_side} and point_grids is "
                f"{'None' if self.point_grids is None else 'given'}, expected exactly one of them"
            )
        for option in fields(self):
            if option.type is float:
                check_number(option.name, getattr(self, option.name))
        for name in ("stability_score_offset", "min_mask_region_area"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        # Predicted IoUs may exceed 1 a little; stabilities may not.
        for name, most in (("pred_iou_thresh", 2), ("stability_score_thresh", 1)):
            if getattr(self, name) > most:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected at most {most}; IoUs are from 0 "
                    "to 1, not percent"
                )
        for name in ("box_nms_thresh", "crop_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected an IoU, from 0 to 1")
        check_whole("points_per_batch", self.points_per_batch, 1)
        check_whole("crop_n_layers", self.crop_n_layers, 0, _MOST_LAYERS)
        check_whole("crop_n_points_downscale_factor", self.crop_n_points_downscale_factor, 1)
        if not 0 <= self.crop_overlap_ratio < 1:
            raise ValueError(
                f"crop_overlap_ratio is {self.crop_overlap_ratio}, expected 0 to below 1"
            )
        if self.output_mode not in get_args(OutputMode):
            raise ValueError(
                f"output_mode is {self.output_mode!r}, expected one of "
                f"{', '.join(get_args(OutputMode))}"
            )
        check_bool("hierarchical", self.hierarchical)
        if self.hierarchical and self.points_per_side is None:
            raise ValueError("hierarchical is for a regular grid: give points_per_side")
        self.grids()

    def grids(self) -> list[np.ndarray]:
        """Points [n, 2] from 0 to 1 for the image and for each crop layer."""
        layers = self.crop_n_layers + 1
        if self.point_grids is not None:
            return _check_grids(self.point_grids, layers)
        check_whole("points_per_side", self.points_per_side, 1, _MOST_PER_SIDE)
        factor = self.crop_n_points_downscale_factor
        sides = [int(self.points_per_side / factor**i) for i in range(layers)]
        if 0 in sides:
            raise ValueError(
                f"points_per_side {self.points_per_side} over crop_n_points_downscale_factor "
                f"{factor} leaves no points for layer {sides.index(0)}"
            )
        return [build_point_grid(side) for side in sides]


def _check_grids(grids: Sequence[Any], layers: int) -> list[np.ndarray]:
    from sam_jax.arrays import as_numpy  # imports JAX, which would slow down `--help`

    if not hasattr(grids, "__len__"):
        raise ValueError(f"point_grids are {grids!r}, expected a list of arrays [n, 2]")
    if len(grids) != layers:
        raise ValueError(
            f"there are {len(grids)} point_grids, expected {layers}: one for the whole image "
            "and one for each of the crop_n_layers"
        )
    try:
        grids = [as_numpy(grid, "point_grids").astype(np.float64) for grid in grids]
    except (ValueError, TypeError) as error:
        raise ValueError(f"point_grids are not lists of points (x, y): {error}") from error
    for i, grid in enumerate(grids):
        if grid.ndim != 2 or grid.shape[1] != 2 or not len(grid):
            raise ValueError(f"point_grids[{i}] has shape {grid.shape}, expected (n, 2)")
        inside = (grid >= 0) & (grid <= 1)
        if not inside.all():
            raise ValueError(
                f"point_grids[{i}] holds {grid[~inside.all(axis=1)][0].tolist()}, expected x and y "
                "from 0 to 1, as fractions of the image"
            )
    return grids
