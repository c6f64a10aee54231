"""Writes a PyTorch checkpoint, without PyTorch."""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sam_jax.checkpoints.unpickle import ORDERED_DICT, REBUILD_TENSOR, TORCH_STORAGES
from sam_jax.errors import CheckpointError
from sam_jax.files import atomic_write


def write_torch(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that `torch.load(path, weights_only=True)` reads as an OrderedDict.

    Names, order, shapes, dtypes and bits are kept; every tensor gets its own contiguous storage.
    At most one tensor is copied at a time. The write is atomic.

    Args:
        path: the file to write; an existing one is replaced.
        tensors: name -> array of any shape and layout, with a dtype that `read_tensors` reads.

    Raises:
        CheckpointError: if an array has another dtype; nothing is written.
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if _little_endian(array.dtype) not in TORCH_STORAGES:
            dtypes = ", ".join(str(dtype) for dtype in TORCH_STORAGES)
            raise CheckpointError(f"{name!r} is {array.dtype}; cast it to one of {dtypes}.")
    with (
        atomic_write(Path(path)) as temporary,
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        _write_entry(archive, file, "data.pkl", _pickled_state_dict(arrays))
        _write_entry(archive, file, "byteorder", b"little")
        for index, array in enumerate(arrays.values()):
            contiguous = np.asarray(array, _little_endian(array.dtype), order="C")
            _write_entry(archive, file, f"data/{index}", contiguous.reshape(-1).view(np.uint8).data)
        _write_entry(archive, file, "version", b"3\n")


def _write_entry(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, content: bytes | memoryview
) -> None:
    """Adds an uncompressed entry whose content begins at a multiple of 64 bytes, as in torch."""
    entry = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: equal tensors give equal files
    large = len(content) >= 2**31  # more than the plain zip format can describe
    # In the local header: 30 bytes, the name, zip64's 20 bytes, then the padding as an extra field.
    start = file.tell() + 30 + len(entry.filename) + (20 if large else 0) + 4
    padding = -start % 64
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=large) as output:
        output.write(content)


def _pickled_state_dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle that torch writes for an OrderedDict of tensors; tensor i is in entry data/i."""

    def call(name: str, *arguments: bytes) -> bytes:
        return global_(name) + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE

    def global_(name: str) -> bytes:
        module, _, attribute = name.rpartition(".")
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def plain(value: str | int | tuple[int, ...]) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP

    def tensor(index: int, array: np.ndarray) -> bytes:
        kind = global_(TORCH_STORAGES[_little_endian(array.dtype)])
        place = plain("storage") + kind + plain(str(index)) + plain("cpu") + plain(array.size)
        return call(
            REBUILD_TENSOR,
            pickle.MARK + place + pickle.TUPLE + pickle.BINPERSID,
            plain(0),  # the offset
            plain(array.shape),
            plain(_contiguous_strides(array.shape)),
            pickle.NEWFALSE,  # requires_grad
            call(ORDERED_DICT),  # hooks
        )

    items = [plain(name) + tensor(i, array) for i, (name, array) in enumerate(arrays.items())]
    state_dict = call(ORDERED_DICT) + pickle.MARK + b"".join(items) + pickle.SETITEMS
    return pickle.PROTO + b"\x02" + state_dict + pickle.STOP


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


def _little_endian(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("<")
