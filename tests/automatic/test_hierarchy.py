import numpy as np
import pytest
import skimage.data
from everything import assert_same_records, generator, random_image, small
from reference import mask_iou

from sam_jax import SamAutomaticMaskGenerator, from_pretrained
from sam_jax.automatic.hierarchy import grid_levels, points_to_measure
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop
from sam_jax.automatic.selection import Candidates
from sam_jax.ops.boxes import build_point_grid
from sam_jax.predictor import SamPredictor

OPTIONS = MaskGenerationOptions(points_per_side=5, hierarchical=True)
GRID = build_point_grid(5)
ALL, LEFT, RIGHT = (0, 0, 200, 100), (0, 0, 102, 100), (98, 0, 200, 100)


def crop(box=ALL):
    return Crop((100, 200), box, GRID, None, None, [])


def known(boxes, passed=True):
    """The masks of the first level's nine points: one or two for each."""
    points = grid_levels(GRID, OPTIONS)[0]
    boxes = np.array([[b] if np.ndim(b) == 1 else b for b in boxes])
    passed = np.broadcast_to(passed, boxes.shape[:2])
    iou = np.ones(boxes.shape[:2], np.float32)
    return [Candidates(points, iou, iou, boxes, passed)]


def test_levels():
    first, second, third = grid_levels(GRID, OPTIONS)
    assert first.tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert second.tolist() == [6, 8, 16, 18]
    assert third.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    (every,) = grid_levels(GRID, MaskGenerationOptions(points_per_side=5))
    assert every.tolist() == list(range(25))


def test_points_whose_neighbors_have_the_same_masks_are_skipped():
    _, second, third = grid_levels(GRID, OPTIONS)
    # The last column is another object.
    two = known([LEFT, LEFT, RIGHT] * 3)
    assert points_to_measure(second, crop(), two, OPTIONS).tolist() == [8, 18]
    assert points_to_measure(third, crop(), two, OPTIONS).tolist() == [3, 13, 23]
    assert len(points_to_measure(second, crop(), known([ALL] * 9), OPTIONS)) == 0
    assert points_to_measure(second, crop(), [], OPTIONS).tolist() == second.tolist()
    assert len(points_to_measure(second[:0], crop(), two, OPTIONS)) == 0  # of a grid of one point


@pytest.mark.parametrize(
    ("boxes", "passed"),
    [
        pytest.param([ALL] * 9, [[k != 4] for k in range(9)], id="a neighbor without masks"),
        pytest.param([(0, 0, 75, 30)] * 9, True, id="a mask that is elsewhere"),
        pytest.param(
            [[ALL, LEFT]] * 4 + [[ALL, ALL]] + [[ALL, LEFT]] * 4, True, id="one more mask"
        ),
        pytest.param([ALL] * 4 + [(30, 0, 170, 70)] + [ALL] * 4, True, id="a smaller mask"),
    ],
)
def test_points_that_are_measured(boxes, passed):
    """Point 18, at (140, 70), with the center 12 and the corner 24 among its neighbors."""
    measured = points_to_measure(np.array([18]), crop(), known(boxes, passed), OPTIONS)
    assert measured.tolist() == [18]


def test_masks_that_are_duplicates_are_the_same():
    near = known([ALL] * 4 + [(20, 0, 200, 100)] + [ALL] * 4)  # IoU 0.9
    assert len(points_to_measure(np.array([18]), crop(), near, OPTIONS)) == 0
    strict = MaskGenerationOptions(points_per_side=5, hierarchical=True, box_nms_thresh=0.95)
    assert len(points_to_measure(np.array([18]), crop(), near, strict)) == 1


def test_boxes_of_a_crop_are_those_of_the_image():
    shifted = crop((100, 0, 200, 100))  # whose point 6 is at (130, 30)
    around = known([(100, 0, 160, 60)] * 9)
    assert len(points_to_measure(np.array([6]), shifted, around, OPTIONS)) == 0
    assert len(points_to_measure(np.array([6]), shifted, known([(0, 0, 60, 60)] * 9), OPTIONS)) == 1


def steps_and_records(**options):
    """The numbers of batches and totals that are reported, and the records."""
    predictor = SamPredictor(small()[1])
    predictor.set_image(random_image(70, 110))
    steps, embedding = [], predictor.get_image_embedding()
    records = generator(points_per_batch=4, **options).generate_from_embedding(
        embedding, predictor.original_size, on_batch=lambda *step: steps.append(step)
    )
    return steps[: steps[-1][0]], records


def test_without_points_to_skip_the_records_are_the_same():
    """`box_nms_thresh` is 0.99, and random weights give no masks that similar."""
    steps, records = steps_and_records(hierarchical=True)
    assert steps == [(i, 11) for i in range(1, 12)]  # 9, 9 and 18 points
    assert_same_records(records, steps_and_records()[1], exact=True)


def test_skipped_points_save_batches():
    """Every point finds the whole image, so the edges of the grid are all that is left."""
    whole = {"stability_score_thresh": 0.5, "stability_score_offset": 0, "box_nms_thresh": 0.5}
    steps, records = steps_and_records(hierarchical=True, **whole)
    assert steps == [(1, 11), (2, 11), (3, 11), (4, 9), (5, 5)]
    assert len(records) == 1
    assert_same_records(records, steps_and_records(**whole)[1])


@pytest.mark.slow
@pytest.mark.usefixtures("mobile_sam_file")
def test_masks_of_a_photo():
    """With fewer points, it finds nearly all masks of the full grid, and no others."""
    model, image = from_pretrained("mobile_sam"), skimage.data.coffee()
    full, coarse = (
        SamAutomaticMaskGenerator(model, points_per_side=12, hierarchical=hierarchical)
        for hierarchical in (False, True)
    )
    expected, actual = full.generate(image), coarse.generate(image)
    ious = [[mask_iou(a["segmentation"], e["segmentation"]) for e in expected] for a in actual]
    assert np.max(ious, axis=1).min() > 0.9
    assert (np.max(ious, axis=0) > 0.9).mean() > 0.8
