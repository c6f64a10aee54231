"""The one table of parameter names: sam_jax <-> Meta <-> Hugging Face, with the layouts.

Conversion is lossless: `from_torch` and `to_torch` only rename and transpose. `from_torch` rejects
tensors that are not exactly the model's.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from sam_jax.checkpoints.params import check_tensors
from sam_jax.config import (
    SamConfig,
    TinyViTConfig,
    ViTConfig,
)
from sam_jax.errors import CheckpointError, clip

Format = Literal["meta", "hf"]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Converts a tensor's layout between sam_jax and PyTorch; both ways return views."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    """From PyTorch's layout."""
    to_torch: Callable[[np.ndarray], np.ndarray]
    """To PyTorch's layout."""


def _transpose(*axes: int) -> Layout:
    inverse = tuple(int(i) for i in np.argsort(axes))
    return Layout(lambda x: x.transpose(axes), lambda x: x.transpose(inverse))


_SAME = Layout(lambda x: x, lambda x: x)
_LINEAR = _transpose(1, 0)  # (out, in) -> (in, out)
_CONV = _transpose(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
_UPSCALE = _transpose(0, 2, 3, 1)  # (in, out, h, w) -> (in, h, w, out)
# A counter of training steps has 64 bits in PyTorch, 32 in JAX.
_COUNT = Layout(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64))
# For each kind of module: sam_jax's leaf, PyTorch's leaf, layout.
_LINEAR_LEAVES = (("kernel", "weight", _LINEAR), ("bias", "bias", _SAME))
_CONV_LEAVES = (("kernel", "weight", _CONV), ("bias", "bias", _SAME))
_UPSCALE_LEAVES = (("kernel", "weight", _UPSCALE), ("bias", "bias", _SAME))
_NORM_LEAVES = (("scale", "weight", _SAME), ("bias", "bias", _SAME))
_EMBED_LEAVES = (("", "weight", _SAME),)
_TENSOR = (("", "", _SAME),)

_CONV_BN_LEAVES = (
    ("kernel", "c.weight", _CONV),
    ("scale", "bn.weight", _SAME),
    ("bias", "bn.bias", _SAME),
    ("mean", "bn.running_mean", _SAME),
    ("var", "bn.running_var", _SAME),
    ("num_batches_tracked", "bn.num_batches_tracked", _COUNT),
)
# sam_jax's module, Meta's module, Hugging Face's module, leaves. "#" stands for an index; "@" for a
# layer in a head of linear layers, which Hugging Face calls proj_in, layers.#, proj_out. An empty
# name means the same as in sam_jax.
_VIT = [
    ("image_encoder.pos_embed", "", "vision_encoder.pos_embed", _TENSOR),
    (
        "image_encoder.patch_embed",
        "image_encoder.patch_embed.proj",
        "vision_encoder.patch_embed.projection",
        _CONV_LEAVES,
    ),
    ("image_encoder.blocks.#.norm1", "", "vision_encoder.layers.#.layer_norm1", _NORM_LEAVES),
    ("image_encoder.blocks.#.attn.qkv", "", "vision_encoder.layers.#.attn.qkv", _LINEAR_LEAVES),
    ("image_encoder.blocks.#.attn.proj", "", "vision_encoder.layers.#.attn.proj", _LINEAR_LEAVES),
    (
        "image_encoder.blocks.#.attn.rel_pos_h",
        "",
        "vision_encoder.layers.#.attn.rel_pos_h",
        _TENSOR,
    ),
    (
        "image_encoder.blocks.#.attn.rel_pos_w",
        "",
        "vision_encoder.layers.#.attn.rel_pos_w",
        _TENSOR,
    ),
    ("image_encoder.blocks.#.norm2", "", "vision_encoder.layers.#.layer_norm2", _NORM_LEAVES),
    ("image_encoder.blocks.#.mlp.lin1", "", "vision_encoder.layers.#.mlp.lin1", _LINEAR_LEAVES),
    ("image_encoder.blocks.#.mlp.lin2", "", "vision_encoder.layers.#.mlp.lin2", _LINEAR_LEAVES),
]

