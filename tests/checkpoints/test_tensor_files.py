import random
import resource
import stat
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch

from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.checkpoints.torch_write import write_torch
from sam_jax.errors import CheckpointError


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_a_failed_write_leaves_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "x"
    write(path, {"w": np.ones(2, np.float32)})
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, {"w": np.zeros(2, np.float32)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_a_full_disk_error_names_the_file(tmp_path, write):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # simulates a full disk
    try:
        with pytest.raises(OSError, match=r"(?i)file too large") as caught:
            write(tmp_path / "x", {"w": np.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_a_written_file_has_the_usual_permissions(tmp_path, write):
    write(tmp_path / "x", {"w": np.ones(2, np.float32)})
    (tmp_path / "usual").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_reading_maps_the_file(tmp_path, write):
    write(tmp_path / "x", {"w": np.ones((16, 1024, 1024), np.uint8)})
    tracemalloc.start()
    try:
        array = read_tensors(tmp_path / "x")["w"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert not array.flags.writeable
    assert array.sum() == 16 * 2**20


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth does not exist; expected a torch"):
        read_tensors(tmp_path / "x.pth")


def test_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file; expected a torch checkpoint"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "this is a web page"),
        (b"\n<html>", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"learning rate: 0.1\n", "begins with b'learning rate: 0'"),
        (b'\x10\0\0\0\0\0\0\0{"w":', "damaged .* Fetch it again"),
        (struct.pack("<Q", 60_002) + b'{"w":' + b"[" * 59_997, "damaged .* Fetch it again"),
        (b"PK\x03\x04", "unfinished download"),
    ],
)
def test_errors_say_what_the_file_is(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path / "x.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ")


@pytest.mark.parametrize("write", [write_torch, write_safetensors])
@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_truncated_file(tmp_path, write, part):
    write(tmp_path / "x", {"w": np.arange(1000)})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match="unfinished download"):
        read_tensors(tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_torch, write_safetensors])
def test_damaged_bytes(tmp_path, write):
    """Random byte changes raise nothing but CheckpointError, and cause no crash."""
    write(tmp_path / "x", {"w": np.arange(6).reshape(2, 3), "b": np.ones(2, np.float32)})
    whole = (tmp_path / "x").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "x").write_bytes(damaged)
        try:
            for array in read_tensors(tmp_path / "x").values():
                array.tobytes()
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_an_unrelated_zip_file(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.ones(2))
    with pytest.raises(CheckpointError, match="zip file without a torch checkpoint"):
        read_tensors(tmp_path / "x.npz")
