"""Which image formats may be decoded: those of which no decoder is another program."""

from PIL import Image, ImageFile

# Formats that Pillow decodes by libraries in this process. It reads others by running programs: EPS
# by Ghostscript, whatever the file is called.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)


class DecoderError(ValueError):
    """An image of a format that may not be decoded."""


def check_decoder(image: Image.Image) -> None:
    """Refuses a PIL image whose pixels a program would have to decode.

    Raises:
        DecoderError: for a file that was opened, but not read, of another format than `FORMATS`.
    """
    is_file = isinstance(image, ImageFile.ImageFile)
    is_decoded = is_file and not image.tile and not isinstance(image, ImageFile.StubImageFile)
    if is_file and not is_decoded and image.format not in (*FORMATS, "MPO"):
        raise DecoderError(
            f"the image's format is {image.format}, expected one of {', '.join(FORMATS)}; if you "
            "trust it, give image.convert('RGB')"
        )
