"""Loads images of all kinds as uint8 arrays [h, w, 3]."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from jaxtyping import UInt8
from PIL import (
    ExifTags,
    IcoImagePlugin,
    Image,
    ImageFile,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from sam_jax.arrays import AnyArray, as_numpy, is_array
from sam_jax.decoders import FORMATS as FORMATS
from sam_jax.decoders import check_decoder

# A PIL image, a path, a file's content, or an array of any library. Checked by `load_image` at run
# time.
if TYPE_CHECKING:
    ImageInput: TypeAlias = AnyArray | Image.Image | str | os.PathLike[str] | io.BytesIO
else:
    ImageInput = Any

_OTHERWISE = (
    "read it with another library, such as scikit-image, scale its values to 0 to 255, and give "
    "them as a uint8 array or in a new file"
)


def load_image(image: ImageInput) -> UInt8[np.ndarray, "h w 3"]:
    """Loads an image as a contiguous RGB array, uint8 [h, w, 3].

    The first frame of an animation or a file with several pages is used; the current frame of a
    PIL image.

    Args:
        image: a PIL image with 8 bits per channel; a uint8 array [h, w, 3] (RGB), [h, w],
            [h, w, 1] or [h, w, 4] (alpha is dropped) of any library with `__array__` or DLPack; or
            the path of a file in one of `FORMATS`, or its content in an `io.BytesIO`, whose EXIF
            orientation is applied.

    Raises:
        TypeError: for another type or dtype, or more than 8 bits per channel.
        ValueError: for another shape, an empty image, or a file that is not an image.
        FileNotFoundError: if the path does not exist.
    """
    if isinstance(image, str) and re.match("https?://", image):
        raise ValueError(f"{image} is a URL; download the image first, and give its path")
    if isinstance(image, (str, os.PathLike)):
        image = Path(image).expanduser()
    if isinstance(image, (os.PathLike, io.BytesIO)):
        array = turn(*read_stored(image))
    elif isinstance(image, Image.Image):
        array = _pixels(image, "the image")
    elif is_array(image):
        array = _rgb_array(as_numpy(image, "the image"))
    else:
        raise TypeError(
            f"the image is a {type(image).__name__}, expected a PIL image, an array, or a path"
        )
    if array.size == 0:
        raise ValueError(f"the image is empty: its shape is {array.shape}")
    return np.ascontiguousarray(array)


def image_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """The images of a list or tuple; anything else is one image."""
    return list(images) if isinstance(images, (list, tuple)) else [cast(ImageInput, images)]


def read_stored(path: str | os.PathLike | io.BytesIO) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """The RGB pixels as stored in an image file, and the EXIF orientation to `turn` them by.

    Raises:
        TypeError, ValueError, OSError: as `open_image`, and for a damaged file.
    """
    with open_image(path) as file:
        # Pillow applies a TIFF's orientation when it decodes it, and removes the tag.
        turned = exif_orientation(file) if file.format == "TIFF" else 1
        pixels = turn(_pixels(file, _name(path)), {6: 8, 8: 6}.get(turned, turned))
        return pixels, max(turned, exif_orientation(file))


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of a PIL image, 1 to 8; 1 means upright.

    Raises:
        ValueError: if the EXIF data is damaged.
    """
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # anything that Pillow's parsers raise for a damaged file
        raise ValueError(f"the image's EXIF data cannot be read: {error}") from error
    return int(found) if found in range(1, 9) else 1


