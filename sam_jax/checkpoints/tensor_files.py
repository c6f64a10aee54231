"""Reads a file of named tensors in any supported format."""

import os
from pathlib import Path

import numpy as np

from sam_jax.checkpoints.safetensors import read_safetensors
from sam_jax.checkpoints.torch_read import EXPECTED, MAGIC, read_legacy_torch, read_torch
from sam_jax.errors import CheckpointError


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every tensor of a torch file (`torch.save`, any version) or a safetensors file.

    The format is recognized by content, not by name. The state dict may be up to two levels deep;
    if there are several of a SAM, the one under "model", "state_dict", "model_state_dict",
    "model_state", "module", "network" or "net" is read. Anything but tensors is ignored.

    Returns:
        Name -> array, in the file's order, with the file's shapes and dtypes (float64, float32,
        float16, bfloat16, int64 to int8, uint8, bool). The arrays are read-only views of the mapped
        file: tensors that share storage still do, and strided tensors keep their strides.

    Raises:
        FileNotFoundError: if the file does not exist.
        CheckpointError: if it is not a complete file of named tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {EXPECTED}.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; expected {EXPECTED}. Pass the file's path.")
    with path.open("rb") as file:
        head = file.read(256)
        try:
            if head.startswith(b"PK\x03\x04"):
                return read_torch(file)
            if head.startswith(b"\x80") and MAGIC in head:
                return read_legacy_torch(file)
            if head[8:9] == b"{":  # the header's length in 8 bytes, then JSON
                return read_safetensors(path, file)
            raise CheckpointError(_what_else(head))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _what_else(head: bytes) -> str:
    """Says what a file that is not a checkpoint is, by its first bytes, and what to do."""
    if not head:
        return f"the file is empty; expected {EXPECTED}. Fetch or save it again."
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself. Run `git lfs pull`."
    if head.startswith(b"\x80"):
        return (
            f"this is a plain pickle that torch did not write; expected {EXPECTED}. In the program "
            "that wrote it, save the tensors: torch.save(model.state_dict(), path)."
        )
    if head.lstrip().startswith(b"<"):
        return (
            f"this is a web page, most likely an error page instead of the download; expected "
            f"{EXPECTED}. Fetch it again."
        )
    return f"the file begins with {head[:16]!r}; expected {EXPECTED}."
