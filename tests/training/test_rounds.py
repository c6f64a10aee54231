import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import SMALL, meta_sam, normal, ours

from sam_jax.training.losses import mask_losses, resize_logits
from sam_jax.training.prompts import next_click, noisy_box, sample_point
from sam_jax.training.rounds import _brings_click, interactive_losses

SIZE, SIDE = SMALL.image_size, SMALL.mask_size
BOX = jnp.array([20.0, 10.0, 60.0, 70.0])


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SMALL), SMALL)


@pytest.fixture(scope="module")
def embedding():
    return normal((SMALL.image_embedding_size,) * 2 + (SMALL.prompt_embed_dim,))


def target(side):
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) * SIZE / side] * 2)
    return jnp.asarray(((x > 20) & (x < 60) & (y > 10) & (y < 70)).astype(np.float32))


def step_by_step(model, embedding, target, key, rounds, is_box):
    """The same, written as one would use the model: a call of `Sam.decode` for each round."""
    first, idle, clicks = jax.random.split(key, 3)
    _, point_key, box_key = jax.random.split(first, 3)
    if is_box:
        prompt = [(p, k) for p, k in zip(noisy_box(box_key, BOX, SIZE).reshape(2, 2), (2, 3))]  # noqa: B905
    else:
        prompt = [(sample_point(point_key, target > 0.5, SIZE)[0], 1), (jnp.zeros(2), -1)]
    brings_click, previous, losses = _brings_click(idle, rounds), None, []
    for step in range(rounds):
        points, labels = (jnp.asarray(x)[None, None] for x in zip(*prompt, strict=True))
        masks, scores = model.decode(
            embedding[None], points, labels, previous, multimask_output=step == 0 and not is_box
        )
        masks, scores = masks[0, 0], scores[0, 0]
        losses.append(mask_losses(masks, scores, target))
        best = masks[scores.argmax()]
        previous = best[None, None]
        big = resize_logits(best, len(target))
        point, label = next_click(jax.random.fold_in(clicks, step), big > 0, target > 0.5, SIZE)
        if brings_click[step] and label >= 0:
            prompt.append((point, int(label)))
    return jax.tree.map(lambda *x: jnp.stack(x), *losses), len(prompt)


@pytest.mark.parametrize(("is_box", "side"), [(False, SIDE), (True, SIZE)])
def test_rounds_are_calls_of_the_model(model, embedding, is_box, side):
    key, rounds = jax.random.key(5), 5
    expected, prompts = step_by_step(model, embedding, target(side), key, rounds, is_box)
    assert prompts == 2 + 2  # four rounds more, two without a click
    actual = interactive_losses(
        model, embedding, target(side), BOX, key, rounds=rounds, box_probability=float(is_box)
    )
    for name, values in actual._asdict().items():
        assert values.shape == (rounds,)
        # An IoU may differ by a pixel.
        atol = 1e-3 if name == "mask_iou" else 1e-6
        np.testing.assert_allclose(values, getattr(expected, name), rtol=1e-4, atol=atol)


def test_schedule_is_the_papers():
    """Eight clicks in eleven rounds; none in the last and in one by chance."""
    schedules = np.array([_brings_click(jax.random.key(i), 11) for i in range(200)])
    assert (schedules.sum(1) == 8).all()
    assert not schedules[:, -2:].any()
    assert set(np.nonzero(~schedules[:, :-2])[1]) == set(range(9))
    assert np.asarray(_brings_click(jax.random.key(0), 1)).tolist() == [False]
    assert np.asarray(_brings_click(jax.random.key(0), 3)).tolist() == [True, True, False]


def test_box_and_point_are_as_likely(model, embedding):
    """Where the box's loss is another than a point's, both are seen."""
    keys = jax.random.split(jax.random.key(1), 8)

    def losses(probability):
        def one(key):
            return interactive_losses(
                model, embedding, target(SIDE), BOX, key, rounds=1, box_probability=probability
            ).total[0]

        return np.asarray(jax.vmap(one)(keys))

    points, boxes, both = losses(0.0), losses(1.0), losses(0.5)
    from_box = np.isclose(both, boxes, rtol=1e-5)
    assert np.isclose(both, points, rtol=1e-5)[~from_box].all()
    assert 0 < from_box.sum() < 8


def test_gradients_reach_every_decoder_parameter(model, embedding):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params):
        sam = nnx.merge(graphdef, params, rest)
        losses = interactive_losses(
            sam, embedding, target(SIDE), BOX, jax.random.key(0), rounds=4, box_probability=0.0
        )
        return losses.total.mean()

    gradients = nnx.to_flat_state(gradient(params))
    zero = {
        ".".join(map(str, path))
        for path, value in gradients
        if "image_encoder" not in path and not np.abs(value[...]).max() > 0
    }
    # A point's rounds have no box, clicks after the first may all be of one kind, and only one of
    # three candidates is pulled. Softmax is blind to the biases of keys.
    no_part = r"prompt_encoder\.point_embeddings.*|.*\.k_proj\.bias|.*hypernetworks_mlps\.[123]\..*"
    assert not {name for name in zero if not re.fullmatch(no_part, name)}
    assert all(np.isfinite(value[...]).all() for _, value in gradients)


def test_memory_does_not_grow_with_the_rounds(model, embedding):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rounds):
        sam = nnx.merge(graphdef, params, rest)
        return interactive_losses(
            sam, embedding, target(SIDE), BOX, jax.random.key(0), rounds=rounds
        ).total.mean()

    def kept(rounds):
        """Bytes that the backward pass needs of the forward pass."""
        pullback = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(p, rounds), params)[1], params
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

    # What goes from round to round is kept, logits above all; a round's activations are not.
    assert kept(11) - kept(3) < 8 * 4 * (SIDE**2 * 4)
