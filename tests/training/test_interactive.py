import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import first_prompts
from flax import nnx
from reference import SHALLOW, normal

from sam_jax.training.interactive import click_schedule, interactive_losses
from sam_jax.training.losses import mask_losses, resize_logits
from sam_jax.training.rules import combine, partition
from sam_jax.training.simulate import next_click

SIZE, SIDE = SHALLOW.image_size, SHALLOW.mask_size
BOX = jnp.array([20.0, 10.0, 60.0, 70.0])


@pytest.fixture(scope="module")
def embedding():
    return normal((SHALLOW.image_embedding_size,) * 2 + (SHALLOW.prompt_embed_dim,))


def target(side):
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) * SIZE / side] * 2)
    return jnp.asarray(((x > 20) & (x < 60) & (y > 10) & (y < 70)).astype(np.float32))


def step_by_step(model, embedding, target, key, rounds, is_box):
    """Does the same with the public API: one call of `Sam.decode` per round."""
    first, idle, clicks = jax.random.split(key, 3)
    point, box, _ = map(np.asarray, first_prompts(first, target > 0.5, BOX))
    if is_box:
        prompt = list(zip(box.reshape(2, 2), (2, 3), strict=True))
    else:
        prompt = [(point, 1), (np.zeros(2, np.float32), -1)]

    @functools.partial(jax.jit, static_argnames="multimask_output")
    def one_round(points, labels, previous, step, multimask_output):
        masks, scores = model.decode(
            embedding[None], points, labels, masks=previous, multimask_output=multimask_output
        )
        masks, scores = masks[0, 0], scores[0, 0]
        best = masks[scores.argmax()]
        big = resize_logits(best, len(target))
        click = next_click(jax.random.fold_in(clicks, step), big > 0, target > 0.5, SIZE)
        return mask_losses(masks, scores, target), best[None, None], click

    brings_click, previous, losses = np.asarray(click_schedule(idle, rounds)), None, []
    for step in range(rounds):
        padding = [(np.zeros(2, np.float32), -10)] * (2 + rounds - len(prompt))  # same shapes
        points, labels = (np.array(x)[None, None] for x in zip(*prompt, *padding, strict=True))
        loss, previous, (point, label) = one_round(
            points, labels, previous, step, multimask_output=step == 0 and not is_box
        )
        losses.append(loss)
        if brings_click[step] and label >= 0:
            prompt.append((point, int(label)))
    return jax.tree.map(lambda *x: np.stack(x), *losses), len(prompt)


@pytest.mark.parametrize(
    ("is_box", "side", "rounds"),
    [(False, SIDE, 5), pytest.param(True, SIZE, 4, marks=pytest.mark.slow)],
)
def test_rounds_match_calls_of_the_model(model, embedding, is_box, side, rounds):
    key = jax.random.key(5)
    expected, prompts = step_by_step(model, embedding, target(side), key, rounds, is_box)
    assert prompts == 2 + rounds - 3  # two of the rounds after the first bring no click
    actual = jax.jit(interactive_losses, static_argnames=("num_rounds", "box_probability"))(
        model, embedding, target(side), BOX, key, num_rounds=rounds, box_probability=float(is_box)
    )
    for name, values in actual._asdict().items():
        assert values.shape == (rounds,)
        # IoUs may differ by one pixel.
        atol = 1e-3 if name == "mask_iou" else 1e-6
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-4, atol=atol)


def test_the_previous_mask_is_a_constant(model, embedding):
    """Later rounds do not train what only the first one uses: the masks of an ambiguous prompt."""
    masks_1_to_3 = (r"mask_decoder\.output_hypernetworks_mlps\.[1-3]\..*", 1.0), (".*", None)
    params, rest = partition(model, masks_1_to_3)

    def total(params):
        return interactive_losses(
            combine(params, rest),
            embedding,
            target(SIDE),
            BOX,
            jax.random.key(5),
            num_rounds=2,
            box_probability=0.0,
        ).total

    gradients = jax.tree.leaves(jax.jit(jax.jacrev(total))(params))
    assert any(first.any() for first, _ in gradients)
    assert not any(second.any() for _, second in gradients)


def test_schedule_matches_the_paper():
    """Eleven rounds bring eight clicks: the last one and a random one bring none."""
    keys = jax.vmap(jax.random.key)(np.arange(200))
    schedules = np.asarray(jax.vmap(lambda key: click_schedule(key, 11))(keys))
    assert (schedules.sum(1) == 8).all()
    assert not schedules[:, -2:].any()
    assert set(np.nonzero(~schedules[:, :-2])[1]) == set(range(9))
    assert np.asarray(click_schedule(jax.random.key(0), 1)).tolist() == [False]
    assert np.asarray(click_schedule(jax.random.key(0), 3)).tolist() == [True, True, False]


@pytest.mark.slow
def test_boxes_and_points_are_both_drawn(model, embedding):
    """A loss that differs from the point's is the box's."""
    keys = jax.random.split(jax.random.key(1), 8)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(probability):
        def one(key):
            return interactive_losses(
                model, embedding, target(SIDE), BOX, key, num_rounds=1, box_probability=probability
            ).total[0]

        return jax.vmap(one)(keys)

    points, both = (np.asarray(losses(p)) for p in (0.0, 0.5))
    assert 0 < np.isclose(both, points, rtol=1e-5).sum() < 8


@pytest.mark.slow
def test_gradients_reach_every_decoder_parameter(model, embedding):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params, weights):
        sam = nnx.merge(graphdef, params, rest)
        losses = interactive_losses(
            sam, embedding, target(SIDE), BOX, jax.random.key(0), num_rounds=4, box_probability=0.0
        )
        return losses.total @ weights

    def without_part(gradients):
        return {
            ".".join(map(str, path))
            for path, value in gradients
            if "image_encoder" not in path and not np.abs(value[...]).max() > 0
        }

    gradients = nnx.to_flat_state(gradient(params, jnp.full(4, 0.25)))
    zero = without_part(gradients)
    # Rounds that start with a point have no box, later clicks may all have the same label, and only
    # one of three candidates is pulled. Softmax ignores the biases of keys.
    no_part = r"prompt_encoder\.point_embeddings.*|.*\.k_proj\.bias|.*hypernetworks_mlps\.[123]\..*"
    assert not {name for name in zero if not re.fullmatch(no_part, name)}
    assert all(np.isfinite(value[...]).all() for _, value in gradients)
    # Only the first round uses the three candidates' networks: later rounds' losses could reach
    # them only through the mask prompt.
    later = without_part(nnx.to_flat_state(gradient(params, jnp.array([0.0, 1.0, 1.0, 1.0]))))
    candidates = re.compile(r".*hypernetworks_mlps\.[123]\..*")
    assert any(map(candidates.fullmatch, later - zero))
    names = {".".join(map(str, path)) for path, _ in gradients}
    assert set(filter(candidates.fullmatch, names)) <= later


def test_memory_does_not_grow_with_the_rounds(model, embedding):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rounds):
        sam = nnx.merge(graphdef, params, rest)
        return interactive_losses(
            sam, embedding, target(SIDE), BOX, jax.random.key(0), num_rounds=rounds
        ).total.mean()

    def kept(rounds):
        """Bytes that the backward pass needs from the forward pass."""
        pullback = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(p, rounds), params)[1], params
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

    # Only what one round passes to the next is kept, mostly logits; activations are not.
    assert kept(11) - kept(3) < 8 * 4 * (SIDE**2 * 4)
