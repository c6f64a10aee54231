"""`sam-jax export`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from sam_jax.commands.common import load_model
from sam_jax.files import require_absent
from sam_jax.types import DType, Platform


@dataclasses.dataclass
class Export:
    """Write a model for programs without sam_jax, with jax.export or as ONNX."""

    model: tyro.conf.Positional[str]
    """Short name, hub repository, file or folder."""
    output: Path
    """The folder to create."""
    format: Literal["jax", "onnx"] = "jax"
    """Programs of jax.export, or ONNX."""
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
    """jax only: platforms to run on."""
    dtype: DType = "float32"
    """jax only: compute dtype."""
    gradient: bool = False
    """jax only: make the programs differentiable by jax.grad, once. Writing them takes several
    times as long."""
    single_mask: bool = False
    """onnx only: return one mask instead of four, chosen by the number of points and the scores."""


def export(args: Export) -> None:
    """Writes the folder; see `sam_jax.export`.

    Raises:
        OSError: if the output exists or cannot be written.
        ValueError: if options contradict each other or the model, or if the model is unknown.
        MissingExtra: for ONNX without the extra `onnx`.
    """
    from sam_jax.export import export_jax, export_onnx

    require_absent(args.output)
    for_jax = args.platforms != Export.platforms or args.dtype != "float32" or args.gradient
    if args.format == "onnx" and for_jax:
        raise ValueError(
            "--platforms, --dtype and --gradient are for --format jax; ONNX is float32, without "
            "a gradient"
        )
    if args.format == "jax" and args.single_mask:
        raise ValueError("--single-mask is for --format onnx")
    model = load_model(args.model, args.dtype)
    if args.format == "onnx":
        export_onnx(model, args.output, single_mask=args.single_mask)
    else:
        export_jax(model, args.output, platforms=args.platforms, vjp_order=int(args.gradient))
    print(args.output)
