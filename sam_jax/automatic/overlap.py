"""Iterators that let the host and the devices work at the same time."""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T], host: Executor) -> Iterator[T]:
    """The items; each is produced while the caller works on the one before."""
    following = host.submit(next, items, None)
    while (item := following.result()) is not None:
        following = host.submit(next, items, None)
        yield item


def one_behind(items: Iterator[T]) -> Iterator[T]:
    """The items; each is yielded after the next one is produced, or fails to be."""
    before: list[T] = []
    try:
        for item in items:
            yield from before
            before = [item]
    except Exception:
        yield from before
        raise
    yield from before
