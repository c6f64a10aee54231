"""Exceptions, and helpers for names from files in their messages."""

import contextlib
import itertools
from collections.abc import Collection, Iterator

# For each extra, the packages that sam_jax imports, or that these import when they are used.
EXTRAS = {
    "demo": ("starlette", "uvicorn"),
    "onnx": ("onnx",),
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


def clip(name: str) -> str:
    """Shortens a name from a file for a message: some have megabytes."""
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def listed(names: Collection[str]) -> str:
    """The first ten names and the number of others."""
    first = ", ".join(map(clip, itertools.islice(names, 10)))
    return f"{first} and {len(names) - 10} more" if len(names) > 10 else first
