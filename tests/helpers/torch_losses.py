"""The losses of SAM's paper in PyTorch."""

import torch


def torch_focal(logits, targets, alpha=0.25, gamma=2):
    """Lin et al. 2017, equation 5."""
    p = torch.sigmoid(logits)
    p_t = torch.where(targets > 0.5, p, 1 - p)
    alpha_t = torch.where(targets > 0.5, alpha, 1 - alpha)
    return (-alpha_t * (1 - p_t) ** gamma * torch.log(p_t)).mean((-2, -1))


def torch_dice(logits, targets):
    """Milletari et al. 2016 with 1 added to both sides of the fraction, as in MaskFormer."""
    p = torch.sigmoid(logits)
    numerator = 2 * (p * targets).sum((-2, -1)) + 1
    return 1 - numerator / (p.sum((-2, -1)) + targets.sum((-2, -1)) + 1)


def torch_iou(logits, targets):
    on, targets = logits > 0, targets > 0.5
    union = (on | targets).sum((-2, -1))
    return (on & targets).sum((-2, -1)) / union.clamp(min=1)


def torch_loss(logits, scores, targets, candidates):
    """The paper: 20 focal + dice of the best candidate, and the squared error of the IoUs."""
    targets = torch.nn.functional.interpolate(targets[:, None], logits.shape[-2:])
    targets = targets.expand(logits.shape)
    mask = 20 * torch_focal(logits, targets) + torch_dice(logits, targets)
    best = torch.where(candidates, mask, torch.inf).min(-1).values
    error = (scores - torch_iou(logits, targets)) ** 2
    return best + (error * candidates).sum(-1) / candidates.sum(-1)
