"""Exceptions, checks of numbers, and helpers for names from files in messages."""

import contextlib
import itertools
import math
import numbers
from collections.abc import Collection, Iterator
from reprlib import repr as short
from typing import Any

# For each extra, the packages that sam_jax imports, or that these import when they are used.
EXTRAS = {
    "demo": ("starlette", "uvicorn"),
    "onnx": ("onnx",),
    "openvino": ("openvino", "onnx"),
    "ray": ("ray", "pyarrow"),
    "train": ("grain", "tensorboardX"),
}


class NonFiniteError(ValueError):
    """A model predicts NaN or infinity."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says what was found, what was expected and what to do."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message has the command that installs it."""


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Context for importing an extra's packages; raises MissingExtra if one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[extra]:
            raise
        raise MissingExtra(
            f'{package} is not installed; run: pip install "sam_jax[{extra}]"', name=package
        ) from error


def check_number(name: str, value: Any) -> None:
    """Raises ValueError for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ValueError(f"{name} is {short(value)}, expected a number")


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError for anything but a bool, of Python or numpy: "False" would be true."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} is {short(value)}, expected a bool")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError for anything but an integer, of Python or numpy, within the limits."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(
            f"{name} is {short(value)}, expected a whole number of at least {least}{limit}"
        )


def check_mask(mask: Any, name: str = "the mask") -> None:
    """Raises ValueError for anything but one boolean mask, an array of two axes."""
    dtype, shape = str(getattr(mask, "dtype", type(mask).__name__)), getattr(mask, "shape", "")
    if dtype != "bool" or len(shape) != 2:
        hint = "; compare logits with 0 first"
        if dtype == "bool":
            hint = "; one mask alone is mask[None]" if len(shape) == 1 else ""
        raise ValueError(f"{name} is {dtype} {shape}, expected bool (h, w){hint}")


def clip(name: str) -> str:
    """Shortens a name from a file for a message: some have megabytes."""
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def listed(names: Collection[str]) -> str:
    """The first ten names and the number of others."""
    first = ", ".join(map(clip, itertools.islice(names, 10)))
    return f"{first} and {len(names) - 10} more" if len(names) > 10 else first
