"""Everything mode compared with Meta's generator on PyTorch: same masks? how much faster?

    python -m benchmarks.everything                      # MobileSAM on four photos
    python -m benchmarks.everything --crops              # the same with two layers of crops
    python -m benchmarks.everything --model vit_b        # one photo

Both run in one process, one after the other, on the same weights and images. Times are printed only
if the masks agree. Both are warm. Meta's generator, which compiles nothing, runs once per photo;
for sam_jax, which takes seconds, the time is the median.

ViT-B has a random image encoder here, with MobileSAM's neck, prompt encoder and mask decoder. Masks
that they find in noise score lower than objects, so the thresholds are lower, to keep as many masks
as in a photo. These masks are small, and single pixels may differ.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import (
    RANDOM_ENCODER,
    Table,
    check_at_least_one,
    chosen_photos,
    compare,
    find_device,
    in_pytorch,
    machine_line,
    machine_slug,
    matrix_rate,
    model_of,
    photos,
    timed,
)
from sam_jax.automatic.generator import SamAutomaticMaskGenerator

sys.path.append(str(Path(__file__).parents[1] / "convert"))
import torch_reference

COLUMNS = (
    *("Photo", "Masks, Meta", "sam_jax", "Worst IoU", "IoU >= 0.999", "Scores"),
    *("Meta", "First", "sam_jax", "Ratio"),
)
CROPS = {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mobile_sam", "vit_b"), default="mobile_sam")
    parser.add_argument("--crops", action="store_true", help="two layers of crops")
    parser.add_argument("--photos", nargs="*", help="prefixes of their names")
    parser.add_argument("--repeat", type=int, default=3, help="runs of sam_jax; the median counts")
    args = parser.parse_args()
    check_at_least_one(parser, repeat=args.repeat)
    wanted = chosen_photos(parser, args.photos or ["landscape"] * (args.model == "vit_b"))

    model = model_of(args.model)
    torch_sam = in_pytorch(model)
    options = {"output_mode": "coco_rle"} | (CROPS if args.crops else {})
    options |= RANDOM_ENCODER if args.model == "vit_b" else {}
    reference = torch_reference.import_reference("segment_anything").SamAutomaticMaskGenerator(
        torch_sam, **options
    )
    warm = torch_reference.import_reference("segment_anything").SamAutomaticMaskGenerator(
        torch_sam, points_per_side=4
    )
    warm.generate(photos()["small 226x150"])
    generator = SamAutomaticMaskGenerator(model, **options)

    machine = machine_line(("jax", "torch"), matrix_rate())
    heading = f"Everything mode and Meta's, {args.model}{', two layers of crops' * args.crops}"
    table = Table(heading, COLUMNS, machine, machine_slug(find_device()))
    for name, photo in wanted.items():
        actual, first = timed(generator.generate, photo)
        ours = float(np.median([timed(generator.generate, photo)[1] for _ in range(args.repeat)]))
        expected, theirs = timed(reference.generate, photo)
        ious, scores = compare(actual, expected, pixels=int(args.model == "vit_b"))
        worst, good = ious.min(initial=1.0), (ious >= 0.999).sum() >= 0.99 * len(ious)
        if len(actual) != len(expected) or worst < 0.99 or not good or scores > 1e-3:
            raise SystemExit(
                f"{name}: the masks differ: {len(actual)} of ours, {len(expected)} of Meta's, "
                f"worst IoU {worst:.6f}, scores {scores:.0e}"
            )
        table.add(
            [
                *(name, f"{len(expected)}", f"{len(actual)}", f"{worst:.6f}"),
                *(f"{(ious >= 0.999).mean():.1%}", f"{scores:.0e}", f"{theirs:.1f} s"),
                *(f"{first:.1f} s", f"{ours:.1f} s", f"{theirs / ours:.1f}"),
            ]
        )


if __name__ == "__main__":
    main()
