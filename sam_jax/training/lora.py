r"""LoRA (Hu et al. 2022): a linear layer's kernel W becomes W + scale A B, and only A and B train.

    model = add_lora(model, r"image_encoder\..*\.qkv", rank=4, rngs=nnx.Rngs(0))
    params, rest = partition(model, LORA_ONLY)
    ...
    save_lora(model, "adapters.safetensors")
    plain = merge_lora(model)

A model with adapters works like any other, but checkpoints store only plain models: merge first.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.errors import check_number, check_whole
from sam_jax.files import read_json, require_absent
from sam_jax.models.checks import check_rngs
from sam_jax.models.layers import Linear, rowwise
from sam_jax.models.sam import Sam
from sam_jax.training.rules import matching
from sam_jax.validation import check_model


class LoRALinear(Linear):
    """A linear layer that uses W + scale A B instead of its kernel W."""

    def __init__(self, linear: Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        i, o = linear.kernel.shape
        super().__init__(i, o, use_bias=linear.use_bias, dtype=linear.dtype, rngs=rngs)
        self.kernel, self.bias = linear.kernel, linear.bias
        init = nnx.initializers.he_uniform()
        self.lora_a = nnx.LoRAParam(init(rngs.params(), (i, rank), jnp.float32))
        self.lora_b = nnx.LoRAParam(jnp.zeros((rank, o), jnp.float32))
        self.scale = scale

    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """x W + scale (x A) B."""
        y = super().__call__(x)
        a, b = (v[...].astype(y.dtype) for v in (self.lora_a, self.lora_b))
        return y + rowwise(lambda rows: (rows.astype(y.dtype) @ a) @ b * self.scale, x)

    def added(self) -> Float[Array, "i o"]:
        """scale A B."""
        a, b = self.lora_a[...], self.lora_b[...]
        return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST) * self.scale

    def weight(self) -> Float[Array, "i o"]:
        """W + scale A B."""
        return super().weight() + self.added()


def add_lora(
    model: Sam, pattern: str, *, rank: int, alpha: float | None = None, rngs: nnx.Rngs
) -> Sam:
    """A copy of the model with adapters on linear layers, which have no effect until they train.

    Args:
        model: the model; the copy shares its arrays.
        pattern: a regular expression that matches the whole path of the layers, such as
            `r"image_encoder\\..*\\.qkv"`.
        rank: rank of A B.
        alpha: the scale is alpha / rank; 1 if left out.
        rngs: random numbers for A; B starts as zeros.

    Raises:
        TypeError: if `model` is not a `Sam`, or `rngs` are not `nnx.Rngs`.
        ValueError: for another rank or alpha, if no linear layer matches, or one that matches
            already has adapters.
    """
    check_model(model)
    check_whole("rank", rank, 1)
    check_rngs(rngs)
    if alpha is not None:
        check_number("alpha", alpha)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}, expected above 0")
    scale = 1.0 if alpha is None else alpha / rank
    model = nnx.clone(model)
    layers = _linear_layers(model)
    chosen = matching(pattern, layers)
    if not chosen:
        raise ValueError(
            f"{pattern!r} matches no linear layer; some are {', '.join(list(layers)[:4])}"
        )
    for path in chosen:
        linear = layers[path]
        if isinstance(linear, LoRALinear):
            raise ValueError(f"{path} already has adapters; merge them first")
        _replace(model, path, LoRALinear(linear, rank, scale, rngs=rngs))
    return model


def merge_lora(model: Sam) -> Sam:
    """The equivalent plain model, with the adapters added to the kernels.

    Raises:
        TypeError: if `model` is not a `Sam`.
    """
    check_model(model)
    model = nnx.clone(model)
    for path, linear in _adapted(model).items():
        _replace(model, path, _plain(linear, linear.weight()))
    return model


def unmerge_lora(merged: Sam, model: Sam) -> Sam:
    """The inverse of `merge_lora`: separates the adapters of `model` from `merged` again.

    Kernels are restored up to rounding errors.

    Raises:
        TypeError: if one of them is not a `Sam`.
        ValueError: if `model` does not have adapters, or `merged` lacks their layers.
    """
    check_model(merged)
    check_model(model)
    merged, adapters = nnx.clone(merged), _adapted(model)
    if not adapters:
        raise ValueError("the second model has no adapters to remove from the first")
    for path, (adapter, linear) in _matching(adapters, merged).items():
        linear = _plain(linear, linear.kernel[...] - adapter.added())
        _replace(merged, path, _adapter(linear, *_factors(adapter), adapter.scale))
    return merged


def save_lora(model: Sam, path: str | os.PathLike) -> None:
    """Writes only the adapters, as a `.safetensors` file.

    Raises:
        TypeError: if `model` is not a `Sam`.
        ValueError: if the model does not have adapters.
        FileExistsError: if the path exists already.
    """
    check_model(model)
    path, adapters = Path(path), _adapted(model)
    if not adapters:
        raise ValueError("the model has no adapters to save")
    require_absent(path)
    tensors = {
        f"{name}.{part}": np.asarray(factor)
        for name, linear in adapters.items()
        for part, factor in zip(("lora_a", "lora_b"), _factors(linear), strict=True)
    }
    scales = {name: linear.scale for name, linear in adapters.items()}
    write_safetensors(path, tensors, {"lora_scales": json.dumps(scales)})


def load_lora(model: Sam, path: str | os.PathLike) -> Sam:
    """A copy of a plain model with the adapters of a file from `save_lora`.

    Raises:
        TypeError: if `model` is not a `Sam`.
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not from `save_lora`, or its layers are not the model's.
    """
    check_model(model)
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a file")  # reading a pipe might never end
        with safe_open(path, "numpy") as file:
            scales = read_json((file.metadata() or {})["lora_scales"].encode())
            if not isinstance(scales, dict) or not all(
                type(scale) in (int, float) and abs(scale) < 1e9 for scale in scales.values()
            ):
                raise ValueError("its scales are not numbers by name")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a file of save_lora: {error!r}") from error
    model = nnx.clone(model)
    for name, (scale, linear) in _matching(scales, model).items():
        a, b = (tensors.get(f"{name}.{part}") for part in ("lora_a", "lora_b"))
        shape = linear.kernel.shape
        if (
            a is None
            or b is None
            or not a.ndim == b.ndim == 2
            or (a.shape[0], b.shape[1]) != shape
            or a.shape[1] != b.shape[0]
        ):
            raise ValueError(f"{path}: the adapters of {name} do not match its kernel {shape}")
        _replace(model, name, _adapter(linear, jnp.asarray(a), jnp.asarray(b), float(scale)))
    return model


def _linear_layers(model: Sam) -> dict[str, Linear]:
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def _adapted(model: Sam) -> dict[str, LoRALinear]:
    return {p: m for p, m in _linear_layers(model).items() if isinstance(m, LoRALinear)}


def _matching(adapters: dict, model: Sam) -> dict:
    """Each adapter with the plain layer of the model, by path."""
    layers = _linear_layers(model)
    for path in adapters:
        if type(layers.get(path)) is not Linear:
            raise ValueError(
                f"there are adapters for {path}, which is not a plain linear layer of this model"
            )
    return {path: (adapter, layers[path]) for path, adapter in adapters.items()}


def _factors(linear: LoRALinear) -> tuple[Array, Array]:
    return linear.lora_a[...], linear.lora_b[...]


def _adapter(linear: Linear, a: Array, b: Array, scale: float) -> LoRALinear:
    new = LoRALinear(linear, a.shape[1], scale, rngs=nnx.Rngs(0))
    new.lora_a[...], new.lora_b[...] = a, b
    return new


def _plain(linear: Linear, kernel: Array) -> Linear:
    new = Linear(*kernel.shape, use_bias=linear.use_bias, dtype=linear.dtype, rngs=nnx.Rngs(0))
    new.kernel, new.bias = nnx.Param(kernel.astype(linear.kernel.dtype)), linear.bias
    return new


def _replace(model: Sam, path: str, linear: Linear) -> None:
    *parents, name = path.split(".")
    parent: Any = model
    for part in parents:
        parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
    if name.isdigit():
        parent[int(name)] = linear
    else:
        setattr(parent, name, linear)
