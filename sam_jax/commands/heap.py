"""Memory of processes that run one compiled program again and again."""

import ctypes

# Options of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_heap() -> None:
    """Keeps the memory that this process frees, for its next call.

    XLA takes the buffers of each call on a CPU from malloc, and glibc gives large ones back to the
    system, which then maps and clears every page again. This affects the whole process, which will
    not shrink anymore: it is for programs, not for libraries. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_ARENA_MAX, 1)  # only the first arena can hold large buffers
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
