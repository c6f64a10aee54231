"""Prompts for small models."""

import dataclasses

import numpy as np
import torch
from reference import (
    SMALL,
    normal,
)

SMALL_HF = dataclasses.replace(
    SMALL, mask_decoder=dataclasses.replace(SMALL.mask_decoder, layer_norm_eps=1e-6)
)


RNG = np.random.default_rng(0)


POINTS = RNG.uniform(0, 96, size=(2, 3, 4, 2)).astype(np.float32)  # two images, three prompts each


LABELS = RNG.integers(0, 2, size=(2, 3, 4)).astype(np.int32)


BOXES = np.concatenate([POINTS[:, :, 0] / 2, 48 + POINTS[:, :, 1] / 2], axis=-1)


MASKS = np.asarray(normal((2, 3, 48, 48), seed=1, scale=4))


def torch_inputs(inputs):
    return {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}


PROMPTS = {
    "points": {"input_points": POINTS, "input_labels": LABELS},
    "points_without_labels": {"input_points": POINTS},
    "boxes": {"input_boxes": BOXES},
    "points_and_boxes": {"input_points": POINTS, "input_labels": LABELS, "input_boxes": BOXES},
    "mask_per_image": {
        "input_points": POINTS,
        "input_labels": LABELS,
        "input_masks": MASKS[:, :1],
    },
    "mask_alone": {"input_masks": MASKS[:, :1]},
    "nothing": {},
    "single_mask": {"input_boxes": BOXES, "multimask_output": False},
}
