"""Segment Anything (SAM) in JAX and Flax NNX.

    from sam_jax import SamPredictor, from_pretrained

    predictor = SamPredictor(from_pretrained("mobile_sam"))
    predictor.set_image("photo.jpg")
    masks, scores, _ = predictor.predict(point_coords=[[450, 600]], point_labels=[1])

Where to read on: `models/sam.py` for the model (and its functional way in, for research),
`ops/` for the math, `checkpoints/names.py` for what each weight is called elsewhere.
"""

import lazy_loader

from sam_jax.idioms import ADVICE

__version__ = "0.1.0"

_public_name, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str):
    if name in ADVICE["sam_jax"]:  # `from sam_jax import name` would hide an AttributeError's text
        raise ImportError(f"sam_jax has no {name}; {ADVICE['sam_jax'][name]}")
    return _public_name(name)


def __dir__() -> list[str]:
    return __all__
