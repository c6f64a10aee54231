import pytest
import safetensors.torch
import torch
from torch_files import arrays_to_write, assert_same, tensors_of_every_dtype

from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.errors import CheckpointError


def test_reads_every_dtype_of_a_safetensors_file(tmp_path):
    tensors = tensors_of_every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    arrays = read_tensors(tmp_path / "x")
    assert_same({name: arrays[name] for name in tensors}, tensors)
    assert len(arrays) == len(tensors)


def test_names_an_unknown_dtype_of_a_safetensors_file(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="'w' is C64; expected one of F64"):
        read_tensors(tmp_path / "x")


def test_torch_reads_what_write_safetensors_writes(tmp_path):
    arrays = arrays_to_write()
    write_safetensors(tmp_path / "x.safetensors", arrays)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert_same(arrays, {name: tensors[name] for name in arrays})
    assert len(tensors) == len(arrays)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
