"""A training step as pure functions of arrays, for your own loop or for `examples/finetune.py`.

params, rest = partition(model, DECODER_ONLY)
tx = adamw(1e-4, DECODER_ONLY)
state = init_state(params, tx)
state, metrics = train_step(state, rest, batch, key, tx=tx, config=TrainConfig())
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from sam_jax.errors import check_number, check_whole
from sam_jax.models.checks import check_embeddings, check_keys, check_shape
from sam_jax.models.layers import split_keys
from sam_jax.models.sam import Sam
from sam_jax.training.interactive import interactive_losses
from sam_jax.training.losses import LossWeights, MaskLosses, weighted_mean
from sam_jax.training.rules import Rest, combine
from sam_jax.training.simulate import Key


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the loss of a batch is computed; see `interactive_losses` and `Sam.encode_image`.

    Raises:
        TypeError: if the weights are not `LossWeights`.
        ValueError: for an invalid number.
    """

    num_rounds: int = 1
    """Prompts per object, each after the first a correction; the paper's number is 11."""
    box_probability: float = 0.5
    """Probability that the first prompt is a box, not a point."""
    weights: LossWeights = LossWeights()  # noqa: RUF009
    """Weights of the loss's parts."""
    objects_chunk_size: int | None = None
    """Objects of an image that are computed together; fewer take less memory. None for all, except
    that `compile_step` on a CPU takes one, which fits its cache."""
    remat: bool = False
    """Recompute activations of the image encoder in the backward pass, to take less memory. In
    Python, also a policy of `jax.checkpoint_policies`, as for `Sam.encode_image`."""
    drop_path_rate: float = 0.0
    """Stochastic depth of a ViT."""
    accumulate: int = 1
    """Number of parts that a batch is split into, to take less memory."""
    ema_decay: float | None = None
    """Decay of a moving average of the parameters; None for no average."""

    def __post_init__(self):
        if not isinstance(self.weights, LossWeights):
            raise TypeError(f"weights are {short(self.weights)}, expected LossWeights")
        for name, value in self.weights._asdict().items():
            check_number(f"the weight {name}", value)
            if not 0 <= value < math.inf:
                raise ValueError(f"the weight {name} is {value}, expected 0 or more")
        check_whole("num_rounds", self.num_rounds, 1)
        check_whole("accumulate", self.accumulate, 1)
        if self.objects_chunk_size is not None:
            check_whole("objects_chunk_size", self.objects_chunk_size, 1)
        check_number("box_probability", self.box_probability)
        if not 0 <= self.box_probability <= 1:
            raise ValueError(f"box_probability is {self.box_probability}, expected 0 to 1")
        decay = 0 if self.ema_decay is None else self.ema_decay
        for name, value in (("drop_path_rate", self.drop_path_rate), ("ema_decay", decay)):
            check_number(name, value)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 or more, and less than 1")


