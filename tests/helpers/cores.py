"""Which cores tests run on: see the head of conftest.py."""

import contextlib
import os


@contextlib.contextmanager
def all_cores():
    """Processes started within may use every core: on one, processes that wait are slow."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
