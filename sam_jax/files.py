"""Atomic writes of files and folders, and JSON."""

import contextlib
import errno
import fcntl
import functools
import json
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TEMPORARY = ".sam_jax-"
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 4 * 2**30, 100


def cache_folder() -> Path:
    """`$SAM_JAX_CACHE`, else `$XDG_CACHE_HOME/sam_jax`, else `~/.cache/sam_jax`."""
    if cache := os.environ.get("SAM_JAX_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam_jax"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or a folder to, which then replaces `path`.

    On an exception nothing is left behind; an OSError without a file name, such as for a full disk,
    gets `path` as its name. The next process that writes to the same folder removes what a killed
    process leaves behind. An existing folder is only replaced if it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        with _naming(path):
            yield temporary
            # Sync before renaming, so that a power failure cannot leave a partial file either.
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            os.replace(temporary, path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds this path to an OSError without a file name, such as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, locked while in use so that other processes do not remove it.

    It is removed at the end. Folders of killed processes are removed at the start.
    """
    remove_leftovers(parent)
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_TEMPORARY))
        if (descriptor := _lock_new(folder)) is not None:
            break
    try:
        with _naming(parent):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock_new(folder: Path) -> int | None:
    """Locks a folder; None if another process took it for a leftover before it was locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = not folder.exists()
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks: nobody can lock it
        taken = False
    if taken:
        os.close(descriptor)
        return None
    return descriptor


def remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of killed processes from `folder`, once per process."""
    _remove_leftovers(folder.absolute())


@functools.cache
def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # in use, or being removed by another process
            descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


def read_json(source: Path | bytes, *, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Parses a JSON file, or JSON text in UTF-8.

    Raises:
        ValueError: if it is not a regular file, is larger than `max_bytes`, is not JSON, or is
            nested more than 100 levels deep.
        OSError: if the file cannot be read.
    """
    if isinstance(source, bytes):
        what, data = "the JSON text", source
    else:
        what, data = str(source), read_regular(source, max_bytes)
    if len(data) > max_bytes:
        raise ValueError(f"{what} has {len(data)} bytes, expected at most {max_bytes}")
    # Brackets outside strings give the depth. It is checked first, because parsing recurses.
    brackets = _STRING.sub(b"", data).translate(_STEP, _NOT_BRACKETS)
    depth = np.cumsum(np.frombuffer(brackets, np.int8), dtype=np.int64).max(initial=0)
    if depth > _MAX_JSON_DEPTH:
        raise ValueError(
            f"{what} is nested {depth} levels deep, expected at most {_MAX_JSON_DEPTH}"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_STEP = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{[}]"))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file; reading a pipe or a device might never end.

    Raises:
        ValueError: if it is not a regular file, or is larger than `max_bytes`.
        OSError: if it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path} is a folder, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{path} has {status.st_size} bytes, expected at most {max_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def folder_size(folder: Path) -> int:
    """The total size in bytes of a folder's files, after checking that they are safe to read.

    Raises:
        ValueError: if it has anything but regular files and folders. Reading a pipe might never
            end, a link to a folder leads to unchecked files, and the holes of a sparse file take
            no space on the disk but take memory.
        OSError: if something cannot be read.
    """
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += _size_without_holes(path)
        elif path.is_symlink() or not path.is_dir():
            raise ValueError(
                f"{path} is neither a regular file nor a folder; links are not allowed"
            )
    return size


def _size_without_holes(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = hole = os.fstat(descriptor).st_size
        with contextlib.suppress(OSError):  # an empty file, or a file system without sparse files
            hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
    finally:
        os.close(descriptor)
    if hole < size:
        raise ValueError(f"{path} is a sparse file: not all of its {size:,} bytes are on the disk")
    return size


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Writes strict JSON atomically.

    Raises:
        ValueError: for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=indent, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def map_file(file: BinaryIO) -> memoryview:
    """The bytes of a file, memory-mapped."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def require_folder(name: str, path: Path) -> None:
    """Checks that a folder can be written to or created, before work that takes long.

    Raises:
        ValueError: if the path, or a parent of it, is a file; the message has `name`.
        PermissionError: if the folder, or the one to create it in, cannot be written to.
    """
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise ValueError(f"{name} is {existing}, a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written to", str(existing))


def require_absent(path: str | os.PathLike) -> None:
    """Raises FileExistsError if the path exists already."""
    if os.path.lexists(Path(path).expanduser()):
        raise FileExistsError(f"{path} exists already; choose another path or remove it first")


@contextmanager
def atomic_dir(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_write` of a new folder, which is yielded.

    Raises:
        FileExistsError: if the path exists already.
    """
    require_absent(path)
    with atomic_write(Path(path).expanduser().absolute()) as folder:
        folder.mkdir()
        yield folder
        require_absent(path)
