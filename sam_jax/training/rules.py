r"""Which parameters train, and how fast: a table of regular expressions, as in big_vision.

    table = [(r"mask_decoder\..*", 1.0), (r"image_encoder\..*", None)]

This gives each parameter the learning-rate scale of the first expression that matches its whole
path, and freezes it if the scale is `None` or nothing matches. Paths are those of
`sam_jax.checkpoints`, such as `image_encoder.blocks.0.attn.qkv.kernel`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from reprlib import repr as short
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

from sam_jax.config import SamConfig, ViTConfig, check_config
from sam_jax.errors import check_number, check_whole

Table = Sequence[tuple[str, float | None]]
"""Which parameters train: pairs of a regular expression and a learning-rate scale.

The first expression that matches a parameter's whole path counts; the scale None freezes it.
"""

DECODER_ONLY: Table = ((r"mask_decoder\..*", 1.0), (".*", None))
"""Trains the mask decoder."""
HQ_ONLY: Table = ((r"mask_decoder\.hq\..*", 1.0), (".*", None))
"""Trains only what SAM-HQ adds to SAM, as its authors did."""
EVERYTHING: Table = ((".*", 1.0),)
"""Trains all parameters."""
LORA_ONLY: Table = ((r".*\.lora_[ab]", 1.0), (".*", None))
"""Trains the adapters of LoRA."""

TABLES = {
    "decoder": DECODER_ONLY,
    "hq": HQ_ONLY,
    "lora": (LORA_ONLY[0], *DECODER_ONLY),
    "everything": EVERYTHING,
}
"""The tables by name; "lora" also trains the mask decoder."""


def learning_rate_scale(path: str, table: Table) -> float | None:
    """A parameter's scale in the table; None, which freezes it, also if nothing matches."""
    return next((scale for regex, scale in table if re.fullmatch(regex, path)), None)


class Rest(NamedTuple):
    """A model without the parameters that train: a pytree, which can be passed to `jax.jit`."""

    graphdef: nnx.GraphDef
    """The model's structure."""
    state: PyTree
    """Frozen parameters, and buffers."""


