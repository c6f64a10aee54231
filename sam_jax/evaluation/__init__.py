"""Evaluation: how good the masks of a model are."""

from sam_jax.evaluation.clicks import draw_clicks, evaluate
from sam_jax.evaluation.metrics import iou

__all__ = ["draw_clicks", "evaluate", "iou"]
