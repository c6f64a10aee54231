"""Files and folders that are there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or a folder to, which then takes its place.

    If anything is raised, nothing of it is left. A folder takes no other's place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}")  # as short as the longest name needs
    try:
        yield temporary
        # On the disk before it has its name, so that a power failure leaves nothing half either.
        for file in temporary.iterdir() if temporary.is_dir() else [temporary]:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
