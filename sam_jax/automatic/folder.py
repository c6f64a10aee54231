"""Automatic mask generation for many images: which images there are, and a result for each."""

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

# Every further image would fail, too: a run ends at these.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def find_pictures(inputs: Iterable[Path]) -> list[Path]:
    """The files given, and of the folders given the files that are named as images, sorted.

    Hidden ones are passed over, and those without an extension of `sam_jax.image.FORMATS`.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: if there is none, or if two of them would have one result.
    """
    pictures: dict[str, Path] = {}
    inputs = list(inputs)
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        for file in _images_of(path) if path.is_dir() else [path]:
            if file.stem in RESERVED:
                raise ValueError(
                    f"{file} would be written as {file.stem!r}, a name of ours; rename it"
                )
            other = pictures.setdefault(file.stem, file)
            if os.path.realpath(other) != os.path.realpath(file):
                raise ValueError(
                    f"{other} and {file} would both be written as {file.stem!r}; rename one, or "
                    "give them separately with another output"
                )
    if not inputs:
        raise ValueError("there is no input, expected images or folders of images")
    if not pictures:
        hint = "".join(f"; {line}" for line in passed_over(inputs))
        raise ValueError(f"there is no image in {', '.join(map(str, inputs))}{hint}")
    return list(pictures.values())


def _images_of(folder: Path) -> list[Path]:
    # Pillow opens a camera's MPO as the JPEG that it begins with.
    formats = {*FORMATS, "MPO"}
    known = {name for name, kind in Image.registered_extensions().items() if kind in formats}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in known and not path.name.startswith(".") and not path.is_dir()
    )


def passed_over(inputs: Iterable[Path], output: Path | None = None) -> list[str]:
    """What there is to say of what lies in the folders given and is not an image of theirs."""
    there = [
        path
        for folder in inputs
        if folder.is_dir()
        for path in sorted(set(folder.iterdir()).difference(_images_of(folder)))
        if not path.name.startswith(".") and path != output
    ]
    kinds = {
        "subfolders are passed over, give them as inputs of their own": lambda path: path.is_dir(),
        "files without the name of an image that can be read are passed over": os.path.isfile,
    }
    lines = []
    for what, is_kind in kinds.items():
        if paths := list(filter(is_kind, there)):
            lines.append(f"{what}: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}")
    return lines


def generate_folder(
    generator: SamAutomaticMaskGenerator,
    pictures: Sequence[Path],
    results: Results,
    on_image: Callable[[], object],
    on_failure: Callable[[Path, str], object],
) -> None:
    """Generates and writes the masks of pictures, as many at a time as the generator has devices.

    Pictures are read before, and results written after, while the devices work on others.

    Args:
        generator: its output mode must be "uncompressed_rle".
        pictures: files.
        results: where to write.
        on_image: called for each image that cannot be read, or whose masks are found.
        on_failure: called with each image that could not be read or written, and the cause.

    Raises:
        OSError: if the disk is full or read-only.
        NonFiniteError: if the model predicts NaN or infinity.
    """
    taken: collections.deque[tuple[Path, np.ndarray]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
        for picture in pictures:
            try:
                image = load_image(picture)
            except (OSError, ValueError, TypeError) as error:
                on_failure(picture, one_line(error))
                on_image()
            else:
                taken.append((picture, image))
                yield image

    def finish(picture: Path, writing: Future) -> None:
        try:
            writing.result()
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            on_failure(picture, one_line(error))

    before = None
    with ThreadPoolExecutor(1) as writer:
        for found in generator.generate_batch(images(), on_image):
            picture, image = taken.popleft()
            writing = picture, writer.submit(results.write, picture, image, found)
            if before is not None:
                finish(*before)
            before = writing
        if before is not None:
            finish(*before)
