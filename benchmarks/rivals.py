"""PyTorch's encoder and decoder in the fastest CPU runtimes: ONNX Runtime and OpenVINO.

`in_runtime` exports a module with PyTorch's own exporter and returns one that runs the export. It
can replace the original in Meta's predictor and mask generator.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_jax.export.openvino import PRECISION, import_openvino


def run_file(path: Path, runtime: str, dtype: str) -> Callable[..., list[np.ndarray]]:
    """A function that runs an ONNX file, computing in a dtype, which ONNX Runtime ignores."""
    if runtime == "OpenVINO":
        precision = {"INFERENCE_PRECISION_HINT": PRECISION[dtype]}
        request = (
            import_openvino().Core().compile_model(path, "CPU", precision).create_infer_request()
        )
        return lambda *arrays: [np.array(x) for x in request.infer(list(arrays)).values()]
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [declared.name for declared in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


class InRuntime(torch.nn.Module):
    """A module whose `forward` runs its export."""

    def __init__(self, run: Callable[..., list[np.ndarray]], like: torch.nn.Module):
        super().__init__()
        self.run = run
        self.img_size = getattr(like, "img_size", None)  # Meta's `Sam` reads it

    def forward(self, *tensors: torch.Tensor, **named: Any) -> Any:
        """The exported function's outputs in float32; arguments that are not tensors are fixed."""
        given = [*tensors, *(x for x in named.values() if isinstance(x, torch.Tensor))]
        outputs = self.run(*(x.float().numpy() for x in given))
        found = tuple(map(torch.from_numpy, outputs))
        return found if len(found) > 1 else found[0]


def in_runtime(
    module: torch.nn.Module,
    examples: Sequence[torch.Tensor],
    runtime: str,
    dtype: str,
    *,
    batched: Sequence[int] = (),
    **fixed: Any,
) -> InRuntime:
    """Exports a module, and returns one that runs the export in a runtime.

    Args:
        module: to export.
        examples: its arguments in their order, tensors.
        runtime: "ONNX Runtime" or "OpenVINO".
        dtype: the dtype to compute in.
        batched: which of the arguments have a leading axis of any length.
        **fixed: its other arguments.
    """

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *tensors):
            return self.module(*tensors, **fixed)

    names = [f"input_{i}" for i in range(len(examples))]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about tracing and the old exporter
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            Fixed().eval(),
            tuple(examples),
            str(path),
            input_names=names,
            dynamic_axes={names[i]: {0: "count"} for i in batched},
            opset_version=17,
            dynamo=False,  # dynamo's graphs are slower here, and need another package
        )
        return InRuntime(run_file(path, runtime, dtype), module)
