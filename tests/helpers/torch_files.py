"""PyTorch files, written by PyTorch and by hand."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import torch

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def bits_of(tensor):
    """The bytes of a torch tensor or a numpy array, in row-major order."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.tobytes()


def assert_same(arrays, tensors):
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tuple(tensor.shape), name
        assert arrays[name].dtype == DTYPES[tensor.dtype], name
        assert bits_of(arrays[name]) == bits_of(tensor), name


def tensors_of_every_dtype():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 100, (3, 4), generator=generator)
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors["torch.bool"] = values % 2 == 0
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors["scalar"] = torch.tensor(7)
    tensors["none of them"] = torch.zeros(0, 4)
    tensors["with space, ünïcode"] = torch.ones(1)
    return tensors


def arrays_to_write():
    arrays = {
        name: read.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        if read.dtype is torch.bfloat16
        else read.numpy()
        for name, read in tensors_of_every_dtype().items()
    }
    arrays["transposed"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
    arrays["reversed"] = np.arange(12)[::-1]
    arrays["expanded"] = np.broadcast_to(np.float32(2), (3, 2))
    arrays["bfloat16, strided"] = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T
    arrays["zero, deep"] = np.zeros((2, 0, 3), np.int64)
    return arrays


def write_bytes(path, content):
    path.write_bytes(content)
    return path


STORAGE = b"\x00" * 24  # six float32


STORAGE_ID = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
)


def plain(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor_opcodes(offset, size, stride, claimed=6):
    storage = STORAGE_ID % plain(claimed)
    arguments = storage + plain(offset) + plain(size) + plain(stride) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def write_forged(path, value_opcodes, **kwargs):
    """Writes a torch file of {"w": value}, where value_opcodes leave the value on the stack."""
    write_zip(path, b"\x80\x02}X\x01\x00\x00\x00w" + value_opcodes + b"s.", **kwargs)


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, byteorder="little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", STORAGE)
