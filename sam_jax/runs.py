"""The folder of a run: used by one process at a time, and with results of the same settings."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam_jax.files import read_json, write_json

__all__ = ["FolderInUseError", "check_or_write_settings", "lock_folder"]

_LOCK = ".sam_jax.lock"


class FolderInUseError(ValueError):
    """Another run is working in this folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Locks `folder` for this run, and creates it if needed.

    The operating system's lock on a hidden file, which names the process that holds it, ends with
    the process: a killed run does not leave the folder locked.

    Raises:
        FolderInUseError: if another run works in the folder; the message names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise FolderInUseError(
                f"another run is working in {folder} ({owner}); wait until it ends, or choose "
                "another folder"
            ) from error
        except OSError:  # a file system without locks: use the folder unlocked
            pass
        with contextlib.suppress(FileNotFoundError):  # the run before has just removed it
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: it cannot be another run's file
        os.close(descriptor)


def check_or_write_settings(
    file: str | os.PathLike, settings: Mapping[str, Any], *, has_results: bool
) -> None:
    """Writes the settings of a run, or compares them with those of earlier results.

    Args:
        file: the JSON file of the settings, in the run's folder.
        settings: names and JSON values; only settings that change the results belong here.
        has_results: whether the folder has results; without results, the file is replaced.

    Raises:
        ValueError: if earlier results have different settings; the message names them.
    """
    file, settings = Path(file), json.loads(json.dumps(dict(settings)))
    if not has_results:
        write_json(file, settings, indent=2)
        return
    try:
        earlier = read_json(file)
        other = [k for k in {**earlier, **settings} if earlier.get(k) != settings.get(k)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.parent} has results, but their {file.name} cannot be read: {error}"
        ) from error
    if other:
        names = ", ".join(f"{k} was {earlier.get(k)!r}, now {settings.get(k)!r}" for k in other)
        raise ValueError(
            f"{file.parent} already contains results made with different settings: {names}"
        )
