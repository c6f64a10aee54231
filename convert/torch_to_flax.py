#!/usr/bin/env python
"""Converts a PyTorch checkpoint to a sam_jax folder. PyTorch is not needed.

    python convert/torch_to_flax.py --checkpoint sam_vit_b_01ec64.pth --output sam_vit_b

Accepts what `from_pretrained` accepts:
- Meta's `.pth` (shapes distinguish ViT-B, L and H) and MobileSAM's `.pt`;
- Hugging Face folders, `.safetensors`, short names and hub repositories.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from sam_jax.checkpoints import from_pretrained, load_params, native, read_state_dict
from sam_jax.checkpoints.download import resolve
from sam_jax.checkpoints.infer_config import infer_config
from sam_jax.checkpoints.names import detect_format
from sam_jax.config import Preprocessing, SamConfig, TinyViTConfig, with_preprocessing


@dataclasses.dataclass
class Args:
    """Convert a PyTorch checkpoint to a sam_jax folder."""

    checkpoint: str
    """File, folder, short name or hub repository."""
    output: Path
    """The folder to create."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the parameters; the checkpoint's if left out."""
    preprocessing: Preprocessing | None = None
    """Preprocessing of images, stored with the weights: medsam for a MedSAM."""
    verify: bool = False
    """Run PyTorch's model and the converted one on an image and print the differences."""


def main(args: Args) -> None:
    """Converts the checkpoint, and compares the models with --verify."""
    if args.verify:
        check_verifiable(args.checkpoint)
    params, config = load_params(args.checkpoint)
    config = with_preprocessing(config, args.preprocessing)
    native.save(args.output, params, config, args.dtype)
    count = sum(v.size for v in params.values())
    print(f"{args.output}: {len(params)} arrays, {count:,} numbers")
    if args.verify:
        verify(args.checkpoint, args.output, config)


def check_verifiable(checkpoint: str) -> None:
    """Raises ValueError, before anything is written, if there is nothing to compare with."""
    if native.is_checkpoint(resolve(checkpoint)):
        raise ValueError(
            f"--verify compares with PyTorch's model, but {checkpoint} is already a sam_jax "
            "folder; give the PyTorch checkpoint, or leave --verify out"
        )
    tensors = read_state_dict(checkpoint)
    config = infer_config(tensors)
    tiny = isinstance(config.image_encoder, TinyViTConfig)
    if config.hq or (tiny and config.image_encoder.stem_stride == 1):
        raise ValueError("--verify does not support SAM-HQ and LiteMedSAM; leave it out")
    try:
        from torch_reference import import_reference

        if detect_format(tensors) == "hf":
            importlib.import_module("transformers")
        else:
            import_reference("mobile_sam" if tiny else "segment_anything")
    except ImportError as error:
        raise ValueError(
            f"--verify runs PyTorch's model, which cannot be imported: {error}"
        ) from error


def verify(checkpoint: str, output: Path, config: SamConfig) -> None:
    """Runs the reference on the PyTorch checkpoint and sam_jax on the converted one."""
    import torch
    from torch_reference import hf_sam, meta_sam

    tensors = read_state_dict(checkpoint)
    fmt = detect_format(tensors)
    reference = meta_sam(config) if fmt == "meta" else hf_sam(config)
    state = {k: torch.from_numpy(np.array(v, np.float32)) for k, v in tensors.items()}
    # Hugging Face ties two names to one tensor; a file may hold either.
    reference.load_state_dict(state, strict=fmt == "meta")
    reference.eval()  # after loading: MobileSAM copies its attention biases in this call

    size = config.image_size
    pixels, points = _image(size), np.array([[[[0.4 * size, 0.5 * size]]]], np.float32)
    with jax.default_matmul_precision("highest"):
        model = from_pretrained(output)
        embedding = model.get_image_embeddings(pixels)
        scores, masks = model(image_embeddings=embedding, input_points=points)

    with torch.no_grad():
        torch_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
        if fmt == "hf":
            expected_embedding = reference.get_image_embeddings(torch_pixels)
            output = reference(
                image_embeddings=expected_embedding, input_points=torch.from_numpy(points)
            )
            expected_masks, expected_scores = output.pred_masks[0], output.iou_scores[0]
        else:
            expected_embedding = reference.image_encoder(torch_pixels)
            sparse, dense = reference.prompt_encoder(
                points=(torch.from_numpy(points[0]), torch.ones(1, 1)), boxes=None, masks=None
            )
            expected_masks, expected_scores = reference.mask_decoder(
                image_embeddings=expected_embedding,
                image_pe=reference.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )

    print("Largest difference between PyTorch and sam_jax, relative to the largest value:")
    for name, actual, expected in (
        ("image embedding", embedding, expected_embedding),
        ("mask logits", masks[0], expected_masks),
        ("predicted IoUs", scores[0], expected_scores),
    ):
        actual, expected = np.asarray(actual), expected.numpy()
        print(f"  {name}: {np.abs(actual - expected).max() / np.abs(expected).max():.1e}")
    actual, expected = np.asarray(masks[0]) > 0, expected_masks.numpy() > 0
    union = (actual | expected).sum()
    print(f"  IoU of the masks: {(actual & expected).sum() / union if union else 1:.6f}")


def _image(size: int) -> np.ndarray:
    """Normalized pixels of a disc on a gradient, [1, size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    disc = (x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.04
    gray = np.where(disc, 1.5, x - y)
    return np.stack([gray, gray * y, gray * x], axis=-1)[None].astype(np.float32)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
