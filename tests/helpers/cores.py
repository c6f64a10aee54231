"""Which cores tests run on: see the head of conftest.py."""

import contextlib
import os


@contextlib.contextmanager
def all_cores():
    """Started within, processes may use every core: on one, those that wait for others crawl."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
