"""The named choices of options and arguments."""

from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]  # of the computation
Runtime = Literal["jax", "openvino"]  # of the image encoder
Platform = Literal["cpu", "cuda", "rocm", "tpu"]  # JAX's names
OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]  # of a record's mask
ResultsFormat = Literal["png", "coco"]
Segmentation = Literal["rle", "polygons"]  # of COCO's annotations
OnBadAnnotation = Literal["raise", "skip"]
"""Whether bad annotations stop a run, or are left out with a warning."""
