"""Reads and writes safetensors files."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sam_jax.errors import CheckpointError, clip
from sam_jax.files import atomic_write, map_file, read_json

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(path: Path, file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, as views of the mapped file."""
    try:
        # The library checks the header: dtypes, shapes, and offsets that cover the data exactly.
        # It cannot return numpy arrays that are views of the file; the code below does.
        with safetensors.safe_open(path, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"begins like a .safetensors file, but is damaged ({error}): most likely an unfinished "
            "download. Fetch it again."
        ) from error
    data = map_file(file)
    (header_length,) = struct.unpack("<Q", data[:8])
    try:
        header = read_json(bytes(data[8 : 8 + header_length]))
    except ValueError as error:
        raise CheckpointError(f"its header cannot be read: {error}") from error
    body = data[8 + header_length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            dtypes = " ".join(_SAFETENSORS_DTYPES)
            raise CheckpointError(
                f"entry {clip(name)!r} is {entry['dtype']}; expected one of {dtypes}."
            )
        begin, end = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        try:
            tensors[name] = np.ndarray(entry["shape"], dtype, buffer=body[begin:end])
        except ValueError as error:
            raise CheckpointError(f"entry {clip(name)!r}: {error}") from error
    return tensors


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Writes a .safetensors file, atomically. Names, shapes, dtypes and bits are kept.

    Args:
        path: the file to write; an existing one is replaced.
        tensors: name -> array of any shape and layout, with a dtype that `read_tensors` reads.
        metadata: of the file; the default declares PyTorch tensors, which `transformers` requires.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full.
    """
    # The library reads contiguous memory, so strided arrays must be copied first.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with atomic_write(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:  # such as a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(mode)  # the library ignores the umask and makes the file private
