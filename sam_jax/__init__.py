"""Segment Anything (SAM) in JAX and Flax NNX.

    from sam_jax import SamPredictor, from_pretrained

    predictor = SamPredictor(from_pretrained("mobile_sam"))
    predictor.set_image("photo.jpg")
    masks, scores, _ = predictor.predict(point_coords=[[450, 600]], point_labels=[1])

Where to read on: `models/sam.py` for the model (and its functional way in, for research),
`ops/` for the maths, `checkpoints/torch_names.py` for what each weight is called elsewhere.
"""

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.hf_pipeline import pipeline
from sam_jax.checkpoints import CheckpointError, from_pretrained, save_pretrained
from sam_jax.config import SamConfig
from sam_jax.idioms import ADVICE
from sam_jax.image import load_image
from sam_jax.models.sam import Sam
from sam_jax.predictor import SamPredictor
from sam_jax.processing import SamProcessor

__all__ = [
    "CheckpointError",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamPredictor",
    "SamProcessor",
    "__version__",
    "from_pretrained",
    "load_image",
    "pipeline",
    "save_pretrained",
]

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ADVICE["sam_jax"]:  # `from sam_jax import name` would hide an AttributeError's text
        raise ImportError(f"sam_jax has no {name}; {ADVICE['sam_jax'][name]}")
    raise AttributeError(f"module 'sam_jax' has no attribute {name!r}")
