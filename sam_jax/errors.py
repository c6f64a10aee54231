"""Exceptions, and helpers for names from files in their messages."""

import itertools
from collections.abc import Collection


class NonFiniteError(ValueError):
    """A model predicts NaN or infinity."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says what was found, what was expected and what to do."""


def clip(name: str) -> str:
    """Shortens a name from a file for a message: some have megabytes."""
    return name if len(name) <= 200 else f"{name[:90]}...{name[-90:]}"


def listed(names: Collection[str]) -> str:
    """The first ten names and the number of others."""
    first = ", ".join(map(clip, itertools.islice(names, 10)))
    return f"{first} and {len(names) - 10} more" if len(names) > 10 else first
