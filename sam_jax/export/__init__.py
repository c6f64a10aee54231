"""A model for programs without sam_jax: `jax.export` artefacts, or ONNX.

An artefact of `jax.export` is a program, not an archive: JAX promises to run it with its releases
of the next six months (and of the three weeks before). Keep the checkpoint.
"""

from sam_jax.export.to_jax import Platform, export_jax
from sam_jax.export.to_onnx import export_onnx

__all__ = ["Platform", "export_jax", "export_onnx"]
