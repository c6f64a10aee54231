#!/usr/bin/env python
"""Converts a sam_jax folder to a PyTorch checkpoint, bit for bit, without PyTorch.

python convert/flax_to_torch.py --checkpoint sam_vit_b --output sam_vit_b.pth --format meta
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from sam_jax.checkpoints import load_params, write_checkpoint
from sam_jax.checkpoints.names import Format


@dataclasses.dataclass
class Args:
    """Convert a sam_jax folder to a PyTorch checkpoint."""

    checkpoint: str
    """The folder (or anything else that from_pretrained accepts)."""
    output: Path
    """The file to create: .pth, .pt or .bin for torch.load, or .safetensors."""
    format: Format
    """meta: names of `segment_anything` and MobileSAM; hf: names of `transformers`, with its
    config.json next to the file."""


def main(args: Args) -> None:
    """Converts the checkpoint."""
    params, config = load_params(args.checkpoint)
    write_checkpoint(args.output, params, config=config, fmt=args.format)
    print(f"{args.output}: {len(params)} tensors with names of format {args.format}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
