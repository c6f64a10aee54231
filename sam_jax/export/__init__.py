"""Exports a model for programs without sam_jax: as `jax.export` artifacts, or as ONNX.

A `jax.export` artifact is not an archive: JAX guarantees that releases of the next six months (and
of the three weeks before) can run it. Keep the checkpoint.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
