"""Interactive training: a prompt, a mask, a click where it is wrong, and so on (paper, appendix A).

For one object of one image, without batch axes: `jax.vmap` adds them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sam_jax.models.mask_decoder import output_slice
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, NOT_A_POINT, PADDING
from sam_jax.training.losses import LossWeights, MaskLosses, mask_losses, resize_logits
from sam_jax.training.simulate import Key, next_click, noisy_box, sample_point

PAPER_ROUNDS = 11


def interactive_losses(
    model: Sam,
    image_embedding: Float[Array, "g g c"],
    target: Float[Array, "h w"],
    box: Float[Array, "4"],
    key: Key,
    *,
    num_rounds: int = PAPER_ROUNDS,
    box_probability: float = 0.5,
    weights: LossWeights = LossWeights(),  # noqa: B008
) -> MaskLosses:
    """The losses [rounds] of several rounds of prompting for one object.

    The prompt of the first round is a point in the object or its box with noise. Each later round
    adds a click where the previous mask was wrong, and the previous logits as a mask prompt,
    without a gradient through them. With more than three rounds, the last one and one at random add
    no click, so that the model learns to refine its own mask. A single point is ambiguous and has
    three candidate masks; all other prompts have one, even a box, for which the paper has three.

    The rounds are a `jax.lax.scan` whose steps are recomputed in the backward pass, so memory does
    not depend on their number.

    Args:
        model: its prompt encoder and mask decoder are used.
        image_embedding: from `Sam.encode_image`.
        target: the object's mask, covering the whole model input, at any resolution.
        box: the object's box, x0, y0, x1, y1 in pixels of the model's input.
        key: a `jax.random` key.
        num_rounds: number of rounds; the paper's is 11.
        box_probability: probability that the first prompt is the box.
        weights: see `mask_losses`.
    """
    size, side = model.config.image_size, model.config.mask_size
    image = model.mask_decoder.image_features(image_embedding)
    image_pe = model.prompt_encoder.get_dense_pe()
    first_key, idle_key, click_key = jax.random.split(key, 3)
    inside = target > 0.5
    points, labels, is_box = first_prompt(first_key, inside, box, size, box_probability)
    # Slots for all later clicks; padding is exact, so they have no effect until they are used.
    points = jnp.pad(points, ((0, num_rounds - 1), (0, 0)))
    labels = jnp.pad(labels, (0, num_rounds - 1), constant_values=PADDING)
    brings_click = click_schedule(idle_key, num_rounds)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_round(carry, step):
        points, labels, previous = carry
        masks, scores = _decode(model, image, image_pe, points, labels, previous, step)
        ambiguous = (step == 0) & ~is_box
        first = jnp.arange(len(scores)) == 0
        candidates = jnp.where(ambiguous, ~first, first)
        losses = mask_losses(masks, scores, target, candidates, weights)

        best = jnp.where(candidates, scores, -jnp.inf).argmax()
        previous = jax.lax.stop_gradient(masks[best])
        predicted = resize_logits(previous, target.shape[-1]) > 0
        point, label = next_click(jax.random.fold_in(click_key, step), predicted, inside, size)
        label = jnp.where(brings_click[step], label, PADDING)
        slot = 2 + step  # out of range, and dropped, after the last round
        return (points.at[slot].set(point), labels.at[slot].set(label), previous), losses

    start = points, labels, jnp.zeros((side, side), jnp.float32)
    _, losses = jax.lax.scan(one_round, start, jnp.arange(num_rounds))
    return losses


def first_prompt(key, inside, box, image_size, box_probability):
    """Two labeled points, a box's corners or a point and the end token, and whether it is a box."""
    choice, point_key, box_key = jax.random.split(key, 3)
    is_box = jax.random.bernoulli(choice, box_probability)
    point, _ = sample_point(point_key, inside, image_size)
    corners = noisy_box(box_key, box, image_size).reshape(2, 2)
    points = jnp.where(is_box, corners, jnp.stack([point, jnp.zeros_like(point)]))
    labels = jnp.where(
        is_box,
        jnp.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]),
        jnp.array([FOREGROUND, NOT_A_POINT]),
    )
    return points, labels, is_box


def click_schedule(key, num_rounds):
    """Whether each round adds a click for the next round."""
    following = jnp.arange(1, num_rounds + 1)
    if num_rounds <= 3:
        return following < num_rounds
    idle = jax.random.randint(key, (), 1, num_rounds - 1)
    return (following < num_rounds - 1) & (following != idle)


def _decode(model, image, image_pe, points, labels, previous, step):
    """All four masks and predicted IoUs of a prompt, with a mask prompt from the second round."""
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    image_embedding, hq_features = image
    sparse, sparse_mask = encoder(points, labels)
    dense = jnp.where(step > 0, encoder.embed_mask(previous), encoder.embed_mask(None))
    outputs = output_slice(None)
    iou_token, mask_tokens, keys = decoder.run_transformer(
        image_embedding, image_pe, sparse, sparse_mask, dense, outputs
    )
    masks = decoder.predict_masks(mask_tokens, keys, outputs, hq_features)
    return masks, decoder.predict_iou(iou_token)
