"""Image files that must be refused: more than 8 bits per channel, and EPS, which is a program."""

import io
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

# 12-bit values, whose high bytes are nearly black.
DEEP = np.random.default_rng(0).integers(0, 4096, (64, 65, 3), dtype=np.uint16)
DEEP_ALPHA = np.dstack([DEEP, DEEP[..., 0]])


def eps() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "EPS")
    return file.getvalue()


def _cv2(array, suffix, *options):
    if not cv2.haveImageWriter(f"x{suffix}"):
        pytest.skip(f"this build of OpenCV does not write {suffix}")
    return cv2.imencode(suffix, array, options)[1].tobytes()


def _tiff(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def _tiff_of_12_bits():
    """Two pixels of gray, packed."""
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (277, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0\x08\0\0\0" + ifd + b"\x12\x34\x56"


def _pil(array, file_format, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, file_format, **options)
    return file.getvalue()


def _patched(data, offset, value):
    return data[:offset] + bytes([value]) + data[offset + 1 :]


def _icon_of_16_bits():
    png = _cv2(DEEP_ALPHA, ".png")
    entry = struct.pack("<BBBBHHII", 65, 64, 0, 0, 1, 64, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


def _jpeg_of_12_bits():
    data = _pil(DEEP.astype(np.uint8), "JPEG")
    return _patched(data, data.index(b"\xff\xc0") + 4, 12)


_SGI = _pil(DEEP.astype(np.uint8), "SGI", bpc=2)

# Pillow reads these, and keeps 8 bits or does not say how many there were.
NARROWED = {
    "png_color": lambda: _cv2(DEEP, ".png"),
    "png_alpha": lambda: _cv2(DEEP_ALPHA, ".png"),
    "png_gray": lambda: _cv2(DEEP[..., 0], ".png"),
    "ppm": lambda: b"P6 65 64 4095\n" + DEEP.astype(">u2").tobytes(),
    "ppm_text": lambda: b"P3 2 1 4095\n1 2 3 4 5 4095\n",
    "pgm": lambda: b"P5 65 64 4095\n" + DEEP[..., 0].astype(">u2").tobytes(),
    "pfm": lambda: b"Pf\n2 1\n-1.0\n" + np.float32([0, 1]).tobytes(),
    "sgi": lambda: _SGI,
    "sgi_packed": lambda: _patched(_SGI, 2, 1),
    "tiff_color": lambda: _tiff(DEEP, photometric="rgb"),
    "tiff_big_endian": lambda: _tiff(DEEP, photometric="rgb", byteorder=">"),
    "tiff_deflated": lambda: _tiff(DEEP, photometric="rgb", compression="zlib"),
    "tiff_planes": lambda: _tiff(
        DEEP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    ),
    "tiff_alpha": lambda: _tiff(DEEP_ALPHA, photometric="rgb", extrasamples=["unassalpha"]),
    "tiff_cmyk": lambda: _tiff(DEEP_ALPHA, photometric="separated"),
    "tiff_gray": lambda: _tiff(DEEP[..., 0]),
    "tiff_12_bits": _tiff_of_12_bits,
    "tiff_float": lambda: _tiff(DEEP[..., 0].astype(np.float32)),
    "tiff_signed": lambda: _tiff(DEEP[..., 0].astype(np.int8)),
    "jpeg_2000": lambda: _cv2(DEEP, ".jp2"),
    "jpeg_2000_gray": lambda: _cv2(DEEP[..., 0], ".jp2"),
    "avif_10_bits": lambda: _cv2(DEEP // 4, ".avif", cv2.IMWRITE_AVIF_DEPTH, 10),
    "avif_12_bits": lambda: _cv2(DEEP, ".avif", cv2.IMWRITE_AVIF_DEPTH, 12),
    "icon": _icon_of_16_bits,
}

# Pillow does not read these.
UNREAD = {
    "tiff_float_color": lambda: _tiff(DEEP.astype(np.float32), photometric="rgb"),
    "tiff_lab": lambda: _tiff(DEEP, photometric="cielab"),
    "jpeg": _jpeg_of_12_bits,
    "psd": lambda: struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 64, 65, 16, 3) + bytes(100),
    "exr": lambda: b"\x76\x2f\x31\x01" + bytes(100),
}


def write_deep(path: Path, kind: str) -> Path:
    path.write_bytes({**NARROWED, **UNREAD}[kind]())
    return path
