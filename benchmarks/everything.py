"""Everything-mode beside Meta's generator on PyTorch: the same masks? how much faster?

    python -m benchmarks.everything                      # MobileSAM on four photos
    python -m benchmarks.everything --crops              # the same with two layers of crops
    python -m benchmarks.everything --model vit_b        # one photo

Both run in one process, one after the other, on the same weights and pictures. Times are printed
only where the masks agree. Both are warm; Meta's, which compiles nothing, runs once on each photo,
and of ours, which takes seconds, the median counts.

ViT-B has a random image encoder here, with MobileSAM's neck after it; prompt encoder and mask
decoder are the official ones, of MobileSAM. What they find in noise scores lower than objects do,
and so the thresholds are lower, for as many masks to pass as in a photo; these are small, and a
pixel of them may differ.
"""

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pycocotools.mask
import skimage.data
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from sam_jax import from_pretrained
from sam_jax.checkpoints.params import build_model, param_shapes
from sam_jax.checkpoints.sources import locate
from sam_jax.checkpoints.torch_names import from_torch
from sam_jax.config import mobile_sam, vit_b, vit_h, vit_l
from sam_jax.mask_generator import SamAutomaticMaskGenerator

sys.path.append(str(Path(__file__).parents[1] / "convert"))
import torch_reference

CROPS = {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2}
RANDOM_ENCODER = {"pred_iou_thresh": 0.6, "stability_score_thresh": 0.7}


def photos() -> dict[str, np.ndarray]:
    """Photos of scikit-image's wheel: landscape, portrait, small, larger than 1024 pixels."""

    def resized(image, width, height):
        return np.asarray(Image.fromarray(image).resize((width, height)))

    return {
        "landscape 600x400": skimage.data.coffee(),
        "portrait 300x512": np.ascontiguousarray(skimage.data.astronaut()[:, 100:400]),
        "small 226x150": resized(skimage.data.chelsea(), 226, 150),
        "large 1601x1068": resized(skimage.data.rocket(), 1601, 1068),
    }


def models(name: str, dtype: str = "float32"):
    """The PyTorch model and ours, of the same weights; ours computes in `dtype`."""
    mobile = torch_reference.meta_sam(mobile_sam())
    mobile.load_state_dict(torch.load(locate("mobile_sam"), weights_only=True))
    if name == "mobile_sam":
        return mobile.eval(), from_pretrained(name, dtype=jax.numpy.dtype(dtype))
    torch.manual_seed(0)
    config = {"vit_b": vit_b, "vit_l": vit_l, "vit_h": vit_h}[name]()
    sam = torch_reference.meta_sam(config)
    for module in sam.image_encoder.modules():
        for p in module.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.02)
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    same = mobile.image_encoder.neck[1:]  # what comes after the 1 x 1 convolution
    sam.image_encoder.neck[1:].load_state_dict(same.state_dict())
    for part in ("prompt_encoder", "mask_decoder"):
        getattr(sam, part).load_state_dict(getattr(mobile, part).state_dict())
    tensors = {k: v.numpy() for k, v in sam.state_dict().items()}
    params = from_torch(tensors, config, param_shapes(config))
    return sam.eval(), build_model(params, config, dtype=jax.numpy.dtype(dtype))


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def compare(actual: list[dict], expected: list[dict], pixels: int) -> tuple[np.ndarray, float]:
    """IoUs of masks matched one to one, and the largest difference of their scores.

    So many pixels more or less above a threshold of stability are no difference.
    """
    masks = [[record["segmentation"] for record in records] for records in (actual, expected)]
    ious = np.array(pycocotools.mask.iou(*masks, [0] * len(expected)))
    ious = ious.reshape(len(actual), len(expected))  # pycocotools gives [] for no masks
    rows, columns = linear_sum_assignment(-ious)
    scores = []
    for i, j in zip(rows, columns, strict=True):
        ours, theirs = actual[i], expected[j]
        scores.append(abs(ours["predicted_iou"] - theirs["predicted_iou"]))
        difference = abs(ours["stability_score"] - theirs["stability_score"])
        scores.append(max(difference - pixels / theirs["area"], 0))
    return ious[rows, columns], max(scores, default=0.0)


def matrix_rate(dtype: str = "float32") -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = [timed(lambda: product(a).block_until_ready())[1] for _ in range(10)]
    return 2 * side**3 / float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mobile_sam", "vit_b"), default="mobile_sam")
    parser.add_argument("--crops", action="store_true", help="two layers of crops")
    parser.add_argument("--photos", nargs="*", help="beginnings of their names")
    parser.add_argument("--repeat", type=int, default=3, help="runs of ours; the median counts")
    args = parser.parse_args()

    torch_sam, model = models(args.model)
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
    wanted = tuple(args.photos or (["landscape"] if args.model == "vit_b" else [""]))

    packages = ", ".join(f"{p} {version(p)}" for p in ("jax", "torch"))
    print(
        f"{jax.devices()[0].device_kind}, {platform.machine()}, Python "
        f"{platform.python_version()}, {packages}; {matrix_rate() / 1e9:.0f} GFLOP/s\n"
    )
    print(
        "| Photo | Masks, Meta | Ours | Worst IoU | IoU >= 0.999 | Scores | Meta | First | Ours "
        "| Ratio |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, photo in photos().items():
        if not name.startswith(wanted):
            continue
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
        print(
            f"| {name} | {len(expected)} | {len(actual)} | {worst:.6f} "
            f"| {(ious >= 0.999).mean():.1%} | {scores:.0e} | {theirs:.1f} s | {first:.1f} s "
            f"| {ours:.1f} s | {theirs / ours:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
