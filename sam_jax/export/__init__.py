"""A model for programs without sam_jax: `jax.export` artefacts, or ONNX.

An artefact of `jax.export` is a program, not an archive: JAX promises to run it with its releases
of the next six months (and of the three weeks before). Keep the checkpoint.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