_TINY_VIT = [  # not in Hugging Face
    ("image_encoder.patch_embed.conv1", "image_encoder.patch_embed.seq.0", None, _CONV_BN_LEAVES),
    ("image_encoder.patch_embed.conv2", "image_encoder.patch_embed.seq.2", None, _CONV_BN_LEAVES),
    *(
        (f"image_encoder.layers.#.{part}", "", None, _CONV_BN_LEAVES)
        for part in (
            "blocks.#.conv1",
            "blocks.#.conv2",
            "blocks.#.conv3",
            "blocks.#.local_conv",
            "downsample.conv1",
            "downsample.conv2",
            "downsample.conv3",
        )
    ),
    ("image_encoder.layers.#.blocks.#.attn.attention_biases", "", None, _TENSOR),
    ("image_encoder.layers.#.blocks.#.attn.norm", "", None, _NORM_LEAVES),
    ("image_encoder.layers.#.blocks.#.attn.qkv", "", None, _LINEAR_LEAVES),
    ("image_encoder.layers.#.blocks.#.attn.proj", "", None, _LINEAR_LEAVES),
    ("image_encoder.layers.#.blocks.#.mlp.norm", "", None, _NORM_LEAVES),
    ("image_encoder.layers.#.blocks.#.mlp.fc1", "", None, _LINEAR_LEAVES),
    ("image_encoder.layers.#.blocks.#.mlp.fc2", "", None, _LINEAR_LEAVES),
    ("image_encoder.norm_head", "", None, _NORM_LEAVES),
    ("image_encoder.head", "", None, _LINEAR_LEAVES),
]

_NECK = [
    ("image_encoder.neck.conv1", "image_encoder.neck.0", "vision_encoder.neck.conv1", _CONV_LEAVES),
    (
        "image_encoder.neck.norm1",
        "image_encoder.neck.1",
        "vision_encoder.neck.layer_norm1",
        _NORM_LEAVES,
    ),
    ("image_encoder.neck.conv2", "image_encoder.neck.2", "vision_encoder.neck.conv2", _CONV_LEAVES),
    (
        "image_encoder.neck.norm2",
        "image_encoder.neck.3",
        "vision_encoder.neck.layer_norm2",
        _NORM_LEAVES,
    ),
]

_PROMPT_ENCODER = [
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "",
        "shared_image_embedding.positional_embedding",
        _TENSOR,
    ),
    ("prompt_encoder.point_embeddings.#", "", "prompt_encoder.point_embed.#", _EMBED_LEAVES),
    ("prompt_encoder.not_a_point_embed", "", "prompt_encoder.not_a_point_embed", _EMBED_LEAVES),
    ("prompt_encoder.no_mask_embed", "", "prompt_encoder.no_mask_embed", _EMBED_LEAVES),
    *(
        (
            f"prompt_encoder.mask_downscaling.{name}",
            f"prompt_encoder.mask_downscaling.{meta}",
            f"prompt_encoder.mask_embed.{hf}",
            leaves,
        )
        for name, meta, hf, leaves in (
            ("conv1", "0", "conv1", _CONV_LEAVES),
            ("norm1", "1", "layer_norm1", _NORM_LEAVES),
            ("conv2", "3", "conv2", _CONV_LEAVES),
            ("norm2", "4", "layer_norm2", _NORM_LEAVES),
            ("conv3", "6", "conv3", _CONV_LEAVES),
        )
    ),
]

