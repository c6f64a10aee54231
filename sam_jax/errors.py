"""Exceptions, and how their messages show names from files."""

import contextlib
import itertools
from collections.abc import Collection, Iterator

# The packages of each extra that sam_jax imports, or that those import when they are used.
EXTRAS = {
    "demo": ("starlette", "uvicorn"),
    "onnx": ("onnx",),
    "ray": ("ray", "pyarrow"),
    "train": ("grain", "tensorboardX"),
}


class NonFiniteError(ValueError):
    """A model predicts NaN or infinity."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what it is, what was expected, what to do."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message says which command installs it."""


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around the import of an extra's packages, which raises MissingExtra if one is missing."""
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
    """A name from a file for a message: some have megabytes."""
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def listed(names: Collection[str]) -> str:
    """The first ten names, and how many more there are."""
    first = ", ".join(map(clip, itertools.islice(names, 10)))
    return f"{first} and {len(names) - 10} more" if len(names) > 10 else first
