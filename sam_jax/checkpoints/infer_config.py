"""Infers a checkpoint's prefix and configuration from the names and shapes of its tensors."""

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
    """Infers a configuration from the shapes of a checkpoint's tensors.

    Settings that shapes do not determine are those of the published models: 8 decoder heads, and
    for TinyViT an image size of 1024 pixels, or, if the stem has stride 1, LiteMedSAM's 256 pixels
    and normalization.

    Raises:
        CheckpointError: if the tensors are not those of a SAM, or lack the relative positions that
            determine the number of heads.
    """
    try:
        return _infer_config(tensors, detect_format(tensors))
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the shapes of the tensors are not those of a SAM ({error}): a tensor that determines "
            "the configuration is missing or has the wrong shape. If the checkpoint comes with a "
            "config.json, keep both in one folder and pass the folder"
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
                f"missing: {key}, without which the configuration cannot be inferred. If the "
                "checkpoint comes with a config.json, keep both in one folder and pass the folder"
            )
        return tensors[key].shape

    def count(pattern: str, *indices: int) -> int:
        """How many consecutive indices, from 0, occur in place of the pattern's next "#"."""
        prefix = name(pattern, *indices).split("#")[0]
        found = {k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)}
        # Stop at the first that is missing: any beyond it are unexpected tensors.
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
    dims, heads, windows = [stem], [stem // 32], [7]  # the first stage has no attention
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


# Parts of names that come from PyTorch's wrappers: data parallelism, compilation, FSDP, activation
# checkpointing. A SAM does not have such names.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_FIRST_TENSOR = re.compile(r"((?:.*?\.)?)(?:image|vision)_encoder\.patch_embed\.")


def strip_prefix(tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes prefixes of modules around the SAM from the names of tensors.

    Removes PyTorch's wrappers at any level (`module._orig_mod.`, or `image_encoder._orig_mod.`) and
    one prefix that all names share (`sam.`, `model.net.`).

    Returns:
        The tensors, and the parts removed from their names.

    Raises:
        CheckpointError: if only some names have the prefix, or if two names become the same.
    """
    # torch.optim.swa_utils.AveragedModel has a counter next to its `module.`.
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] != "n_averaged"}
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    left_out = sorted({part for name in tensors for part in _WRAPPERS.findall(name)})
    if len(plain) < len(tensors):
        raise CheckpointError(
            f"some names differ only by {', '.join(left_out)}, so the file has several models. In "
            "torch, save only one: torch.save(model.state_dict(), path)"
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
            f"as {clip(others[0])!r}. In torch, save only the SAM: "
            f"torch.save(whole.{clip(prefix)}state_dict(), path)"
        )
    plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain, [*left_out, prefix]
