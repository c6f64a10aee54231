"""Compiled programs on disk, so that a process need not compile what another one has compiled."""

import contextlib
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import filelock
import jax

from sam_jax.files import cache_folder

_MAX_BYTES = 2**30  # beyond that, JAX removes the entries that were not used for the longest time
_ENTRY, _TIME = "-cache", "-atime"  # JAX's files of an entry; the time is written last


def enable_compilation_cache(folder: str | os.PathLike | None = None) -> Path | None:
    """Keeps programs that JAX compiles on disk, for all of this process, and for later ones.

    The commands of `sam-jax` call this; in your own program, call it before the first compilation.
    It turns on JAX's persistent compilation cache, limited to 1 GiB, whose entries fit the version
    of jaxlib and the processor. Several processes can use one folder. An entry is machine code: do
    not use a folder that others can write to.

    Options of JAX that are set already stay: with `JAX_COMPILATION_CACHE_DIR` or
    `JAX_ENABLE_COMPILATION_CACHE=false` in the environment, this does nothing.

    Args:
        folder: the folder of the programs; None for `compiled` in sam_jax's cache folder (see
            `SAM_JAX_CACHE`).

    Returns:
        The folder that JAX uses, or None without one: if the cache is turned off, or if the folder
        cannot be written to, or, with a warning, if others can write to it.
    """
    options: Any = jax.config  # whose options are not declared
    if not options.jax_enable_compilation_cache:
        return None
    if (chosen := options.jax_compilation_cache_dir) is not None:
        return Path(chosen)
    path = cache_folder() / "compiled" if folder is None else Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(path):
            warnings.warn(
                f"{path} is not used for compiled programs, because other users can write to it; "
                f"to allow it, run: chmod go-w {path}",
                stacklevel=2,
            )
            return None
        _remove_unfinished(path)
    except (OSError, filelock.Timeout):  # a full or read-only disk, or no folder of one's own
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    # Dozens of small programs together take longer to compile than to load.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path


def _is_private(folder: Path) -> bool:
    status = folder.stat()
    is_own = status.st_uid == os.geteuid()
    return is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left; JAX would trip over it at each later entry."""
    with filelock.FileLock(folder / ".lockfile", timeout=10):  # JAX's own lock
        for entry in folder.glob(f"*{_ENTRY}"):
            time = entry.with_name(entry.name.removesuffix(_ENTRY) + _TIME)
            if not time.is_file() or time.stat().st_size != 8:
                for file in (entry, time):
                    with contextlib.suppress(FileNotFoundError):
                        file.unlink()
