"""What the names and shapes of a checkpoint imply: its prefix and its configuration."""

import itertools
import math
import re

import numpy as np

from sam_jax.checkpoints.names import TABLES, Format, Tensors, detect_format
from sam_jax.config import (
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamConfig,
    TinyViTConfig,
    ViTConfig,
    lite_medsam,
    mobile_sam,
)
from sam_jax.errors import CheckpointError, clip, listed


def infer_config(tensors: Tensors) -> SamConfig:
    """The configuration of a checkpoint without one, read from its tensors' shapes.

    What shapes do not tell is taken from the published models: 8 decoder heads, and for TinyViT an
    image size of 1024, or of 256 and LiteMedSAM's normalization where the stem halves nothing.

    Raises:
        CheckpointError: if the tensors are no SAM's, or lack the relative positions that tell the
            number of heads.
    """
    try:
        return _infer_config(tensors, detect_format(tensors))
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the shapes of the tensors are no SAM's ({error}): a tensor that tells the model's "
            "configuration is missing or misshapen. If the checkpoint comes with a config.json, "
            "keep both in one folder and pass the folder"
        ) from error


def _infer_config(tensors: Tensors, fmt: Format) -> SamConfig:
    tiny = "image_encoder.patch_embed.seq.0.c.weight" in tensors
    tables = TABLES[TinyViTConfig if tiny else ViTConfig]

    def name(pattern: str, *indices: int) -> str:
        meta, hf, _ = tables[pattern]
        torch = meta if fmt == "meta" else hf
        assert torch is not None  # a TinyViT's names are Meta's
        for index in indices:
            torch = torch.replace("#", str(index), 1)
        return torch

    def shape(pattern: str, *indices: int) -> tuple[int, ...]:
        key = name(pattern, *indices)
        if key not in tensors:
            raise CheckpointError(
                f"missing: {key}; without it the model's configuration cannot be told. If the "
                "checkpoint comes with a config.json, keep both in one folder and pass the folder"
            )
        return tensors[key].shape

    def count(pattern: str, *indices: int) -> int:
        """How many indices from 0 on stand in the place of the pattern's next "#"."""
        prefix = name(pattern, *indices).split("#")[0]
        found = {k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)}
        # Up to the first that is missing: what is beyond is left over, however large its number.
        return next(i for i in itertools.count() if str(i) not in found)

    if tiny:
        head_bias = name("image_encoder.head.bias")
        encoder = _infer_tiny_vit(shape, count, tensors.get(head_bias))
        published = lite_medsam() if encoder.stem_stride == 1 else mobile_sam()
        image_size, normalization = published.image_size, published.normalization
    else:
        encoder, image_size = _infer_vit(
            shape, count, name("image_encoder.blocks.#.attn.qkv.bias", 0) in tensors
        )
        normalization = "statistics"
    head = "mask_decoder.iou_prediction_head.layers.#.kernel"
    if fmt == "meta":
        iou_head_depth = count(head)
    else:
        prefix = "mask_decoder.iou_prediction_head.layers."
        inner = {k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)}
        iou_head_depth = 2 + next(i for i in itertools.count() if str(i) not in inner)
    num_mask_tokens, dim = shape("mask_decoder.mask_tokens")
    cross = "mask_decoder.transformer.layers.#.cross_attn_token_to_image.q_proj.kernel"
    iou_in = name(head, 0).replace("@", "proj_in")
    return SamConfig(
        image_encoder=encoder,
        prompt_encoder=PromptEncoderConfig(
            mask_in_chans=shape("prompt_encoder.mask_downscaling.conv2.kernel")[0]
        ),
        mask_decoder=MaskDecoderConfig(
            transformer_depth=count("mask_decoder.transformer.layers.#.norm1.scale"),
            mlp_dim=shape("mask_decoder.transformer.layers.#.mlp.lin1.kernel", 0)[0],
            attention_downsample_rate=dim // shape(cross, 0)[0],
            num_multimask_outputs=num_mask_tokens - 1,
            iou_head_depth=iou_head_depth,
            iou_head_hidden_dim=tensors[iou_in].shape[0] if iou_in in tensors else 256,
            layer_norm_eps=1e-5 if fmt == "meta" else 1e-6,
        ),
        image_size=image_size,
        prompt_embed_dim=dim,
        normalization=normalization,
        hq=name("mask_decoder.hq.token") in tensors,
    )


