"""What takes the time of everything mode on a CPU, and how far it is from the machine's limit.

    python -m benchmarks.everything_profile

MobileSAM, default arguments, one photo. Each part runs alone on a grid of 8 x 8 points, one after
the other in one compiled loop; its time is multiplied by 16. The floor is the time of its
floating-point operations at the rate of a matrix product of the decoder's shape (4096 x 256 by
256 x 4096, float32). Then comes the transformer's time per point for several chunk sizes.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from flax import nnx

from benchmarks.common import Table, machine_line, timed
from sam_jax import SamAutomaticMaskGenerator, SamProcessor, from_pretrained
from sam_jax.automatic.device import chunk_sizes, run_transformer
from sam_jax.models.compiled import encode_image
from sam_jax.models.mask_decoder import output_slice
from sam_jax.ops.boxes import build_point_grid
from sam_jax.ops.mask_statistics import make_upsampler, mask_statistics

POINTS, REPEAT = 64, 5


def seconds(function: Callable, *args) -> float:
    """The median of several runs, without compilation."""
    jax.block_until_ready(function(*args))
    runs = [timed(function, *args)[1] for _ in range(REPEAT)]
    return float(np.median(runs))


def flops(function: Callable, *args) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    photo = skimage.data.coffee()
    model = from_pretrained("mobile_sam")
    config, decoder = model.config, model.mask_decoder
    outputs = output_slice(multimask_output=True)
    processor = SamProcessor(config)
    graphdef, params = nnx.split(model)
    pixels = processor.preprocess(photo)[None]
    embedding = encode_image(graphdef, params, pixels)[0]
    chunk, _, _, tile = chunk_sizes(64, "cpu")
    grid = build_point_grid(int(POINTS**0.5)) * np.array(photo.shape[1::-1])
    coords = processor.scale_coords(grid, photo.shape[:2])

    def of_points(params, coords):
        return run_transformer(nnx.merge(graphdef, params), embedding, coords, outputs)

    def upscale(params, tokens, keys):
        decoder = nnx.merge(graphdef, params).mask_decoder
        return decoder.predict_masks(tokens, keys, outputs)

    def over_all(function):
        return jax.jit(lambda params, *xs: jax.lax.map(lambda x: function(params, *x), xs))

    def one_by_one(function):
        """Keeps only the last result; everything mode keeps none."""

        def call(params, *xs):
            one = functools.partial(function, params)
            shapes = jax.eval_shape(one, *(x[0] for x in xs))
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.scan(lambda _, x: (one(*x), None), nothing, xs)[0]

        return jax.jit(call)

    def per_point_of(chunk):
        return seconds(one_by_one(of_points), params, coords.reshape(-1, chunk, 2)) / POINTS

    groups = coords.reshape(-1, chunk, 2)
    per_point = per_point_of(chunk)
    iou_tokens, tokens, keys = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), over_all(of_points)(params, groups)
    )
    per_upscaled = seconds(one_by_one(upscale), params, tokens, keys) / POINTS
    masks = over_all(upscale)(params, tokens, keys).reshape(-1, config.mask_size, config.mask_size)
    scores = jax.vmap(decoder.predict_iou)(iou_tokens)[:, outputs].reshape(-1)
    masks = masks[np.asarray(scores) > 0.88]
    sizes = processor.input_size(photo.shape[:2]), photo.shape[:2]
    full = make_upsampler(config.mask_size, config.image_size, *sizes, 4096, tile)
    full = jax.tree.map(jnp.asarray, full)
    statistics = one_by_one(lambda _, mask: mask_statistics(mask, full, 0.0, 1.0))
    per_mask = seconds(statistics, params, masks) / len(masks)

    a, b = np.ones((4096, 256), np.float32), np.ones((256, 4096), np.float32)
    rate = 2 * 4096 * 4096 * 256 / seconds(jax.jit(jnp.matmul), a, b)
    # For one additional point, since work that an image's points share is done once.
    work_point = flops(of_points, params, coords[:3]) - flops(of_points, params, coords[:2])
    work_upscale = flops(upscale, params, tokens[0], keys[0])

    generator = SamAutomaticMaskGenerator(model, output_mode="coco_rle")
    generator.generate(photo)
    whole = float(np.median([timed(generator.generate, photo)[1] for _ in range(3)]))
    encoded = seconds(encode_image, graphdef, params, pixels)
    passing = len(masks) / POINTS
    floor = 1024 * (work_point + work_upscale) / rate
    parts = {
        "image encoder": (encoded, None),
        "two-way transformer, 1024 points": (1024 * per_point, 1024 * work_point / rate),
        "upscaling, 1024 points": (1024 * per_upscaled, 1024 * work_upscale / rate),
        f"measuring, {passing:.1f} masks a point": (1024 * passing * per_mask, None),
    }
    machine = (
        f"{machine_line(rate=rate)} at the decoder's shape; {work_point / 1e9:.2f} and "
        f"{work_upscale / 1e9:.2f} GFLOP a point for transformer and upscaling"
    )
    table = Table("Where everything mode's time goes", ("Part", "Time", "Floor", "Ratio"), machine)
    rest = whole - sum(time for time, _ in parts.values())
    for name, (time, least) in {**parts, "everything else": (rest, None)}.items():
        limit = ("", "") if least is None else (f"{least:.1f} s", f"{time / least:.1f}")
        table.add([name, f"{time:.1f} s", *limit])
    table.add(["all of `generate`", f"{whole:.1f} s", f"{floor:.1f} s", f"{whole / floor:.1f}"])

    columns = ("Points at a time", "Transformer, a point")
    table = Table("The transformer by points at a time", columns, machine_line(rate=rate), texts=0)
    for n in (1, 2, 4, 8, 16, POINTS):
        table.add([n, f"{1000 * per_point_of(n):.1f} ms"])


if __name__ == "__main__":
    main()
