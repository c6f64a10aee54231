"""Segments an image from a click with the JAX programs of `sam-jax export`, without sam_jax.

    sam-jax export mobile_sam --output exported
    python examples/load_export.py exported photo.jpg 450 600

This writes `mask.png`. It needs jax, flatbuffers, numpy, pillow and safetensors.
"""

import json
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

# Not all of Pillow's formats: for EPS, whatever the file's name, it would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def load(folder: Path):
    """The folder's settings, and its encoder and decoder as compiled functions."""
    config = json.loads((folder / "config.json").read_text())
    params = jax.device_put(load_file(folder / "params.safetensors"))

    def program(name):
        exported = jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes()))
        compiled = jax.jit(exported.call)
        return lambda *arrays: compiled(params, *arrays)

    return config, program("encoder"), program("decoder")


def preprocess(image: Image.Image, config) -> tuple[np.ndarray, tuple[int, int]]:
    """The encoder's input, and (height, width) of the resized image in it."""
    size = config["image_size"]
    width, height = size, size
    if config["resize"] == "longest_side":
        width, height = (max(1, int(n * size / max(image.size) + 0.5)) for n in image.size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    pixels = np.zeros((1, size, size, 3), np.float32)
    mean, std = np.float32(config["pixel_mean"]), np.float32(config["pixel_std"])
    if config["normalization"] == "min_max":
        mean, std = resized.min(), max(np.ptp(resized), 1)
    pixels[0, :height, :width] = (resized - mean) / std
    return pixels, (height, width)


def main(folder: str, path: str, x: str, y: str, output: str = "mask.png") -> None:
    """Segments the object at pixel (x, y) of the image."""
    config, encoder, decoder = load(Path(folder))
    image = Image.open(path, formats=FORMATS)
    if ";16" in str(image.tile):  # conversion to RGB would clip it or keep the high byte
        sys.exit(f"{path} has 16 bits per channel, expected 8")
    image = ImageOps.exif_transpose(image).convert("RGB")
    pixels, (height, width) = preprocess(image, config)
    embedding = encoder(pixels)  # once per image

    # A click on the object (1); a list without a box ends with "not a point" (-1).
    click = [float(x) * width / image.width, float(y) * height / image.height]
    points = np.array([[[click, [0, 0]]]], np.float32)
    labels = np.array([[[1, -1]]], np.int32)
    masks, scores = decoder(embedding, points, labels)

    # One click is ambiguous: take the best mask except for the first, which is for other prompts.
    best = 1 + int(scores[0, 0, 1:].argmax())
    size = config["image_size"]
    logits = masks[0, 0, best]
    logits = jax.image.resize(logits, (size, size), "bilinear", antialias=False)[:height, :width]
    shape = (image.height, image.width)
    logits = jax.image.resize(logits, shape, "bilinear", antialias=False)
    mask = np.asarray(logits > config["mask_threshold"])
    Image.fromarray(mask).save(output)
    print(f"{output}  predicted IoU {float(scores[0, 0, best]):.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    main(*sys.argv[1:])
