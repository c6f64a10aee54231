import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batches import masks
from reference import normal, tensor
from torch_losses import torch_dice, torch_focal, torch_loss

from sam_jax.training.losses import (
    LossWeights,
    dice_loss,
    focal_loss,
    mask_iou,
    mask_losses,
    resize_logits,
    weighted_mean,
)

# PyTorch computes in float64: in float32, the plain formulas lose digits of 1 - p.


def relative(actual, expected):
    expected = expected.detach().numpy()
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("ours", "theirs"), [(focal_loss, torch_focal), (dice_loss, torch_dice)])
def test_losses_and_gradients_match_the_paper(ours, theirs):
    logits, targets = normal((3, 2, 32, 32), scale=4.0), masks((3, 2, 32, 32), 1)
    expected = tensor(logits).double().requires_grad_()
    loss = theirs(expected, tensor(targets).double())
    loss.sum().backward()
    assert relative(jax.jit(ours)(logits, targets), loss) <= 1e-6
    gradient = jax.jit(jax.grad(lambda x: ours(x, targets).sum()))(logits)
    assert relative(gradient, expected.grad) <= 1e-6


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_losses_of_extreme_logits_are_finite(scale):
    logits, targets = normal((2, 16, 16), scale=scale), masks((2, 16, 16), 1)
    for loss in (focal_loss, dice_loss):
        both = jax.jit(jax.value_and_grad(lambda x, f=loss: f(x, targets).sum()))
        value, gradient = both(logits)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_total_loss_and_gradients_match_the_paper():
    logits, scores = normal((5, 4, 32, 32), scale=3.0), normal((5, 4), 2)
    targets = masks((5, 32, 32), 3)
    first = np.arange(4) == 0
    candidates = np.where(np.array([1, 0, 1, 0, 0], bool)[:, None], first, ~first)
    theirs = [tensor(x).double().requires_grad_() for x in (logits, scores)]
    expected = torch_loss(*theirs, tensor(targets).double(), tensor(candidates))
    expected.sum().backward()

    def total(logits, scores):
        return mask_losses(logits, scores, targets, jnp.asarray(candidates)).total

    assert relative(jax.jit(total)(logits, scores), expected) <= 1e-6
    gradients = jax.jit(jax.grad(lambda *x: total(*x).sum(), (0, 1)))(logits, scores)
    for gradient, reference in zip(gradients, theirs, strict=True):
        assert relative(gradient, reference.grad) <= 1e-6


def test_only_the_best_candidate_is_pulled():
    logits, targets = normal((3, 16, 16)), masks((16, 16), 0)
    losses_of = jax.jit(mask_losses)
    gradient = jax.jit(jax.grad(lambda x: mask_losses(x, jnp.zeros(3), targets).total))(logits)
    pulled = np.abs(gradient).max((1, 2)) > 0
    assert pulled.sum() == 1
    each = [float(losses_of(logits[i : i + 1], jnp.zeros(1), targets).focal) for i in range(3)]
    focal_alone = functools.partial(mask_losses, weights=LossWeights(1.0, 0.0, 0.0))
    best = jax.jit(focal_alone)(logits, jnp.zeros(3), targets)
    assert float(best.focal) == pytest.approx(min(each))


def test_iou_of_masks():
    target = np.zeros((4, 4), np.float32)
    target[:2] = 1
    logits = np.full((4, 4), -1.0, np.float32)
    logits[:, :2] = 1
    assert jax.jit(mask_iou)(jnp.asarray(logits), jnp.asarray(target)) == pytest.approx(4 / 12)
    assert mask_iou(jnp.full((4, 4), -1.0), jnp.zeros((4, 4))) == 1  # as in evaluation
    losses = jax.jit(mask_losses)(
        jnp.stack([logits, 2 * target - 1]), jnp.array([0.9, 0.1]), jnp.asarray(target)
    )
    # The IoU is of the mask that a user would see: the one that the model scores highest.
    assert float(losses.mask_iou) == pytest.approx(4 / 12)


def test_targets_of_another_resolution():
    logits, targets = normal((2, 3, 8, 8)), masks((2, 32, 32), 1)
    resized = torch.nn.functional.interpolate(
        tensor(logits), (32, 32), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize_logits(logits, 32), resized, atol=1e-6)
    low = jax.jit(mask_losses)(logits, jnp.zeros((2, 3)), targets)
    full = jax.jit(mask_losses)(jnp.asarray(resized), jnp.zeros((2, 3)), targets)
    np.testing.assert_allclose(low.total, full.total, rtol=1e-6)


def test_weighted_mean():
    values = jnp.array([1.0, 3.0, jnp.nan])
    assert weighted_mean(values, jnp.array([1.0, 1.0, 0.0])) == 2
    assert weighted_mean(values, jnp.zeros(3)) == 0
    assert np.isfinite(
        jax.grad(lambda v: weighted_mean(v, jnp.array([1.0, 1.0, 0.0])))(values)
    ).all()