def turn(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Turns pixels upright, given their EXIF orientation from 1 to 8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def open_image(path: str | os.PathLike | io.BytesIO) -> ImageFile.ImageFile:
    """Opens an image file in one of `FORMATS`, which is recognized by content, not by name.

    Only the header is read. Close the file after use, or use `with`.

    Args:
        path: of the file, or the file's content.

    Raises:
        TypeError: for more than 8 bits per channel.
        ValueError: if the file is not an image.
        FileNotFoundError, PermissionError: as `open`.
    """
    name = _name(path)
    # Pillow would wait forever for a pipe.
    if not isinstance(path, io.BytesIO) and not Path(path).is_file() and Path(path).exists():
        what = "a folder" if Path(path).is_dir() else "not a regular file"
        raise ValueError(f"{name} is {what}, expected an image")
    try:
        file = Image.open(path, formats=FORMATS)
    except (FileNotFoundError, PermissionError):
        raise
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: a PSD with 16 bits
        raise ValueError(
            f"{name} is not an image of a known format, expected one of {', '.join(FORMATS)}, "
            f"with at most 8 bits per channel; or {_OTHERWISE}"
        ) from error
    except Exception as error:  # anything that Pillow's parsers raise for a damaged file
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    try:
        _check_readable(file)
    except BaseException:
        file.close()
        raise
    return file


def _name(image: str | os.PathLike | io.BytesIO) -> str:
    return "the file" if isinstance(image, io.BytesIO) else str(image)


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """A PIL image's RGB values."""
    _check_readable(image)
    # Through another mode where PIL would warn (transparent palette colors) or cannot convert to
    # RGB (premultiplied alpha).
    between = {"P": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    try:
        return np.asarray(image.convert(between).convert("RGB"))
    except Exception as error:  # anything that Pillow's decoders raise for a damaged file
        raise ValueError(f"{name} cannot be read: {error}") from error


def _check_readable(image: Image.Image) -> None:
    """Rejects formats whose decoding runs programs, and images with more than 8 bits."""
    check_decoder(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;") or _narrows(image):
        raise TypeError(
            f"the image (mode {image.mode}) has more than 8 bits per channel, or signed values, "
            f"expected 8 bits, 0 to 255; {_OTHERWISE}"
        )


def _narrows(image: Image.Image) -> bool:
    """Whether Pillow, when it decodes this file, reduces more bits per channel to 8."""
    if image.format == "TIFF" and isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        unsigned = {1, 4}  # 4 is undefined, which is read as unsigned
        return max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8 or not unsigned.issuperset(
            tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
        )
    if image.format == "ICO" and isinstance(image, IcoImagePlugin.IcoImageFile):
        return any(_is_deep_png(image.ico.buf, entry.offset) for entry in image.ico.entry)
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:  # decoded already
        return False
    tiles = image.tile
    if image.format == "PNG":
        return ";16" in str(tiles[0].args)  # the raw mode, such as "RGB;16B"
    if image.format == "PPM":
        return isinstance(tiles[0].args, tuple) and tiles[0].args[1] > 255  # mode, largest value
    if image.format == "SGI":
        return tiles[0].codec_name == "SGI16" or ";16" in str(tiles[0].args)
    if image.format not in ("JPEG2000", "AVIF") or image.fp is None:
        return False
    data = _read_at(image.fp, 0)
    if image.format == "AVIF":  # AV1CodecConfigurationBox: the third byte has high_bitdepth
        found = re.search(rb"av1C..(.)", data, re.DOTALL)
        return found is not None and bool(found[1][0] & 0x40)
    # JPEG 2000's SOC and SIZ markers; 38 bytes later the number of components, then three bytes
    # for each component, the first of which is its number of bits minus one.
    found = re.search(rb"\xff\x4f\xff\x51.{36}(..)", data, re.DOTALL)
    if found is None:
        return False
    depths = data[found.end() : found.end() + 3 * int.from_bytes(found[1]) : 3]
    return any((depth & 0x7F) + 1 > 8 for depth in depths)


def _is_deep_png(file: io.BufferedIOBase | IO[bytes], offset: int) -> bool:
    header = b"" if file.closed else _read_at(file, offset, 25)
    return header.startswith(b"\x89PNG") and header[-1] == 16  # the bit depth


def _read_at(file: io.BufferedIOBase | IO[bytes], offset: int, size: int = -1) -> bytes:
    position = file.tell()
    file.seek(offset)
    data = file.read(size)
    file.seek(position)
    return data


def _rgb_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        hint = "scale it to that"
        if array.dtype.kind in "fb":
            hint = "convert it, such as (255 * image).astype(np.uint8) for values from 0 to 1"
        raise TypeError(
            f"the image's dtype is {array.dtype}, expected uint8 with values 0 to 255; {hint}"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; it seems to be channels first: use image.transpose(1, 2, 0)"
        if array.ndim == 4:
            hint = "; give several images as a list, such as list(images)"
            if array.shape[1] in (1, 3, 4):
                hint += ", channels last: images.transpose(0, 2, 3, 1)"
        raise ValueError(
            f"the image's shape is {array.shape}, expected (h, w), (h, w, 1), (h, w, 3) or "
            f"(h, w, 4){hint}"
        )
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    return array[..., :3]
