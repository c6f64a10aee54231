"""A training step as pure functions of arrays, for one's own loop or for `examples/finetune.py`.

params, rest = partition(model, DECODER_ONLY)
tx = adamw(1e-4, DECODER_ONLY)
state = init_state(params, tx)
state, metrics = train_step(state, rest, batch, key, tx=tx, recipe=TrainConfig())
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from sam_jax.models.layers import split_keys
from sam_jax.models.sam import Sam
from sam_jax.training.interactive import interactive_losses
from sam_jax.training.losses import LossWeights, MaskLosses, weighted_mean
from sam_jax.training.rules import Rest, combine
from sam_jax.training.simulate import Key


class TrainConfig(NamedTuple):
    """How the loss of a batch is computed; see `interactive_losses` and `Sam.encode_image`."""

    num_rounds: int = 1
    """Prompts per object, each but the first a correction; the paper's number is 11."""
    box_probability: float = 0.5
    """Probability that the first prompt is a box, not a point."""
    weights: LossWeights = LossWeights()
    """Weights of the loss's parts."""
    objects_chunk_size: int | None = None
    """Objects of an image that are computed together; fewer take less memory. None: all, but in
    `compile_step` on a CPU one, which fits its cache."""
    remat: bool = False
    """Compute activations of the image encoder twice, to take less memory."""
    drop_path_rate: float = 0.0
    """Stochastic depth of a ViT."""
    accumulate: int = 1
    """Number of parts that a batch is split into, to take less memory."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters; None for no average."""


