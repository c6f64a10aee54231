"""How much one visitor, and all together, may ask of the page."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from sam_jax.demo.visit import Found, Visit

BUSY = "the page is busy with other requests; try again in a moment"


@dataclass(frozen=True)
class Limits:
    """How much of what the server keeps and does at a time."""

    max_bytes: int = 20 * 10**6  # of an image's file
    json_bytes: int = 64 * 1024  # of all other bodies
    visitors: int = 50  # whose images are kept, about 10 MB each
    forget: float = 3600  # seconds without a request after which a visitor's image is dropped
    recent: float = 600  # seconds within which no newcomer from the same address takes its place
    requests: tuple[int, ...] = (100, 16, 4)  # at work: in all, from one address, of one visitor
    bodies: tuple[int, ...] = (128, 16)  # of these that are still coming: in all, from one address
    uploads: tuple[int, ...] = (16, 4)  # in memory: in all, from one address
    saves: tuple[int, ...] = (16, 4, 1)  # at work: in all, from one address, of one visitor
    body_seconds: float = 10  # within which a part of a body must come
    body_rate: int = 100_000  # bytes per second of a body, at the least, after these seconds


@dataclass
class Visitor:
    """One who opened an image; another tab of the same browser is another visitor."""

    address: str
    visit: Visit
    used: float
    found: Found | None = None  # of everything mode, if that is shown
    stop: threading.Event = field(default_factory=threading.Event)  # ends everything mode
    progress: tuple[int, int] = (0, 0)


class Turns:
    """Who works in steps waits between them for all others."""

    def __init__(self):
        self._changed, self._waiting = threading.Condition(), 0

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """While this lasts, `wait` does not return."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def wait(self, seconds: float = 5) -> None:
        """No longer than this, so that the work ends however many others come."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)


class Worker:
    """A thread that does one piece of work at a time, in the order in which they come.

    What waits is with the coroutine that asked for it, not in the thread's own queue, which would
    keep cancelled work and its arguments until their turn. A client that leaves before its turn
    therefore leaves nothing in memory.
    """

    def __init__(self):
        self._thread, self._turn = ThreadPoolExecutor(1), asyncio.Lock()

    async def run(self, work: Callable, *args: Any) -> Any:
        """The work's result; once begun, it is done even if this is cancelled."""
        await self._turn.acquire()
        done = asyncio.wrap_future(self._thread.submit(work, *args))
        done.add_done_callback(self._end_turn)
        await asyncio.wait({done})  # unlike `await done`, this leaves it alone when cancelled
        return done.result()

    def _end_turn(self, done: asyncio.Future) -> None:
        self._turn.release()
        done.exception()  # marks it as seen, where the client has left

    def close(self) -> None:
        """Waits for the work that is being done."""
        self._thread.shutdown()


class Shares:
    """How much is taken of something, of which there is so much, and for each so much.

    Who takes may be known by several names, such as an address and a token; for each name in turn
    there is a limit.
    """

    def __init__(self, total: int, *each: int):
        self._total, self._each, self._taken, self._all = total, each, Counter(), 0

    @contextlib.contextmanager
    def take(self, *who: str) -> Iterator[None]:
        """A share, while this lasts; refused with 503 if there is none left."""
        limits = zip(who, self._each, strict=True)
        if self._all >= self._total or any(self._taken[name] >= each for name, each in limits):
            raise HTTPException(503, BUSY)
        self._all += 1
        self._taken.update(who)
        try:
            yield
        finally:
            self._all -= 1
            self._taken.subtract(who)
            self._taken += Counter()  # forgets those who have none
