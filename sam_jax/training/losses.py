"""The losses that SAM was trained with (paper, section 3 and appendix A).

All take logits [..., h, w] and targets of the same size, from 0 to 1, and keep the leading axes;
callers average over prompts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from sam_jax.ops.resize import linear_resize_matrix, resize_masks

_ALPHA, _GAMMA = 0.25, 2.0  # Lin et al. 2017, as in MaskFormer, whose losses SAM uses


class LossWeights(NamedTuple):
    """Weights of the loss's parts: the paper's 20 : 1 : 1."""

    focal: float = 20.0
    """Weight of the focal loss."""
    dice: float = 1.0
    """Weight of the dice loss."""
    iou: float = 1.0
    """Weight of the loss of the predicted IoUs."""


class MaskLosses(NamedTuple):
    """The losses of prompts, and the IoUs of their masks."""

    total: Float[Array, "*batch"]
    """The weighted sum."""
    focal: Float[Array, "*batch"]
    """Focal loss of the candidate with the lowest mask loss."""
    dice: Float[Array, "*batch"]
    """Dice loss of the same candidate."""
    iou: Float[Array, "*batch"]
    """Loss of the predicted IoUs of all candidates."""
    mask_iou: Float[Array, "*batch"]
    """IoU of the candidate with the highest predicted IoU."""


def focal_loss(
    logits: Float[Array, "*batch h w"], targets: Float[Array, "*batch h w"]
) -> Float[Array, "*batch"]:
    """Sigmoid focal loss (Lin et al. 2017, alpha 0.25, gamma 2), averaged over pixels."""
    loss = optax.losses.sigmoid_focal_loss(logits, targets, alpha=_ALPHA, gamma=_GAMMA)
    return loss.mean((-2, -1))


def dice_loss(
    logits: Float[Array, "*batch h w"], targets: Float[Array, "*batch h w"]
) -> Float[Array, "*batch"]:
    """1 - (2 p t + 1) / (p + t + 1), each summed over pixels (Milletari et al. 2016)."""
    # optax halves both sides of the fraction, its smoothing term among them.
    axes: Any = (-3, -2)  # as documented; the annotation allows only one axis
    return optax.losses.dice_loss(logits[..., None], targets[..., None], smooth=0.5, axis=axes)


def mask_iou(
    logits: Float[Array, "*batch h w"], targets: Float[Array, "*batch h w"]
) -> Float[Array, "*batch"]:
    """IoU of the masks (logits > 0) and the targets; 1 if both are empty, as in evaluation."""
    masks, targets = logits > 0, targets > 0.5
    intersection = (masks & targets).sum((-2, -1)).astype(jnp.float32)
    union = (masks | targets).sum((-2, -1)).astype(jnp.float32)
    return jnp.where(union > 0, intersection / jnp.maximum(union, 1), 1)


def mask_losses(
    logits: Float[Array, "*batch m h w"],
    iou_scores: Float[Array, "*batch m"],
    targets: Float[Array, "*batch height width"],
    candidates: Bool[Array, "*batch m"] | None = None,
    weights: LossWeights = LossWeights(),  # noqa: B008
) -> MaskLosses:
    """The paper's loss of prompts with m candidate masks each.

    The mask loss is that of the best candidate: only this one is trained towards the target, so
    that others can stand for a part or the whole. The predicted IoUs of all candidates are trained,
    since ranking needs all of them.

    Args:
        logits: of the candidates; resized to the targets' size if needed.
        iou_scores: the candidates' predicted IoUs.
        targets: the true masks, 0 to 1.
        candidates: which of the m count; all if left out. Each prompt needs at least one.
        weights: weights of the parts.
    """
    if candidates is None:
        candidates = jnp.ones(iou_scores.shape, bool)
    logits = resize_logits(logits, targets.shape[-1])
    targets = jnp.broadcast_to(targets[..., None, :, :], logits.shape).astype(logits.dtype)
    focal, dice = focal_loss(logits, targets), dice_loss(logits, targets)
    actual = jax.lax.stop_gradient(mask_iou(logits, targets))
    iou = jnp.square(iou_scores - actual)

    def of(candidate, values):
        return jnp.take_along_axis(values, candidate[..., None], axis=-1)[..., 0]

    mask_loss = weights.focal * focal + weights.dice * dice
    best = jnp.where(candidates, mask_loss, jnp.inf).argmin(-1)
    predicted_best = jnp.where(candidates, iou_scores, -jnp.inf).argmax(-1)
    iou = jnp.where(candidates, iou, 0).sum(-1) / candidates.sum(-1, dtype=iou.dtype)
    return MaskLosses(
        total=of(best, mask_loss) + weights.iou * iou,
        focal=of(best, focal),
        dice=of(best, dice),
        iou=iou,
        mask_iou=of(predicted_best, actual),
    )


def resize_logits(logits: Float[Array, "*batch h w"], size: int) -> Float[Array, "*batch h2 w2"]:
    """Resizes square logits bilinearly, like `torch.nn.functional.interpolate`."""
    if logits.shape[-1] == size:
        return logits
    matrix = jnp.asarray(linear_resize_matrix(logits.shape[-1], size), jnp.float32)
    return resize_masks(logits, matrix, matrix)


def weighted_mean(values: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Array:
    """The weighted mean; 0 if all weights are 0. Values with weight 0 need not be finite."""
    values = jnp.where(weights > 0, values, 0)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)
