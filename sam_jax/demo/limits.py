"""Limits on what one visitor, and all visitors together, may ask of the page."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from sam_jax.demo.session import Found, Session

BUSY = "the page is busy with other requests; try again in a moment"


@dataclass(frozen=True)
class Limits:
    """How much the server keeps and does at a time."""

    max_bytes: int = 20 * 10**6  # of an image file
    json_bytes: int = 64 * 1024  # of any other body
    visitors: int = 50  # whose images are kept, about 10 MB each
    forget: float = 3600  # seconds without a request after which a visitor's image is removed
    recent: float = 600  # seconds idle before a newcomer from the same address may replace it
    requests: tuple[int, ...] = (100, 16, 4)  # being answered: in total, per address, per visitor
    bodies: tuple[int, ...] = (128, 16)  # request bodies still arriving: in total, per address
    uploads: tuple[int, ...] = (16, 4)  # image files in memory: in total, per address
    saves: tuple[int, ...] = (16, 4, 1)  # being saved: in total, per address, per visitor
    body_seconds: float = 10  # within which a part of a body must arrive
    body_rate: int = 100_000  # minimum bytes per second of a body, after these seconds


@dataclass
class Visitor:
    """A browser tab that has opened an image; each tab is another visitor."""

    address: str
    session: Session
    used: float
    found: Found | None = None  # the result of everything mode, if it is shown
    stop: threading.Event = field(default_factory=threading.Event)  # ends everything mode
    progress: tuple[int, int] = (0, 0)


class Turns:
    """Lets work in steps wait between steps for all other work."""

    def __init__(self):
        self._changed, self._waiting = threading.Condition(), 0

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """While in this context, `wait` does not return."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()

    def wait(self, seconds: float = 5) -> None:
        """Waits at most `seconds`, so that the work ends however much other work arrives."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)


class Worker:
    """A thread that does one piece of work at a time, in order of arrival.

    Pending work waits in the coroutine that asked for it. The thread's own queue would keep
    canceled work and its arguments until their turn; this way, a client that leaves before its turn
    leaves nothing in memory.
    """

    def __init__(self):
        self._thread, self._turn = ThreadPoolExecutor(1), asyncio.Lock()

    def first(self, work: Callable, *args: Any) -> Future:
        """Begins work, for which that of `run` waits; call it before there is any."""
        return self._thread.submit(work, *args)

    async def run(self, work: Callable, *args: Any) -> Any:
        """The work's result; work that has begun is finished even if this is canceled."""
        await self._turn.acquire()
        done = asyncio.wrap_future(self._thread.submit(work, *args))
        done.add_done_callback(self._end_turn)
        await asyncio.wait({done})  # unlike `await done`, does not cancel it
        return done.result()

    def _end_turn(self, done: asyncio.Future) -> None:
        self._turn.release()
        done.exception()  # marks it as retrieved if the client has left

    def close(self) -> None:
        """Waits for the work in progress; what is pending is not done."""
        self._thread.shutdown(cancel_futures=True)


class Shares:
    """Counts shares of a resource, with a limit in total and a limit for each client.

    A client may have several names, such as an address and a token, each with its own limit.
    """

    def __init__(self, total: int, *each: int):
        self._total, self._each, self._taken, self._all = total, each, Counter(), 0

    @contextlib.contextmanager
    def take(self, *who: str) -> Iterator[None]:
        """Holds a share while in this context.

        Raises:
            HTTPException: with status 503 if no share is left.
        """
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
            self._taken += Counter()  # removes zero counts
