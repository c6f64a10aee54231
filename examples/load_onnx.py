"""Segments an image from a click with the ONNX models of `sam-jax export`, without sam_jax.

    sam-jax export mobile_sam --format onnx --output exported
    python examples/load_onnx.py exported photo.jpg 450 600

This writes `mask.png`. It needs onnxruntime, numpy and pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

# Not all of Pillow's formats: for EPS, whatever the file's name, it would run Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")


def main(folder: str, path: str, x: str, y: str, output: str = "mask.png") -> None:
    """Segments the object at pixel (x, y) of the image."""
    config = json.loads(Path(folder, "config.json").read_text())
    encoder, decoder = (
        onnxruntime.InferenceSession(Path(folder, f"{name}.onnx"))
        for name in ("encoder", "decoder")
    )
    image = Image.open(path, formats=FORMATS)
    if ";16" in str(image.tile):  # conversion to RGB would clip it or keep the high byte
        sys.exit(f"{path} has 16 bits per channel, expected 8")
    image = ImageOps.exif_transpose(image).convert("RGB")
    scale = config["image_size"] / max(image.size)
    width, height = (max(1, int(n * scale + 0.5)) for n in image.size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    (embedding,) = encoder.run(None, {"input_image": resized})  # once per image

    # A click on the object (1); a list without a box ends with "not a point" (-1).
    click = [float(x) * width / image.width, float(y) * height / image.height]
    side = config["mask_size"]
    masks, scores, _ = decoder.run(
        None,
        {
            "image_embeddings": embedding,
            "point_coords": np.array([[click, [0, 0]]], np.float32),
            "point_labels": np.array([[1, -1]], np.float32),
            "mask_input": np.zeros((1, 1, side, side), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.array([image.height, image.width], np.float32),
        },
    )
    # One click is ambiguous: take the best mask except for the first, which is for other prompts.
    best = 0 if config["single_mask"] else 1 + int(scores[0, 1:].argmax())
    Image.fromarray(masks[0, best] > config["mask_threshold"]).save(output)
    print(f"{output}  predicted IoU {scores[0, best]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    main(*sys.argv[1:])
