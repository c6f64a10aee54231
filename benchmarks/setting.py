"""The setting that all contenders of `benchmarks.run` get, and PyTorch if it is available."""

import functools
import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import in_pytorch, model_of
from sam_jax.models.sam import Sam

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("convert", "tests/helpers"))
ALONE = ""  # or the reason why only sam_jax runs
try:
    import torch
    from torch_losses import torch_loss
    from torch_reference import hf_mask_generation, import_reference

    from benchmarks import rivals

    for package in ("segment_anything", "mobile_sam"):
        import_reference(package)
except ImportError as error:
    rivals = torch = torch_loss = hf_mask_generation = import_reference = None
    ALONE = str(error)
if torch and os.environ.get("JAX_PLATFORMS") == "cuda" and not torch.cuda.is_available():
    torch, ALONE = None, "PyTorch has no CUDA here"

RUNTIMES = "ONNX Runtime", "OpenVINO"  # of `benchmarks.rivals`
Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    """The arguments of a part."""

    name: str  # of the model
    device: str  # PyTorch's name
    dtype: str
    batch: int  # images
    compiled: bool  # also run PyTorch's contenders under torch.compile
    attention: tuple[str, ...]  # further attentions of sam_jax
    runtimes: tuple[str, ...] = ()  # of `rivals`: also run Meta's model and sam_jax's in these

    def with_ours(
        self,
        theirs: Contenders,
        ours: Callable[[Sam], Callable],
        in_openvino: Callable[[Sam], Callable] | None = None,
    ) -> Contenders:
        """All contenders: PyTorch's, and those that `ours` returns for sam_jax's model.

        `in_openvino` is `ours` with `runtime="openvino"`.
        """
        found = {"ours": ours(model_of(self.name, self.dtype))}
        if in_openvino is not None and "OpenVINO" in self.runtimes:
            found["ours, OpenVINO"] = in_openvino(model_of(self.name, self.dtype))
        for name in self.attention if self.is_vit else ():
            found[f"ours, {name}"] = ours(model_of(self.name, self.dtype, name))
        if torch is None and self.dtype != "float32":
            exact = jax.default_matmul_precision("highest")
            return {"ours, float32": exact(ours(model_of(self.name))), **found}
        return {**theirs, **found}

    @functools.cached_property
    def meta(self) -> "torch.nn.Module":
        """Meta's model in float32."""
        return in_pytorch(model_of(self.name)).to(self.device)

    @functools.cached_property
    def hugging_face(self) -> "torch.nn.Module":
        """`SamModel` with fused attention."""
        reference = in_pytorch(model_of(self.name), "hf")
        reference.set_attn_implementation("sdpa")
        return reference.to(self.device)

    @functools.cached_property
    def fast(self) -> "tuple[types.ModuleType, torch.nn.Module] | None":
        """segment-anything-fast and its compiled model; None if it is not available."""
        try:
            package = import_reference("segment_anything_fast")
        except ImportError:
            return None
        if not self.is_vit:
            return None
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(self.meta.state_dict(), file.name)
            make = package.sam_model_fast_registry[self.name]
            return package, make(file.name, dtype=self.torch_dtype).to(self.device)

    @functools.cached_property
    def rivals(self) -> "dict[str, tuple[torch.nn.Module, torch.nn.Module]]":
        """Meta's encoder and decoder in each runtime."""
        embedding, pixels = torch.zeros(1, 256, 64, 64), torch.zeros(1, 3, 1024, 1024)
        prompts = torch.zeros(2, 2, 256), torch.zeros(2, 256, 64, 64)
        found = {}
        for runtime in self.runtimes:
            into = functools.partial(rivals.in_runtime, runtime=runtime, dtype=self.dtype)
            encoder = into(self.meta.image_encoder, (pixels,))
            decoder = into(
                self.meta.mask_decoder,
                (embedding, embedding, *prompts),
                batched=(2, 3),
                multimask_output=True,
            )
            found[runtime] = encoder, decoder
        return found

    @property
    def torch_dtype(self) -> "torch.dtype":
        """PyTorch's dtype."""
        return getattr(torch, self.dtype)

    def tensor(self, array: np.ndarray) -> "torch.Tensor":
        """The array as a PyTorch tensor on the device."""
        return torch.tensor(array, device=self.device)

    def random(self, *shape: int) -> np.ndarray:
        """Random float32 numbers, the same in every call."""
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def compile(self, function: Callable, *, graphs: bool = True) -> Callable:
        """Compiles for the highest speed; without CUDA graphs if outputs outlive the next call."""
        mode = "max-autotune" if graphs else "max-autotune-no-cudagraphs"
        return torch.compile(function, mode=mode if self.device == "cuda" else None)

    @property
    def variants(self) -> tuple[bool, ...]:
        """PyTorch's contenders run without torch.compile and, if asked for, also with it."""
        return (False, True) if self.compiled else (False,)

    @property
    def is_vit(self) -> bool:
        """Whether the model is a ViT, and not MobileSAM, which `transformers` does not have."""
        return self.name != "mobile_sam"
