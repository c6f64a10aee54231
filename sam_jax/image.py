"""Whatever a person calls an image, as a uint8 array [h, w, 3]."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from sam_jax.ops.arrays import as_numpy, is_array

ImageInput = Any  # a PIL image, a path, or an array of any library: see `load_image`

# Formats that Pillow decodes by libraries in this process. It reads others by running programs: EPS
# by Ghostscript, whatever the file is called.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)


def load_image(image: ImageInput) -> UInt8[np.ndarray, "h w 3"]:
    """An image as a contiguous RGB array.

    Args:
        image: a PIL image of 8 bits per channel; a uint8 array [h, w, 3] (RGB), [h, w], [h, w, 1]
            or [h, w, 4], whose alpha is dropped, of any library with `__array__` or DLPack; or a
            path, whose EXIF orientation is applied.

    Raises:
        TypeError: for other things and other dtypes, and for more than 8 bits per channel.
        ValueError: for other shapes, empty images and files that hold no image.
        FileNotFoundError: for a path that does not exist.
    """
    if isinstance(image, str) and re.match("https?://", image):
        raise ValueError(f"{image} is an address; download the image first, and give its path")
    if isinstance(image, (str, os.PathLike)):
        with open_image(image) as file:
            array = _pixels(file, str(image), turn=True)
    elif isinstance(image, Image.Image):
        array = _pixels(image, "the image", turn=False)
    elif is_array(image):
        array = _rgb_array(as_numpy(image, "the image"))
    else:
        raise TypeError(
            f"an image is a {type(image).__name__}, expected a PIL image, an array, or a path"
        )
    if array.size == 0:
        raise ValueError(f"the image is empty: its shape is {array.shape}")
    return np.ascontiguousarray(array)


def open_image(path: str | os.PathLike) -> ImageFile.ImageFile:
    """Opens an image file of one of `FORMATS`, which its content decides, not its name.

    Only its header is read. The file is to be closed: use `with`.

    Raises:
        TypeError: for more than 8 bits per channel.
        ValueError: for files that hold no image.
        FileNotFoundError, PermissionError: as `open`.
    """
    if not Path(path).is_file() and Path(path).exists():  # Pillow would wait for a pipe
        raise ValueError(f"{path} is not a regular file, expected an image")
    try:
        file = Image.open(path, formats=FORMATS)
    except (FileNotFoundError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not an image of a known format, expected one of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # whatever Pillow's parsers meet in a damaged file
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    try:
        _check_readable(file)
    except BaseException:
        file.close()
        raise
    return file


def _pixels(image: Image.Image, name: str, *, turn: bool) -> np.ndarray:
    """A PIL image's RGB values, turned as its EXIF orientation says if `turn`."""
    _check_readable(image)
    # By way of another mode where PIL would warn (palette colors that are transparent) or has
    # no way to RGB (premultiplied alpha).
    between = {"P": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    try:
        if turn:
            image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert(between).convert("RGB"))
    except Exception as error:  # whatever Pillow's decoders meet in a damaged file
        raise ValueError(f"{name} cannot be read: {error}") from error


def _check_readable(image: Image.Image) -> None:
    """Refuses formats that run programs, and more bits than Pillow would keep."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in (*FORMATS, "MPO"):
        raise ValueError(
            f"the image's format is {image.format}, expected one of {', '.join(FORMATS)}; if you "
            "trust it, give image.convert('RGB')"
        )
    if image.mode in ("F", "I") or image.mode.startswith("I;") or _narrows(image):
        raise TypeError(
            f"the image (mode {image.mode}) has more than 8 bits per channel, expected 8; read it "
            "into an array, for instance with scikit-image, scale its values to 0 to 255 and "
            "convert it to uint8"
        )


def _narrows(image: Image.Image) -> bool:
    """Whether Pillow, when it decodes this file, would keep 8 of more bits per channel."""
    tiles = getattr(image, "tile", None)
    if not tiles:  # decoded already
        return False
    if image.format == "PNG":
        return ";16" in str(tiles[0].args)  # the raw mode, such as "RGB;16B"
    if image.format == "PPM":
        return isinstance(tiles[0].args, tuple) and tiles[0].args[1] > 255  # mode, largest value
    if image.format == "SGI":
        return tiles[0].codec_name == "SGI16" or ";16" in str(tiles[0].args)
    if image.format == "TIFF":
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    if image.format not in ("JPEG2000", "AVIF") or image.fp is None:
        return False
    position = image.fp.tell()
    image.fp.seek(0)
    header = image.fp.read(2**16)
    image.fp.seek(position)
    if image.format == "AVIF":  # AV1CodecConfigurationBox: the third byte has high_bitdepth
        found = re.search(rb"av1C..(.)", header, re.DOTALL)
        return found is not None and bool(found[1][0] & 0x40)
    # JPEG 2000's SOC and SIZ markers; the first component's Ssiz is 40 bytes on.
    found = re.search(rb"\xff\x4f\xff\x51.{38}(.)", header, re.DOTALL)
    return found is not None and (found[1][0] & 0x7F) + 1 > 8


def _rgb_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        hint = "scale it to that"
        if array.dtype.kind in "fb":
            hint = "convert it, for instance (255 * image).astype(np.uint8) for values 0 to 1"
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
