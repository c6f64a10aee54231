"""Teaches SAM what a click means with four prompt tokens, and changes nothing in it.

    python examples/prompt_tuning.py

A click in the middle of a cell is on its nucleus, which MobileSAM often takes for the object. Here
1,024 numbers are trained that follow each click's own tokens, on eight images that `cells.py`
draws; the model stays as it is. Prints the mean IoU of the cells of four other images without and
with the tokens, and draws one of these in `prompt_tuning.png`.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cells import draw, region
from matplotlib.figure import Figure

from sam_jax import Sam, SamProcessor, from_pretrained, join_prompts

TOKENS = 4
CELLS = 8  # of each image, since all images have as many
OPTIMIZER = optax.adam(0.1)


class Cells(NamedTuple):
    """Images with a click in each of their cells."""

    images: np.ndarray
    """uint8 [n, h, w, 3]"""
    embeddings: jax.Array
    """float32 [n, 64, 64, 256]"""
    points: jax.Array
    """float32 [n, cells, 2, 2]: the click, in pixels of the model's input, and what ends it"""
    labels: jax.Array
    """int32 [n, cells, 2]"""
    masks: jax.Array
    """bool [n, cells, 256, 256]: the cells, at the size of the decoder's masks"""


def draw_cells(model: Sam, count: int, seed: int) -> Cells:
    """Draws images and encodes them."""
    rng = np.random.default_rng(seed)
    images, outlines = zip(*(draw(rng) for _ in range(count)), strict=True)
    processor = SamProcessor(model.config)
    encode = jax.jit(lambda model, pixels: model.encode_image(pixels))
    pixels = processor(list(images))["pixel_values"]
    embeddings = [encode(model, pixels[[i]]) for i in range(count)]  # one by one, to save memory

    masks = np.array([[region(cell) for cell in cells[:CELLS]] for cells in outlines])
    centers = [[np.argwhere(mask).mean(0)[::-1] for mask in cells] for cells in masks]
    clicks = processor.scale_coords(centers, masks.shape[-2:])
    points, labels = join_prompts(clicks[:, :, None], None, None)
    logits = processor.mask_to_logits(masks)[:, :, 0]
    arrays = jnp.concatenate(embeddings), points, labels, logits > 0
    return Cells(np.array(images), *map(jnp.asarray, arrays))


def decode(model: Sam, cells: Cells, tokens: jax.Array | None) -> jax.Array:
    """The mask logits [n, cells, 256, 256] of each click followed by the tokens.

    A click alone is ambiguous: without tokens, it is the candidate of the best predicted IoU.
    """
    multimask_output = tokens is None
    if tokens is not None:  # the same for all images and clicks
        tokens = jnp.broadcast_to(tokens, (*cells.points.shape[:2], *tokens.shape))
    masks, scores = model.decode(
        cells.embeddings,
        cells.points,
        cells.labels,
        sparse_embeddings=tokens,
        multimask_output=multimask_output,
    )
    best = scores.argmax(2)[..., None, None, None]
    return jnp.take_along_axis(masks, best, 2)[:, :, 0]


@jax.jit
def mean_iou(model: Sam, cells: Cells, tokens: jax.Array | None) -> jax.Array:
    """Of all cells of all images."""
    found = decode(model, cells, tokens) > 0
    both, either = (x.sum((-2, -1)) for x in (found & cells.masks, found | cells.masks))
    return (both / either).mean()


@functools.partial(jax.jit, static_argnames="steps")
def tune(model: Sam, cells: Cells, key: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Trains tokens [4, 256] with an image at random in each step; also returns the losses."""
    first, *keys = jax.random.split(key, steps + 1)
    tokens = 0.02 * jax.random.normal(first, (TOKENS, model.config.prompt_embed_dim))

    def step(carry, key):
        tokens, state = carry
        i = jax.random.randint(key, (1,), 0, len(cells.embeddings))
        batch = Cells(*(None if x is None else x[i] for x in cells))

        def loss(tokens):
            logits = decode(model, batch, tokens)
            return optax.sigmoid_binary_cross_entropy(logits, batch.masks).mean()

        value, gradient = jax.value_and_grad(loss)(tokens)
        updates, state = OPTIMIZER.update(gradient, state)
        return (optax.apply_updates(tokens, updates), state), value

    (tokens, _), losses = jax.lax.scan(step, (tokens, OPTIMIZER.init(tokens)), jnp.stack(keys))
    return tokens, losses


def main(output: Path = Path("prompt_tuning.png"), train: int = 8, steps: int = 100) -> list[float]:
    """Trains, compares and draws; returns the mean IoU without and with the tokens."""
    model = from_pretrained("mobile_sam")
    cells, others = draw_cells(model, train, seed=0), draw_cells(model, 4, seed=1)
    tokens, _ = tune(model, cells, jax.random.key(0), steps)
    ious = [float(mean_iou(model, others, t)) for t in (None, tokens)]

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    titles = ("annotated", "a click", f"a click and {TOKENS} tokens")
    one = Cells(*(x[:1] for x in others))
    drawn = one.masks, *(decode(model, one, t) > 0 for t in (None, tokens))
    side, size = model.config.mask_size, model.config.image_size
    for axes, title, masks in zip(figure.subplots(1, 3), titles, drawn, strict=True):
        axes.imshow(one.images[0], extent=(0, side, side, 0))
        for mask in masks[0]:
            axes.contour(mask, [0.5], colors="tab:blue")
        axes.plot(*one.points[0, :, 0].T * side / size, "k.", markersize=4)
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(output, dpi=100)
    print(f"mean IoU {ious[0]:.3f} (the best of three masks), {ious[1]:.3f} with {TOKENS} tokens")
    print(output)
    return ious


if __name__ == "__main__":
    main()