class TrainState(NamedTuple):
    """The state of a training run; only arrays."""

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
    """The state before the first step. Its arrays are copies, since a step donates its input.

    They are always float32: small updates would vanish in bfloat16.
    """
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    average = jax.tree.map(jnp.array, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def batch_losses(
    model: Sam,
    batch: dict[str, Any],
    keys: Array,
    *,
    config: TrainConfig = TrainConfig(),
) -> MaskLosses:
    """The differentiable losses [b, n, rounds] of every object of a batch.

    Args:
        model: `combine(params, rest)`.
        batch: from `sam_jax.training.make_loader`.
        keys: [b] `jax.random` keys, one for each image, for its prompts and drop path.
        config: see `TrainConfig`.

    Raises:
        TypeError: if the batch is not a dictionary, if an array of it has another dtype, or if the
            config is not a `TrainConfig`.
        ValueError: if the batch lacks an array, or one has another shape, or if the config has
            `remat` or a `drop_path_rate` and the batch has image embeddings.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config is {short(config)}, expected a sam_jax.training.TrainConfig")
    _check_batch(batch)
    check_keys(keys, len(batch["masks"]))
    prompt_keys, drop_keys = split_keys(keys, 2)
    if "image_embedding" in batch:
        for name in ("remat", "drop_path_rate"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)}, but the batch has image embeddings, so "
                    "the image encoder does not train"
                )
        embeddings = check_embeddings(model.config, batch["image_embedding"])
    else:
        embeddings = model.encode_image(
            batch["pixel_values"],
            remat=config.remat,
            drop_path_rate=config.drop_path_rate,
            keys=drop_keys,
        )

    def one_object(embedding, target, box, key):
        return interactive_losses(
            model,
            embedding,
            target,
            box,
            key,
            num_rounds=config.num_rounds,
            box_probability=config.box_probability,
            weights=config.weights,
        )

    def one_image(embedding, targets, boxes, key):
        objects = targets, boxes, jax.random.split(key, len(targets))
        chunk_size = config.objects_chunk_size or len(targets)
        return jax.lax.map(lambda x: one_object(embedding, *x), objects, batch_size=chunk_size)

    targets = batch["masks"].astype(jnp.float32)
    return jax.vmap(one_image)(embeddings, targets, batch["boxes"], prompt_keys)


def _check_batch(batch: dict[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"the batch is a {type(batch).__name__}, expected a dictionary of arrays")
    pixels = "image_embedding" if "image_embedding" in batch else "pixel_values"
    if missing := [name for name in (pixels, "masks", "boxes", "valid") if name not in batch]:
        raise ValueError(
            f"the batch lacks {', '.join(missing)}; sam_jax.training.ExampleTransform says what "
            "make_loader's batches hold"
        )
    images, objects, side, _ = check_shape("masks", batch["masks"], (None,) * 4).shape
    shapes = {
        "masks": (images, objects, side, side),
        "boxes": (images, objects, 4),
        "valid": (images, objects),
    }
    if len(batch[pixels]) != images:
        raise ValueError(
            f"the batch has {pixels} of {len(batch[pixels])} images, but masks of {images}"
        )
    for name, shape in shapes.items():
        dtype = check_shape(name, batch[name], shape).dtype
        if not jnp.issubdtype(dtype, jnp.floating) and (name != "masks" or dtype != jnp.bool):
            expected = "bool, or floats from 0 to 1" if name == "masks" else "floats"
            raise TypeError(f"{name} of the batch are {dtype}, expected {expected}")


def mean_loss(losses: MaskLosses, valid: Float[Array, "b n"]) -> tuple[Array, dict[str, Array]]:
    """The mean over rounds and valid objects, and metrics with the means of all parts.

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
    config: TrainConfig = TrainConfig(),
) -> tuple[PyTree, dict[str, Array]]:
    """The gradients of the mean loss with respect to `params`, and its metrics.

    With `config.accumulate` above 1, the batch is split into parts, which are weighted by their
    numbers of valid objects, so that the result is that of the whole batch.

    Raises:
        ValueError: if `config.accumulate` does not divide the batch, or as `batch_losses`.
    """

    def loss(params, batch, keys):
        model = combine(params, rest)
        return mean_loss(batch_losses(model, batch, keys, config=config), batch["valid"])

    of_part = jax.grad(loss, has_aux=True)
    parts, size = config.accumulate, len(keys)
    if parts == 1:
        return of_part(params, batch, keys)
    if size % parts:
        raise ValueError(f"accumulate is {parts}, expected a divisor of the batch of {size}")

    def split(x):
        # Take every parts-th image, so that each part has images of all devices.
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
    config: TrainConfig = TrainConfig(),
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimizer.

    A batch without objects only increments the step; parameters, the optimizer's state (with its
    schedule's count) and the moving average stay the same.

    Args:
        state: from `init_state` or the previous step.
        rest: from `partition`.
        batch: from `sam_jax.training.make_loader`.
        key: the run's key; a step's random numbers depend on it and on the step's number.
        tx: the optimizer.
        config: see `TrainConfig`.

    Returns:
        The new state, and float32 scalars: those of `mean_loss`, `grad_norm`, `objects_used` and,
        if the batch counts them, `objects_dropped`.

    Raises:
        ValueError: if only one of state and config has a moving average, or as `grads_and_metrics`.
    """
    has, wanted = state.ema is not None, config.ema_decay is not None
    if has != wanted:
        raise ValueError(
            f"the state has {'a' if has else 'no'} moving average, but ema_decay is "
            f"{config.ema_decay}; give init_state ema={wanted}, or the config another ema_decay"
        )
    keys = jax.random.split(jax.random.fold_in(key, state.step), len(batch["valid"]))
    grads, metrics = grads_and_metrics(state.params, rest, batch, keys, config=config)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["objects_used"] = batch["valid"].sum()
    if "dropped" in batch:
        metrics["objects_dropped"] = batch["dropped"].sum().astype(jnp.float32)
    # optax mixes dtypes, which fails if the caller has made JAX strict about them.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and config.ema_decay is not None:
        ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
    # Zero gradients are not enough: momentum, weight decay and the average would still change.
    new = TrainState(state.step, params, opt_state, ema)
    has_objects = metrics["objects_used"] > 0
    new = jax.tree.map(lambda new, old: jnp.where(has_objects, new, old), new, state)
    return new._replace(step=state.step + 1), metrics


def compile_step(
    state: TrainState, tx: optax.GradientTransformation, *, config: TrainConfig
) -> Callable:
    """The compiled `train_step(state, rest, batch, key)`, for states sharded like this one.

    The input state is donated. The first call raises what `train_step` raises.
    """
    # Uncommitted arrays stay uncommitted: otherwise the second step would compile again.
    places = jax.tree.map(lambda x: x.sharding if x.committed else None, state)
    (device, *_) = state.step.sharding.device_set
    if config.objects_chunk_size is None and device.platform == "cpu":
        config = replace(config, objects_chunk_size=1)
    return jax.jit(
        functools.partial(train_step, tx=tx, config=config),
        out_shardings=(places, None),
        donate_argnums=0,
    )
