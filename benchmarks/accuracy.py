"""Accuracy of bfloat16 and float16: masks and scores of real photos, compared with float32.

    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --models vit_h --attention cudnn     # on a GPU

8 x 8 clicks per photo, three masks each. IoUs are computed at the photo's size, for masks whose
predicted IoU in float32 is above the threshold of everything mode (0.6 for a random encoder). Drift
is the difference of the scores of all masks. Embeddings, logits and scores must be finite.
ViT-H has a random image encoder: see `benchmarks.common.model_of`.
"""

import argparse
import itertools
import sys

import jax
import numpy as np

from benchmarks.common import (
    RANDOM_ENCODER,
    VITS,
    Table,
    chosen_photos,
    find_device,
    machine_line,
    machine_slug,
    model_of,
    reason,
)
from sam_jax import SamProcessor
from sam_jax.ops import attention
from sam_jax.ops.boxes import build_point_grid

CLICKS = 8
COLUMNS = (
    *("Model", "Photo", "dtype", "Attention", "Embedding", "Masks", "IoU, mean", "IoU, worst"),
    *("of 95 %", "Drift, mean", "Drift, worst"),
)


def segment(model, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding, masks [192, h, w] at the photo's size, and scores [192]."""
    processor = SamProcessor(model.config)
    clicks = build_point_grid(CLICKS) * np.array(photo.shape[1::-1])
    inputs = processor(photo, input_points=[[[click.tolist()] for click in clicks]])
    embedding = model.get_image_embeddings(inputs.pop("pixel_values"))
    outputs = model(**inputs, image_embeddings=embedding)
    if not all(np.isfinite(np.asarray(array, np.float32)).all() for array in (embedding, *outputs)):
        raise FloatingPointError("not finite")
    (masks,) = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    masks = np.asarray(masks).reshape(-1, *photo.shape[:2])
    return np.asarray(embedding, np.float32), masks, np.asarray(outputs.iou_scores).ravel()


def row(actual, expected, threshold: float) -> list[str]:
    """The table's cells that compare two results of `segment`."""
    good = expected[2] > threshold
    both = (actual[1] & expected[1]).sum((1, 2))[good]
    either = (actual[1] | expected[1]).sum((1, 2))[good]
    ious = np.sort(both / np.maximum(either, 1))
    drift = abs(actual[2] - expected[2])
    error = np.square(actual[0] - expected[0]).mean() ** 0.5
    return [
        f"{error / np.square(expected[0]).mean() ** 0.5:.1e}",
        *(f"{good.sum()}", f"{ious.mean():.4f}", f"{ious[0]:.4f}"),
        f"{ious[len(ious) // 20]:.4f}",
        *(f"{drift.mean():.4f}", f"{drift.max():.4f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [*VITS, "mobile_sam"]
    parser.add_argument("--models", nargs="+", default=["mobile_sam", "vit_h"], choices=models)
    low = ["bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", default=low, choices=low)
    parser.add_argument("--photos", nargs="*", default=[], help="prefixes of their names")
    known = [*attention._IMPLEMENTATIONS]
    parser.add_argument("--attention", nargs="+", default=["portable"], choices=known)
    args = parser.parse_args()
    chosen = chosen_photos(parser, args.photos)

    device = find_device()
    machine = f"{device.device_kind}, {machine_line()}"
    table = Table("Accuracy of low precision", COLUMNS, machine, machine_slug(device), texts=4)
    failed = False
    for name in args.models:
        is_vit = name != "mobile_sam"
        threshold = RANDOM_ENCODER["pred_iou_thresh"] if is_vit else 0.88
        attentions = args.attention if is_vit else ["portable"]
        for title, photo in chosen.items():
            with jax.default_matmul_precision("highest"):
                expected = segment(model_of(name), photo)
            for dtype, named in itertools.product(args.dtypes, attentions):
                cells = [name, title, dtype, named]
                try:
                    cells += row(segment(model_of(name, dtype, named), photo), expected, threshold)
                except Exception as error:  # measure the others anyway
                    # The chosen attention may not run here.
                    failed |= named == "portable" or isinstance(error, FloatingPointError)
                    cells += [reason(error)] + [""] * (len(COLUMNS) - len(cells) - 1)
                table.add(cells)
    sys.exit(failed)


if __name__ == "__main__":
    main()