def _infer_vit(shape, count, qkv_bias: bool) -> tuple[ViTConfig, int]:
    embed_dim, _, patch_size, _ = shape("image_encoder.patch_embed.kernel")
    grid = shape("image_encoder.pos_embed")[1]
    depth = count("image_encoder.blocks.#.norm1.scale")
    tables = [shape("image_encoder.blocks.#.attn.rel_pos_h", i) for i in range(depth)]
    lengths = [length for length, _ in tables]
    config = ViTConfig(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // tables[0][1],
        mlp_dim=shape("image_encoder.blocks.#.mlp.lin1.kernel", 0)[0],
        global_attn_indexes=tuple(i for i, n in enumerate(lengths) if n == 2 * grid - 1),
        patch_size=patch_size,
        window_size=(min(lengths) + 1) // 2,
        qkv_bias=qkv_bias,
    )
    return config, grid * patch_size


def _infer_tiny_vit(shape, count, head_bias: np.ndarray | None) -> TinyViTConfig:
    block = "image_encoder.layers.#.blocks.#"
    stages = count("image_encoder.layers.#.downsample.conv1.kernel")
    depths = [count(f"{block}.conv1.kernel", 0)]
    depths += [count(f"{block}.attn.qkv.kernel", i) for i in range(1, stages)]
    hidden, stem, _, _ = shape(f"{block}.conv1.kernel", 0, 0)
    dims, heads, windows = [stem], [stem // 32], [7]  # the first stage attends to nothing
    for i in range(1, stages):
        dims.append(shape(f"{block}.attn.proj.kernel", i, 0)[0])
        num_heads, offsets = shape(f"{block}.attn.attention_biases", i, 0)
        heads.append(num_heads)
        windows.append(math.isqrt(offsets))
    return TinyViTConfig(
        embed_dims=tuple(dims),
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_sizes=tuple(windows),
        mlp_ratio=shape(f"{block}.mlp.fc1.kernel", 1, 0)[0] / dims[1],
        mbconv_expand_ratio=hidden / stem,
        stem_stride=1 if shape("image_encoder.patch_embed.conv1.kernel")[-1] == 1 else 2,
        num_classes=None if head_bias is None else len(head_bias),
    )


# What PyTorch puts into the names of a module that it wraps: data parallelism, compilation, FSDP,
# activation checkpointing. No part of a SAM is called so.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_FIRST_TENSOR = re.compile(r"((?:.*?\.)?)(?:image|vision)_encoder\.patch_embed\.")


def strip_prefix(tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by names without what a training script's modules around the SAM put there.

    Left out are PyTorch's wrappers, wherever they stand (`module._orig_mod.`, or
    `image_encoder._orig_mod.`), and one prefix that all names have (`sam.`, `model.net.`).

    Returns:
        The tensors, and what was left out of their names.

    Raises:
        CheckpointError: if some names have the SAM's prefix and others do not, or if two become
            one.
    """
    # The counter of torch.optim.swa_utils.AveragedModel stands beside its `module.`.
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] != "n_averaged"}
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    left_out = sorted({part for name in tensors for part in _WRAPPERS.findall(name)})
    if len(plain) < len(tensors):
        raise CheckpointError(
            f"some tensors have one name but for {', '.join(left_out)}, so there are several "
            "models here. In torch, save one alone: torch.save(model.state_dict(), path)"
        )
    prefixes = sorted({m[1] for name in plain if (m := _FIRST_TENSOR.match(name))})
    if not prefixes or "" in prefixes:
        return plain, left_out
    prefix = prefixes[0]
    others = [name for name in plain if not name.startswith(prefix)]
    if others:
        raise CheckpointError(
            f"the names of a SAM's tensors begin with {listed([repr(p) for p in prefixes])}, but "
            f"{len(others)} of the {len(plain)} tensors do not begin with {clip(prefix)!r}, such "
            f"as {clip(others[0])!r}. In torch, save the SAM alone, from the module that the names "
            f"begin in: torch.save(whole.{clip(prefix)}state_dict(), path)"
        )
    plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain, [*left_out, prefix]