_MASK_DECODER = [
    ("mask_decoder.iou_token", "", "", _EMBED_LEAVES),
    ("mask_decoder.mask_tokens", "", "", _EMBED_LEAVES),
    *(
        (f"mask_decoder.transformer.{attention}.{part}_proj", "", "", _LINEAR_LEAVES)
        for attention in (
            "layers.#.self_attn",
            "layers.#.cross_attn_token_to_image",
            "layers.#.cross_attn_image_to_token",
            "final_attn_token_to_image",
        )
        for part in ("q", "k", "v", "out")
    ),
    *(
        (
            f"mask_decoder.transformer.layers.#.norm{i}",
            "",
            f"mask_decoder.transformer.layers.#.layer_norm{i}",
            _NORM_LEAVES,
        )
        for i in (1, 2, 3, 4)
    ),
    ("mask_decoder.transformer.layers.#.mlp.lin1", "", "", _LINEAR_LEAVES),
    ("mask_decoder.transformer.layers.#.mlp.lin2", "", "", _LINEAR_LEAVES),
    (
        "mask_decoder.transformer.norm_final_attn",
        "",
        "mask_decoder.transformer.layer_norm_final_attn",
        _NORM_LEAVES,
    ),
    *(
        (
            f"mask_decoder.output_upscaling.{name}",
            f"mask_decoder.output_upscaling.{meta}",
            f"mask_decoder.{hf}",
            leaves,
        )
        for name, meta, hf, leaves in (
            ("conv1", "0", "upscale_conv1", _UPSCALE_LEAVES),
            ("norm", "1", "upscale_layer_norm", _NORM_LEAVES),
            ("conv2", "3", "upscale_conv2", _UPSCALE_LEAVES),
        )
    ),
    (
        "mask_decoder.output_hypernetworks_mlps.#.layers.#",
        "",
        "mask_decoder.output_hypernetworks_mlps.#.@",
        _LINEAR_LEAVES,
    ),
    (
        "mask_decoder.iou_prediction_head.layers.#",
        "",
        "mask_decoder.iou_prediction_head.@",
        _LINEAR_LEAVES,
    ),
]

_HQ = [
    ("mask_decoder.hq.token", "mask_decoder.hf_token", "mask_decoder.hq_token", _EMBED_LEAVES),
    (
        "mask_decoder.hq.mlp.layers.#",
        "mask_decoder.hf_mlp.layers.#",
        "mask_decoder.hq_mask_mlp.@",
        _LINEAR_LEAVES,
    ),
    *(
        (
            f"mask_decoder.hq.{name}.{part}",
            f"mask_decoder.{name}.{index}",
            f"mask_decoder.{hf}_{part}",
            leaves,
        )
        for name, hf in (("compress_vit_feat", "compress_vit"), ("embedding_encoder", "encoder"))
        for part, index, leaves in (
            ("conv1", 0, _UPSCALE_LEAVES),
            ("norm", 1, _NORM_LEAVES),
            ("conv2", 3, _UPSCALE_LEAVES),
        )
    ),
    *(
        (
            f"mask_decoder.hq.{part}",
            f"mask_decoder.embedding_maskfeature.{index}",
            f"mask_decoder.mask_{part}",
            leaves,
        )
        for part, index, leaves in (
            ("conv1", 0, _CONV_LEAVES),
            ("norm", 1, _NORM_LEAVES),
            ("conv2", 3, _CONV_LEAVES),
        )
    ),
]
# Hugging Face's second name for one tensor: a file may hold either, or both if they are equal.
_HF_ALIAS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if leaf else module


def _leaf_table(rows) -> dict[str, tuple[str, str | None, Layout]]:
    table = {}
    for name, meta, hf, leaves in rows:
        for leaf, torch_leaf, layout in leaves:
            path = _join(name, leaf)
            assert path not in table, path
            table[path] = (
                _join(meta or name, torch_leaf),
                None if hf is None else _join(hf or name, torch_leaf),
                layout,
            )
    return table


_COMMON_ROWS = _NECK + _PROMPT_ENCODER + _MASK_DECODER + _HQ
TABLES = {
    ViTConfig: _leaf_table(_VIT + _COMMON_ROWS),
    TinyViTConfig: _leaf_table(_TINY_VIT + _COMMON_ROWS),
}


