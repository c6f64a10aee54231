"""Automatic mask generation for many images: finds the files and writes a result for each."""

import collections
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from sam_jax.automatic.generator import SamAutomaticMaskGenerator
from sam_jax.automatic.results import RESERVED, Results, one_line
from sam_jax.image import FORMATS, load_image

# Every later image would fail too, so these errors end the run.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """Lists the given files, and the image files in the given folders in sorted order.

    In folders, hidden files and files without an extension of `sam_jax.image.FORMATS` are skipped.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there is no image, or if two images would be written under the same name.
    """
    files: dict[str, Path] = {}
    inputs = list(inputs)
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in _images_of(path) if path.is_dir() else [path]:
            if file.stem in RESERVED:
                raise ValueError(
                    f"{file} would be written as {file.stem!r}, a name that sam_jax uses; rename it"
                )
            other = files.setdefault(file.stem, file)
            if os.path.realpath(other) != os.path.realpath(file):
                raise ValueError(
                    f"{other} and {file} would both be written as {file.stem!r}; rename one, or "
                    "run them separately with different outputs"
                )
    if not inputs:
        raise ValueError("no input given, expected images or folders of images")
    if not files:
        hint = "".join(f"; {line}" for line in skipped(inputs))
        raise ValueError(f"there is no image in {', '.join(map(str, inputs))}{hint}")
    return list(files.values())


def _images_of(folder: Path) -> list[Path]:
    # Pillow opens a camera's MPO by its first image, a JPEG.
    formats = {*FORMATS, "MPO"}
    known = {name for name, kind in Image.registered_extensions().items() if kind in formats}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in known and not path.name.startswith(".") and not path.is_dir()
    )


def skipped(inputs: Iterable[Path], output: Path | None = None) -> list[str]:
    """Messages about subfolders and files of the given folders that are skipped."""
    others = [
        path
        for folder in inputs
        if folder.is_dir()
        for path in sorted(set(folder.iterdir()).difference(_images_of(folder)))
        if not path.name.startswith(".") and path != output
    ]
    kinds = {
        "skipped subfolders, which you can give as further inputs": lambda path: path.is_dir(),
        "skipped files without the extension of a supported image format": os.path.isfile,
    }
    lines = []
    for what, is_kind in kinds.items():
        if paths := list(filter(is_kind, others)):
            lines.append(f"{what}: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}")
    return lines


def generate_folder(
    generator: SamAutomaticMaskGenerator,
    files: Sequence[Path],
    results: Results,
    on_image: Callable[[], object],
    on_failure: Callable[[Path, str], object],
) -> None:
    """Generates and writes the masks of image files, one image per device at a time.

    While the devices compute, the next images are read and the last results are written.

    Args:
        generator: its output mode must be "uncompressed_rle".
        files: the image files.
        results: where to write.
        on_image: called when an image's masks are found, or when it cannot be read.
        on_failure: called with the file and the cause if an image cannot be read or written.

    Raises:
        OSError: if the disk is full or read-only.
        NonFiniteError: if the model predicts NaN or infinity.
    """
    taken: collections.deque[tuple[Path, np.ndarray]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
        for file in files:
            try:
                image = load_image(file)
            except (OSError, ValueError, TypeError) as error:
                on_failure(file, one_line(error))
                on_image()
            else:
                taken.append((file, image))
                yield image

    def finish(file: Path, writing: Future) -> None:
        try:
            writing.result()
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            on_failure(file, one_line(error))

    before = None
    with ThreadPoolExecutor(1) as writer:
        for found in generator.generate_batch(images(), on_image):
            file, image = taken.popleft()
            writing = file, writer.submit(results.write, file, image, found)
            if before is not None:
                finish(*before)
            before = writing
        if before is not None:
            finish(*before)
