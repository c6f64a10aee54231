import numpy as np
import pytest

from sam_jax.evaluation import iou


def test_pairs_of_masks():
    masks = np.zeros((4, 2, 3), bool)
    others = masks.copy()
    masks[0, 0] = others[0, 0, 1:] = True  # 2 of 3
    masks[1] = others[1] = True
    masks[2, 0] = others[2, 1] = True  # apart; the last two are empty
    np.testing.assert_allclose(iou(masks, others), [2 / 3, 1, 0, 1])


@pytest.mark.usefixtures("unchecked")
def test_only_masks_of_one_shape_are_compared():
    mask = np.ones((4, 6), bool)
    for other in (mask.astype(np.uint8), mask[:1], mask[0]):
        with pytest.raises(ValueError, match=r"expected two arrays of bool of one shape"):
            iou(mask, other)
