"""Runs image encoders in OpenVINO, which is faster than XLA at them on a CPU."""

import contextlib
import hashlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

import sam_jax
from sam_jax.checkpoints.params import flat_params, param_shapes, params_sha256
from sam_jax.errors import needs_extra
from sam_jax.export.common import with_attention
from sam_jax.files import atomic_dir, cache_folder
from sam_jax.models.sam import ENCODERS, Sam
from sam_jax.types import Runtime

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def encoder_for(model: Sam, runtime: Runtime) -> "OpenVinoEncoder | None":
    """What runs the model's image encoder in a runtime other than JAX; None for JAX.

    Raises:
        ValueError: for an unknown runtime, or as `OpenVinoEncoder`.
        MissingExtra: without the extra `openvino`.
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime is {runtime!r}, expected one of {list(get_args(Runtime))}")
    return OpenVinoEncoder(model) if runtime == "openvino" else None


class OpenVinoEncoder:
    """A model's image encoder, exported to ONNX and compiled by OpenVINO for this CPU.

    It computes in the model's dtype. The export and OpenVINO's program are kept in sam_jax's cache
    folder (see `SAM_JAX_CACHE`), so that only the first process with these parameters makes them.

    Args:
        model: its current parameters are used.

    Raises:
        ValueError: if the model has other parameters than its configuration says, such as LoRA's
            adapters or an image encoder of your own.
        MissingExtra: without the extra `openvino`.
    """

    def __init__(self, model: Sam):
        openvino = import_openvino()
        # Shares the arrays with the model, but not the variables, which may change.
        graphdef, params = nnx.split(model)
        self._model = nnx.merge(graphdef, jax.tree.map(lambda array: array, params))
        dtype = np.dtype(model.mask_decoder.dtype)
        core = openvino.Core()
        with _exported(model) as path:
            core.set_property({"CACHE_DIR": str(path.parent)})
            precision = {"INFERENCE_PRECISION_HINT": PRECISION[dtype.name]}
            compiled = core.compile_model(path, "CPU", precision)
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()
        self._dtype = dtype

    def __reduce__(self):
        return OpenVinoEncoder, (self._model,)  # a program cannot be pickled

    def __call__(
        self, pixel_values: Float[np.ndarray, "b size size 3"]
    ) -> Float[np.ndarray, "b g g c"]:
        """What `Sam.encode_image` returns, as a numpy array."""
        found = []
        for pixels in np.asarray(pixel_values, np.float32):
            with self._lock:  # a request's tensors are its own
                (embedding,) = self._request.infer([pixels[None]]).values()
                found.append(embedding[0].astype(self._dtype))
        return np.stack(found)


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would send a message from a fork of this process."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        with needs_extra("openvino"):
            import openvino
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
    return openvino


@contextlib.contextmanager
def _exported(model: Sam) -> Iterator[Path]:
    """The encoder as a file, from the cache or, if that cannot be written to, for once."""
    folder = cache_folder() / "openvino" / _key(model)
    with contextlib.ExitStack() as stack:
        if not folder.exists():
            try:
                with contextlib.suppress(FileExistsError), atomic_dir(folder) as new:
                    _write(model, new / "encoder.onnx")
            except OSError:  # a full or read-only disk
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                _write(model, folder / "encoder.onnx")
        yield folder / "encoder.onnx"


def _key(model: Sam) -> str:
    """Changes with the encoder's parameters, the model's sizes, and the code that exports it."""
    encoder = type(model.image_encoder)
    if encoder not in ENCODERS.values():  # the key does not know another one's code
        raise ValueError(
            f"runtime is 'openvino', but the image encoder is a {encoder.__name__}, expected one "
            f"of {[known.__name__ for known in ENCODERS.values()]}; leave the runtime out"
        )
    params = flat_params(model)
    expected = param_shapes(model.config)
    if other := params.keys() ^ expected.keys():
        raise ValueError(
            f"runtime is 'openvino', but the model has other parameters than its configuration "
            f"says, such as {min(other)!r}; merge adapters, or leave the runtime out"
        )
    weights = {name: x for name, x in params.items() if name.startswith("image_encoder.")}
    found = hashlib.sha256(f"{params_sha256(weights)} {model.config} {jax.__version__}".encode())
    for path in sorted(Path(sam_jax.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _write(model: Sam, path: Path) -> None:
    with needs_extra("openvino"):
        from sam_jax.export.onnx_graph import Graph
    encoder = _in_float32(with_attention(model, "xla"))
    size = model.config.image_size
    graph, shape = Graph(), (1, size, size, 3)
    pixels = graph.input("pixel_values", shape)
    (embedding,) = graph.call(
        lambda pixels: (encoder.encode_image(pixels),),
        (pixels, jax.ShapeDtypeStruct(shape, jnp.float32)),
    )
    grid, channels = model.config.image_embedding_size, model.config.image_embedding_channels
    graph.save(path, {"image_embeddings": (embedding, (1, grid, grid, channels))})


def _in_float32(model: Sam) -> Sam:
    """The model with all parameters and computations in float32."""
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    for _, module in nnx.iter_modules(model):
        if "dtype" in vars(module):
            setattr(module, "dtype", jnp.float32)  # noqa: B010
    return model
