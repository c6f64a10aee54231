import collections
import tracemalloc

import numpy as np
import pytest
import torch
from torch_files import arrays_to_write, assert_same

from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.checkpoints.torch_write import write_torch
from sam_jax.errors import CheckpointError


def test_torch_reads_what_write_torch_writes(tmp_path):
    arrays = arrays_to_write()
    write_torch(tmp_path / "x.pth", arrays)
    for mmap in (False, True):
        tensors = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert type(tensors) is collections.OrderedDict
        assert_same(arrays, tensors)
        for name, tensor in tensors.items():
            assert tensor.stride() == torch.empty(tensor.shape).stride(), name
    read = read_tensors(tmp_path / "x.pth")
    assert_same(read, tensors)
    assert all(array.ctypes.data % 64 == 0 for array in read.values() if array.size)


def test_write_torch_swaps_big_endian_bytes(tmp_path):
    write_torch(tmp_path / "x.pth", {"w": np.arange(3, dtype=">f4")})
    assert_same(read_tensors(tmp_path / "x.pth"), {"w": torch.arange(3.0)})


def test_the_same_arrays_give_the_same_file(tmp_path):
    write_torch(tmp_path / "a.pth", arrays_to_write())
    write_torch(tmp_path / "b.pth", arrays_to_write())
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_write_torch_names_an_unknown_dtype(tmp_path):
    with pytest.raises(CheckpointError, match="'w' is complex64; cast it to one of float64"):
        write_torch(tmp_path / "x.pth", {"w": np.ones(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_write_torch_copies_one_tensor_at_a_time(tmp_path):
    transposed = np.ones((1024, 2048), np.uint8).T
    tracemalloc.start()
    try:
        write_torch(tmp_path / "x", {str(i): transposed for i in range(8)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20
