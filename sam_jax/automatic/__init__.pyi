from .generator import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
from .hf_pipeline import MaskGenerationPipeline as MaskGenerationPipeline
from .hf_pipeline import pipeline as pipeline
from .options import MaskGenerationOptions as MaskGenerationOptions