def torch_name(path: str, config: SamConfig, fmt: Format) -> tuple[str, Layout]:
    """The PyTorch name and the layout of a parameter.

    Args:
        path: in sam_jax, such as `image_encoder.blocks.3.attn.qkv.kernel`.
        config: the model's configuration.
        fmt: "meta" or "hf".

    Raises:
        CheckpointError: for a TinyViT in Hugging Face's format.
    """
    pattern = re.sub(r"\.\d+(?=\.|$)", ".#", path)
    meta, hf, layout = TABLES[type(config.image_encoder)][pattern]
    name = meta if fmt == "meta" else hf
    if name is None:
        raise CheckpointError(
            "Hugging Face's SamModel has no TinyViT encoder; write the Meta format instead"
        )
    for index in re.findall(r"\.(\d+)(?=\.|$)", path):
        if "#" in name:
            name = name.replace("#", index, 1)
        else:
            # The hypernetworks have three layers.
            depth = config.mask_decoder.iou_head_depth if "iou_prediction_head" in name else 3
            name = name.replace("@", _head_layer(int(index), depth))
    return name, layout


def _head_layer(index: int, depth: int) -> str:
    if index == 0:
        return "proj_in"
    return "proj_out" if index == depth - 1 else f"layers.{index - 1}"


def detect_format(tensors: Tensors) -> Format:
    """Whether tensors are in Meta's format or in Hugging Face's, by their names.

    Raises:
        CheckpointError: if they are in neither format.
    """
    starts = {name.partition(".")[0] for name in tensors}
    if starts & {"patch_embed", "image_encoder", "vision_encoder"} and not starts & {
        "prompt_encoder",
        "mask_decoder",
    }:
        raise CheckpointError("this is the checkpoint of an image encoder, expected a whole SAM")
    if any(name.startswith("image_encoder.patch_embed.") for name in tensors):
        return "meta"
    if any(name.startswith("vision_encoder.patch_embed.") for name in tensors):
        return "hf"
    some = ", ".join(map(clip, sorted(tensors)[:5]))
    raise CheckpointError(
        f"this is not a SAM checkpoint: found {len(tensors)} tensors"
        f"{some and f', such as {some}'}; expected Meta's names (image_encoder.patch_embed...) or "
        "Hugging Face's (vision_encoder.patch_embed...)"
    )


def from_torch(
    tensors: Tensors, config: SamConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Converts a PyTorch state dict to sam_jax's paths and layouts; views where possible.

    Args:
        tensors: the state dict.
        config: the model's configuration.
        shapes: shapes of sam_jax's parameters by path.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected or has the wrong shape.
    """
    fmt = detect_format(tensors)
    tensors = dict(tensors)
    if fmt == "hf":
        _settle_alias(tensors)
    names = {path: torch_name(path, config, fmt) for path in shapes}
    check_tensors(
        tensors,
        {name: _torch_shape(shapes[path], layout) for path, (name, layout) in names.items()},
    )
    return {path: layout.from_torch(tensors[name]) for path, (name, layout) in names.items()}


def to_torch(
    params: Mapping[str, ArrayLike], config: SamConfig, fmt: Format
) -> dict[str, np.ndarray]:
    """Converts parameters to PyTorch's names and layouts; the inverse of `from_torch`."""
    result = {}
    for path, value in params.items():
        name, layout = torch_name(path, config, fmt)
        # JAX arrays cannot become int64, the dtype of PyTorch's counters.
        result[name] = layout.to_torch(np.asarray(value))
    return result


def _torch_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    # A zero-stride array takes no memory.
    return layout.to_torch(np.broadcast_to(np.zeros((), np.int32), shape)).shape


def _settle_alias(tensors: dict[str, np.ndarray]) -> None:
    alias, name = _HF_ALIAS
    if alias not in tensors:
        return
    other = tensors.pop(alias)
    if not np.array_equal(tensors.setdefault(name, other), other):
        raise CheckpointError(
            f"{alias} and {name} are the same tensor in the model, but differ in the checkpoint"
        )
