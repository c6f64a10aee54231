import numpy as np

from sam_jax.evaluation import iou


def test_pairs_of_masks():
    masks = np.zeros((4, 2, 3), bool)
    others = masks.copy()
    masks[0, 0] = others[0, 0, 1:] = True  # 2 of 3
    masks[1] = others[1] = True
    masks[2, 0] = others[2, 1] = True  # apart; the last two are empty
    np.testing.assert_allclose(iou(masks, others), [2 / 3, 1, 0, 1])