def partition(model: nnx.Module, table: Table = EVERYTHING) -> tuple[PyTree, Rest]:
    r"""Splits a model into the parameters that train and the rest; `combine` joins them again.

    Differentiate with respect to the first only, so that gradients of frozen parameters and buffers
    do not take memory:

        params, rest = partition(model)
        gradients = jax.grad(lambda params: loss(combine(params, rest)))(params)

    Args:
        model: a `Sam`, or another `nnx.Module`. It is not modified, and shares its arrays with the
            result.
        table: which parameters train, such as `((r"mask_decoder\..*", 1.0), (".*", None))`; see
            `sam_jax.training.Table`.

    Raises:
        TypeError: if the model is not an `nnx.Module`, or the table is not pairs of an expression
            and a scale.
        ValueError: if an expression of the table matches no parameter, or if nothing trains.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is {short(model)}, expected a Sam or another nnx.Module")
    _check_pairs(table)
    paths = [_path(key) for key, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    for regex, scale in table:
        if scale is not None and not scale > 0:
            raise ValueError(f"{regex!r} has scale {scale}, expected above 0, or None to freeze")
        if not matching(regex, paths):
            raise ValueError(
                f"{regex!r} matches none of the model's parameters; their paths look like "
                f"{paths[0]!r} and {paths[-1]!r}"
            )

    def trains(path, value):
        is_param = isinstance(value, nnx.Param)
        return is_param and learning_rate_scale(_path(path), table) is not None

    graphdef, params, state = nnx.split(model, trains, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"nothing trains: the table {list(table)} freezes every parameter")
    return params, Rest(graphdef, state)


def matching(regex: str, paths: Iterable[str]) -> list[str]:
    """The paths that the expression matches whole.

    Raises:
        ValueError: if it is not a regular expression.
    """
    try:
        return [path for path in paths if re.fullmatch(regex, path)]
    except re.error as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}") from error


def _check_pairs(table: Any) -> None:
    rows = table if isinstance(table, Sequence) and not isinstance(table, str) else [table]
    for row in rows:
        pair = row if isinstance(row, Sequence) and len(row) == 2 else (None, None)
        is_scale = pair[1] is None or (isinstance(pair[1], Real) and not isinstance(pair[1], bool))
        if not isinstance(pair[0], str) or not is_scale:
            raise TypeError(
                f"the table has {short(row)}, expected pairs of a regular expression and a scale, "
                'or None to freeze: [(r"mask_decoder\\..*", 1.0)]; or pass one of '
                "sam_jax.training.TABLES"
            )


def combine(params: PyTree, rest: Rest) -> Any:
    """The model from the results of `partition`, or from updated parameters and the rest.

    It shares arrays with them, but no variables: what you assign to it changes nothing else.

    Raises:
        TypeError: if `rest` is not the second result of `partition`.
        ValueError: if `params` are not of the same partition.
    """
    if not isinstance(rest, Rest):
        raise TypeError(
            f"rest is {type(rest).__name__}, expected the second result of partition(model): "
            "combine(params, rest)"
        )
    try:
        return nnx.merge(rest.graphdef, params, rest.state, copy=True)
    except ValueError as error:
        raise ValueError(
            f"params do not belong to rest: {error} Give both results of one partition(model), or "
            "params that an optimizer updated"
        ) from error


def layer_decay(config: SamConfig, decay: float) -> Table:
    """Layer-wise decay of a ViT encoder's learning rate.

    The last block's scale is `decay`; each earlier block's, and finally that of patches and
    positions, is smaller by a factor of `decay`. Everything else has 1 (Detectron2's rates for
    ViTDet). The paper's `decay` is 0.6 for ViT-B and 0.8 for larger models (appendix A).

    Raises:
        TypeError: if `config` is not a SamConfig.
        ValueError: if the encoder is not a ViT, or `decay` is not a number above 0.
    """
    check_config(config)
    check_number("decay", decay)
    if not 0 < decay < math.inf:
        raise ValueError(f"decay is {decay}, expected above 0")
    if not isinstance(config.image_encoder, ViTConfig):
        raise ValueError("layer-wise decay is for ViT encoders, and this one is a TinyViT")
    depth = config.image_encoder.depth
    blocks = [(rf"image_encoder\.blocks\.{i}\..*", decay ** (depth - i)) for i in range(depth)]
    stem = (r"image_encoder\.(patch_embed\..*|pos_embed)", decay ** (depth + 1))
    return [stem, *blocks, (".*", 1.0)]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    table: Table,
    *,
    weight_decay: float = 0.1,
    clip_norm: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW with learning rates scaled by the table, for the parameters of `partition`.

    Weight decay applies to kernels, but not to biases, norms, tokens and positions. As with
    PyTorch's parameter groups, it is scaled like the learning rate.

    Args:
        learning_rate: the learning rate at scale 1, or a schedule.
        table: as for `partition`.
        weight_decay: the paper's is 0.1.
        clip_norm: largest global norm of the gradients.
        b1: decay of the gradients' mean.
        b2: decay of the gradients' squares.
        eps: added to the root of the squares.

    Raises:
        TypeError: if the table is not pairs of an expression and a scale.
        ValueError: for anything but numbers, and a learning rate or scale below 0.
    """
    _check_pairs(table)
    for name, value in (
        ("learning_rate", 0 if callable(learning_rate) else learning_rate),
        ("weight_decay", weight_decay),
        *((f"the scale of {regex!r}", scale or 0) for regex, scale in table),
    ):
        if not isinstance(value, jax.Array):
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more")
    return optax.chain(
        optax.identity() if clip_norm is None else optax.stateless(_clip(clip_norm)),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, lambda params: map_with_path(_decays, params)),
        optax.stateless(lambda updates, _: map_with_path(_scaled(table), updates)),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, followed by a cosine decay to 0 or a constant learning rate.

    A constant rate does not depend on the number of steps, so that a run can be extended.

    Raises:
        ValueError: for an invalid number, or an unknown schedule.
    """

    learning_rate: float = 1e-4
    """The highest learning rate, after the warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up."""
    warmup: int = 20
    """Steps of the warm-up; with a cosine, at most half of all steps."""
    weight_decay: float = 0.01
    """Weight decay of kernels."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients."""

    def __post_init__(self):
        check_whole("warmup", self.warmup, 0)
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_number(name, getattr(self, name))
        for name, ok, expected in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("schedule", self.schedule in ("cosine", "constant"), "cosine or constant"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("clip_norm", self.clip_norm > 0, "above 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    def build(
        self, table: Table, steps: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The transformation for `init_state` and `train_step`, and each step's learning rate.

        Raises:
            ValueError: if the number of steps is not positive.
        """
        check_whole("steps", steps, 1)
        if self.schedule == "constant":
            rate = optax.warmup_constant_schedule(0.0, self.learning_rate, self.warmup)
        else:
            warmup = min(self.warmup, steps // 2)
            rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)
        options = {"weight_decay": self.weight_decay, "clip_norm": self.clip_norm}
        return adamw(rate, table, **options), rate


def updates_made(opt_state: PyTree) -> int:
    """The number of updates that an optimizer of `adamw` with a schedule has made.

    The next update's learning rate is the schedule's at this number. It is smaller than the number
    of steps if batches had no objects.
    """

    def of_schedule(path, _):
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    return int(jax.device_get(optax.tree.get(opt_state, "count", filtering=of_schedule)))


def map_with_path(function: Callable, params: PyTree) -> PyTree:
    """Maps `function(path, leaf)` over the leaves of a state, such as `partition` returns."""

    def call(key_path, leaf):
        # The path also has the attribute of the variable with the array.
        names = [k.key for k in key_path if isinstance(k, jax.tree_util.DictKey)]
        return function(_path(names), leaf)

    return jax.tree_util.tree_map_with_path(call, params)


def _clip(norm: float) -> Callable:
    # optax.clip_by_global_norm selects array by array, which XLA takes longer to compile.
    def clip(updates, _):
        factor = jnp.minimum(1, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: factor * update, updates)

    return clip


def _decays(path, _):
    return path.endswith(("kernel", "lora_a", "lora_b"))


def _scaled(table):
    return lambda path, update: learning_rate_scale(path, table) * update


def _path(key: Sequence) -> str:
    return ".".join(map(str, key))
