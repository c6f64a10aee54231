"""Automatic mask generation ("everything mode"): of one image, and of many in a folder."""

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.hf_pipeline import MaskGenerationPipeline, pipeline
from sam_jax.automatic.options import MaskGenerationOptions

__all__ = [
    "MaskGenerationOptions",
    "MaskGenerationPipeline",
    "SamAutomaticMaskGenerator",
    "pipeline",
]