class TrainState(NamedTuple):
    """What a training run carries from step to step; arrays only."""

    step: Int[Array, ""]
    """Number of steps made."""
    params: PyTree
    """The parameters that train."""
    opt_state: PyTree
    """The optimizer's state."""
    ema: PyTree | None
    """The exponential moving average of `params`, or None."""

    @property
    def result(self) -> PyTree:
        """The parameters to use: their moving average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: PyTree, tx: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step, with arrays of its own, since a step gives up its input.

    They are float32 whatever the checkpoint's are: small steps would vanish in bfloat16.
    """
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    average = jax.tree.map(jnp.array, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def batch_losses(
    model: Sam,
    batch: dict[str, Any],
    keys: Array,
    *,
    recipe: TrainConfig = TrainConfig(),  # noqa: B008
) -> MaskLosses:
    """The losses [b, n, rounds] of every object of a batch, in a form to differentiate.

    Args:
        model: `combine(params, rest)`.
        batch: of `sam_jax.training.make_loader`.
        keys: [b] of `jax.random`, one for each image; its prompts and drop path depend on it.
        recipe: see there.

    Raises:
        ValueError: for a recipe whose numbers make no sense, or that has `remat` or a
            `drop_path_rate` where the batch has image embeddings.
    """
    prompt_keys, drop_keys = split_keys(keys, 2)
    check_recipe(recipe)
    if "image_embedding" in batch:
        for name in ("remat", "drop_path_rate"):
            if getattr(recipe, name):
                raise ValueError(
                    f"{name} is {getattr(recipe, name)}, but the batch has image embeddings: the "
                    "image encoder, which it is for, does not train"
                )
        embeddings = batch["image_embedding"]
    else:
        embeddings = model.encode_image(
            batch["pixel_values"],
            remat=recipe.remat,
            drop_path_rate=recipe.drop_path_rate,
            keys=drop_keys,
        )

    def one_object(embedding, target, box, key):
        return interactive_losses(
            model,
            embedding,
            target,
            box,
            key,
            num_rounds=recipe.num_rounds,
            box_probability=recipe.box_probability,
            weights=recipe.weights,
        )

    def one_image(embedding, targets, boxes, key):
        objects = targets, boxes, jax.random.split(key, len(targets))
        at_once = recipe.objects_chunk_size or len(targets)
        return jax.lax.map(lambda x: one_object(embedding, *x), objects, batch_size=at_once)

    targets = batch["masks"].astype(jnp.float32)
    return jax.vmap(one_image)(embeddings, targets, batch["boxes"], prompt_keys)


def mean_loss(losses: MaskLosses, valid: Float[Array, "b n"]) -> tuple[Array, dict[str, Array]]:
    """The mean over rounds and valid objects, and the means of all parts for a log.

    `iou_first` is the IoU after the first prompt, `iou_last` that after the last round.
    """
    means = {name: weighted_mean(x.mean(-1), valid) for name, x in losses._asdict().items()}
    iou = losses.mask_iou
    metrics = {
        "loss": means["total"],
        **{f"{name}_loss": means[name] for name in ("focal", "dice", "iou")},
        "iou_first": weighted_mean(iou[..., 0], valid),
        "iou_last": weighted_mean(iou[..., -1], valid),
    }
    return means["total"], metrics


def grads_and_metrics(
    params: PyTree,
    rest: Rest,
    batch: dict[str, Any],
    keys: Array,
    *,
    recipe: TrainConfig = TrainConfig(),  # noqa: B008
) -> tuple[PyTree, dict[str, Array]]:
    """The gradients of the mean loss by `params` alone, and its metrics.

    With `recipe.accumulate` above 1 the batch is worked on in parts; every part counts by its
    number of valid objects, so that the result is that of the whole batch.

    Raises:
        ValueError: if that is no divisor of the batch, and what `batch_losses` raises.
    """

    def loss(params, batch, keys):
        model = combine(params, rest)
        return mean_loss(batch_losses(model, batch, keys, recipe=recipe), batch["valid"])

    of_part = jax.grad(loss, has_aux=True)
    parts, size = recipe.accumulate, len(keys)
    if parts == 1:
        return of_part(params, batch, keys)
    if size % parts:
        raise ValueError(f"accumulate is {parts}, expected a divisor of the batch of {size}")

    def split(x):
        # Every parts-th image: then each part has images of all devices.
        return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

    batch, keys = jax.tree.map(split, (batch, keys))
    shares = batch["valid"].sum((1, 2)) / jnp.maximum(batch["valid"].sum(), 1)

    def add_part(total, part):
        batch, keys, share = part
        found = of_part(params, batch, keys)
        return jax.tree.map(lambda t, x: t + share * x, total, found), None

    shapes = jax.eval_shape(of_part, params, *jax.tree.map(lambda x: x[0], (batch, keys)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add_part, zeros, (batch, keys, shares))
    return total


def train_step(
    state: TrainState,
    rest: Rest,
    batch: dict[str, Any],
    key: Key,
    *,
    tx: optax.GradientTransformation,
    recipe: TrainConfig = TrainConfig(),  # noqa: B008
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimizer.

    A batch without objects changes nothing but the step's number: neither parameters nor the
    optimizer's state, its schedule's count included, nor the moving average.

    Args:
        state: of `init_state` or the step before.
        rest: of `partition`.
        batch: of `sam_jax.training.make_loader`.
        key: of the whole run; what a step draws depends on it and on the step's number.
        tx: the optimiser.
        recipe: see there.

    Returns:
        The new state, and float32 scalars: those of `mean_loss`, `grad_norm`, `objects_used` and,
        if the batch counts them, `objects_dropped`.

    Raises:
        ValueError: if only one of state and recipe has a moving average, and what `gradients`
            raises.
    """
    has, wanted = state.ema is not None, recipe.ema_decay is not None
    if has != wanted:
        raise ValueError(
            f"the state has {'a' if has else 'no'} moving average, but ema_decay is "
            f"{recipe.ema_decay}; give init_state ema={wanted}, or the recipe another ema_decay"
        )
    keys = jax.random.split(jax.random.fold_in(key, state.step), len(batch["valid"]))
    grads, metrics = grads_and_metrics(state.params, rest, batch, keys, recipe=recipe)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["objects_used"] = batch["valid"].sum()
    if "dropped" in batch:
        metrics["objects_dropped"] = batch["dropped"].sum().astype(jnp.float32)
    # optax mixes dtypes, also where the caller has made JAX strict about them.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and recipe.ema_decay is not None:
        ema = optax.incremental_update(params, ema, 1 - recipe.ema_decay)
    # Zero gradients alone would not do: momentum, weight decay and the average go on without them.
    new = TrainState(state.step, params, opt_state, ema)
    has_objects = metrics["objects_used"] > 0
    new = jax.tree.map(lambda new, old: jnp.where(has_objects, new, old), new, state)
    return new._replace(step=state.step + 1), metrics


def compile_step(
    state: TrainState, tx: optax.GradientTransformation, *, recipe: TrainConfig
) -> Callable:
    """`train_step(state, rest, batch, key)` compiled, for states placed like this one.

    The state that it is given is given up, so that memory holds one. It raises what `train_step`
    raises, when it is first called.
    """
    # Arrays that were never put anywhere stay so: a step that places them is compiled again.
    places = jax.tree.map(lambda x: x.sharding if x.committed else None, state)
    (device, *_) = state.step.sharding.device_set
    if recipe.objects_chunk_size is None and device.platform == "cpu":
        recipe = recipe._replace(objects_chunk_size=1)
    return jax.jit(
        functools.partial(train_step, tx=tx, recipe=recipe),
        out_shardings=(places, None),
        donate_argnums=0,
    )


def check_recipe(recipe: TrainConfig) -> None:
    """Before something that takes long: a step asks by itself.

    Raises:
        ValueError: for a recipe whose numbers make no sense.
    """
    for name, ok, expected in (
        ("num_rounds", recipe.num_rounds >= 1, "at least 1"),
        ("box_probability", 0 <= recipe.box_probability <= 1, "0 to 1"),
        (
            "objects_chunk_size",
            (recipe.objects_chunk_size or 1) >= 1,
            "at least 1, or None for all",
        ),
        ("drop_path_rate", 0 <= recipe.drop_path_rate < 1, "0 or more, and less than 1"),
        ("accumulate", recipe.accumulate >= 1, "at least 1"),
        ("ema_decay", 0 <= (recipe.ema_decay or 0) < 1, "0 or more, and less than 1, or None"),
    ):
        if not ok:
            raise ValueError(f"{name} is {getattr(recipe, name)}, expected {expected}")
