"""Helpers of several commands."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro
from tqdm import tqdm

from sam_jax.types import DType, Runtime

T = TypeVar("T")
IfGiven = tyro.conf.DisallowNone[Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]]
"""Type of an option that may be left out, of which `--help` does not say "None"."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model a command runs, and how it computes."""

    model: str = "mobile_sam"
    """Short name, hub repository, file or folder."""
    dtype: DType = "float32"
    """Compute dtype. bfloat16 is faster on GPU and TPU."""
    runtime: Runtime = "jax"
    """What runs the image encoder. openvino is the fastest on a CPU (extra: openvino)."""


if TYPE_CHECKING:  # imports JAX, which would slow down `--help`
    from sam_jax.models.sam import Sam


def load_model(name: str, dtype: str) -> "Sam":
    """The model, in a process that keeps its memory, and compiled programs for the next one.

    Raises:
        ValueError, OSError: as `from_pretrained`.
    """
    from sam_jax.checkpoints import from_pretrained
    from sam_jax.commands.heap import keep_heap
    from sam_jax.compilation_cache import enable_compilation_cache

    keep_heap()
    enable_compilation_cache()
    return from_pretrained(name, dtype=dtype)


def say(text: str) -> None:
    """Prints to stderr: to the user, not to programs that read the output."""
    tqdm.write(text, sys.stderr)
    sys.stderr.flush()


def say_compiling(how_often: str = "once") -> None:
    """Says why there are no results in the first seconds."""
    say(f"preparing the model; a first run compiles encoder and decoder, {how_often} ...")
