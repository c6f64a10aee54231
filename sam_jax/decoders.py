"""The image formats that may be decoded: those that Pillow decodes without running a program."""

from PIL import Image, ImageFile

# Formats that Pillow decodes in this process. For others it runs programs, such as Ghostscript for
# EPS, whatever the file's name.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)


class DecoderError(ValueError):
    """The image has a format that may not be decoded."""


def check_decoder(image: Image.Image) -> None:
    """Rejects a PIL image that only another program could decode.

    Raises:
        DecoderError: if the image is an opened file that is not decoded yet and whose format is not
            one of `FORMATS`.
    """
    is_file = isinstance(image, ImageFile.ImageFile)
    is_decoded = is_file and not image.tile and not isinstance(image, ImageFile.StubImageFile)
    if is_file and not is_decoded and image.format not in (*FORMATS, "MPO"):
        raise DecoderError(
            f"the image's format is {image.format}, expected one of {', '.join(FORMATS)}; if you "
            "trust it, give image.convert('RGB')"
        )
