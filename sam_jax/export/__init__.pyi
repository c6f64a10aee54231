from .to_jax import export_jax as export_jax
from .to_onnx import export_onnx as export_onnx
