import inspect

import pytest
from everything import GRID, amg, generator

from sam_jax import SamAutomaticMaskGenerator


def test_arguments_match_meta():
    """Names, order and defaults match, also in the signature that `help` and notebooks show."""
    ours = ("hierarchical", "mesh", "runtime")  # keyword-only

    def arguments(generator):
        parameters = inspect.signature(generator).parameters
        return {name: p.default for name, p in parameters.items() if name not in ours}

    meta = amg.SamAutomaticMaskGenerator
    assert list(arguments(SamAutomaticMaskGenerator).items()) == list(arguments(meta).items())


def test_a_misspelled_option():
    with pytest.raises(TypeError, match=r"no option point_per_side; options are points_per_side, "):
        generator(point_per_side=4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"points_per_side": None, "point_grids": [GRID], "hierarchical": True},
            "hierarchical is for a regular grid: give points_per_side",
        ),
        ({"points_per_side": None}, "points_per_side is None and point_grids is None, expected"),
        ({"point_grids": [GRID]}, "points_per_side is 6 and point_grids is given, expected exact"),
        ({"points_per_side": 0}, "points_per_side is 0, expected a whole number of at least 1"),
        ({"points_per_side": 10**7}, "points_per_side is 10000000, expected .+ and at most 4096"),
        ({"points_per_batch": 0}, "points_per_batch is 0, expected a whole number of at least 1"),
        ({"points_per_batch": 1.5}, "points_per_batch is 1.5, expected a whole number"),
        ({"crop_n_layers": -1}, "crop_n_layers is -1, expected a whole number of at least 0"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor is 0, expected"),
        (
            {"crop_n_layers": 2, "crop_n_points_downscale_factor": 4},
            "points_per_side 6 over crop_n_points_downscale_factor 4 leaves no points for layer 2",
        ),
        ({"pred_iou_thresh": float("nan")}, "pred_iou_thresh is nan, expected a number"),
        ({"pred_iou_thresh": 88}, "pred_iou_thresh is 88, expected at most 2; IoUs are from 0 to"),
        ({"stability_score_thresh": 95}, "stability_score_thresh is 95, expected at most 1"),
        ({"crop_nms_thresh": 1.5}, "crop_nms_thresh is 1.5, expected an IoU, from 0 to 1"),
        ({"crop_n_layers": 7}, "crop_n_layers is 7, expected .* at least 0 and at most 6"),
        ({"box_nms_thresh": None}, "box_nms_thresh is None, expected a number"),
        ({"stability_score_offset": -1.0}, "stability_score_offset is -1.0, expected 0 or more"),
        ({"stability_score_offset": float("inf")}, "stability_score_offset is inf, expected 0 or"),
        ({"min_mask_region_area": -5}, "min_mask_region_area is -5, expected 0 or more"),
        ({"points_per_side": True}, "points_per_side is True, expected a whole number"),
        ({"points_per_side": None, "point_grids": 5}, "point_grids are 5, expected a list of arr"),
        (
            {"points_per_side": None, "point_grids": [[[1, 2], [3]]]},
            "point_grids are not lists of points",
        ),
        ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio is 1.0, expected 0 to below 1"),
        ({"output_mode": "png"}, "output_mode is 'png', expected one of binary_mask, uncompresse"),
        (
            {"points_per_side": None, "point_grids": [[[0.5, 1.5], [0.1, 0.1]]]},
            r"point_grids\[0\] holds \[0.5, 1.5\], expected x and y from 0 to 1",
        ),
        (
            {"points_per_side": None, "point_grids": [[[float("nan"), 0.5]]]},
            r"point_grids\[0\] holds \[nan, 0.5\], expected x and y from 0 to 1",
        ),
        ({"points_per_side": None, "point_grids": [[]]}, r"point_grids\[0\] has shape \(0,\)"),
        (
            {"points_per_side": None, "point_grids": [GRID], "crop_n_layers": 1},
            "there are 1 point_grids, expected 2: one for the whole image",
        ),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        generator(**options)
