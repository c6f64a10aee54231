import argparse
import collections
import contextlib
import datetime
import enum
import functools
import os
import pathlib
import pickle
import random
import resource
import stat
import struct
import time
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from sam_jax.checkpoints import unpickle
from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.checkpoints.torch_write import write_torch
from sam_jax.errors import CheckpointError

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


# ---- reading what torch writes -------------------------------------------------------------------


def test_reads_every_dtype_of_a_torch_file(tmp_path):
    torch.save(tensors_of_every_dtype(), tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_a_module_s_state_dict(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "x.pth", pickle_protocol=protocol)
    assert_same(read_tensors(tmp_path / "x.pth"), module.state_dict())


def test_reads_parameters(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    torch.save({"w": parameter, "frozen": parameter.requires_grad_(False)}, tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), {"w": parameter, "frozen": parameter})


def test_reads_strided_and_shared_views(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "every other": base[1::2, ::3],
        "overlapping": base.as_strided((3, 4), (2, 1), 5),
        "one element": base[2, 3],
        "no element": base[4:],
    }
    torch.save(tensors, tmp_path / "x.pth")
    arrays = read_tensors(tmp_path / "x.pth")
    assert_same(arrays, torch.load(tmp_path / "x.pth", weights_only=True))
    assert np.shares_memory(arrays["base"], arrays["every other"])


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "model_state", "module"]
)
def test_takes_out_a_nested_state_dict(tmp_path, key):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    beside = {"epoch": 3, "loss": 0.5, "optimizer": optimizer.state_dict(), "names": ["a", "b"]}
    torch.save({**beside, key: model.state_dict()}, tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), model.state_dict())


class Color(enum.Enum):
    RED = 1


class Custom(dict):
    def __init__(self):
        super().__init__(a=1)
        self.attribute = [self]


def beside_the_weights():
    """What training scripts save with the weights, by name."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    with_attribute = torch.ones(2)
    with_attribute.note = "mine"
    recursive = ([],)
    recursive[0].append(recursive)
    return {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "counter": collections.Counter({3: 1}),
        "defaultdict": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2]),
        "keys": {(1, 2): 3, 4.5: 6, None: 7, True: 8, -(2**80): 9, b"x": 10, Color.RED: 11},
        "sets": ({1, 2}, frozenset({3}), set()),
        "bytes": (b"abc", bytearray(b"def"), "x" * 300),
        "numbers": (2**70, -1, 1.5, 1j, True, None),
        "numpy": (
            np.float64(0.5),
            np.int64(3),
            np.bool_(1),
            np.arange(6).reshape(2, 3),
            np.ones(0),
        ),
        "dtypes": (torch.float16, np.dtype("float32"), torch.Size([2, 3]), torch.device("cpu")),
        "Namespace": argparse.Namespace(lr=0.1, milestones=[3, 5]),
        "path and time": (pathlib.PurePosixPath("/a"), datetime.datetime(2024, 1, 2)),
        "custom": (Custom(), Color.RED, functools.partial(print, 1), int, len),
        "module": torch.nn.Sequential(torch.nn.Linear(2, 2)),
        "recursive": recursive,
        "random state": torch.get_rng_state(),
        "other tensors": [
            torch.ones(2, dtype=torch.complex64),
            torch.ones(2).to(torch.float8_e4m3fn),
            torch.ones(2, dtype=torch.uint16),
            torch.eye(2).to_sparse(),
            torch.empty(2, device="meta"),
            with_attribute,
            torch.ones(2).untyped_storage(),
        ],
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("beside", beside_the_weights().items(), ids=lambda beside: beside[0])
def test_what_lies_beside_the_weights_is_not_interpreted(tmp_path, beside, protocol):
    name, value = beside
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    content = {f"{name}, before": value, "model": weights, f"{name}, after": value}
    torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "x.pth", weights_only=False)["model"]
    assert_same(read_tensors(tmp_path / "x.pth"), expected)


def test_finds_the_weights(tmp_path):
    """Beside tensors that do not count, under names nobody has foreseen, one or two levels down."""
    name = "image_encoder.patch_embed.proj.weight"
    weights = {name: torch.arange(3.0), "mask": torch.zeros(1).expand(100), "x": torch.ones(())}
    weights["windows"] = torch.arange(10.0).unfold(0, 3, 1)
    other = {name: torch.zeros(3)}
    for content in (
        {"model": weights, "mask": weights["mask"], "windows": weights["windows"]},
        {"model": {"name": "vit_b"}, "state_dict": weights},
        {"model": {}, "state_dict": weights},
        {"model": {"fc.weight": torch.ones(2)}, "sam": weights},
        {**weights, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}, "_extra_state": None},
        {**weights, "ema": other},
        {"ema": weights},
        {"model_ema": weights, "again": weights, "optimizer": {"lr": torch.tensor(0.1)}},
        {"state": {"model": weights, "ema": other}, "args": {"a": {"b": {"c": 1}}}},
        {"ema": other, "net": other, "model": weights},
    ):
        torch.save(content, tmp_path / "x.pth")
        assert_same(read_tensors(tmp_path / "x.pth"), weights)
    torch.save({"ema": weights, "best": {"sam": other}}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"several dicts of tensors, under 'ema', 'best\.sam'"
    ):
        read_tensors(tmp_path / "x.pth")


def test_an_unreadable_tensor_matters_among_the_weights_only(tmp_path):
    bad = tensor_opcodes(0, (7,), (1,))
    good = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + tensor_opcodes(0, (2,), (1,)) + b"ss"
    beside = b"X\x01\x00\x00\x00b" + bad + b"s"
    write_zip(tmp_path / "x", b"\x80\x02}" + beside + good + b".")
    assert list(read_tensors(tmp_path / "x")) == ["w"]


def test_long_names_are_clipped(tmp_path):
    write_zip(tmp_path / "x", b"\x80\x02}X\x40\x42\x0f\x00" + 10**6 * b"n" + b"Ns.")
    with pytest.raises(CheckpointError) as error:
        read_tensors(tmp_path / "x")
    assert len(str(error.value)) < 1000


def test_reads_tensors_with_attributes(tmp_path):
    weights = {"w": torch.arange(3.0), "p": torch.nn.Parameter(torch.arange(2.0))}
    for tensor in weights.values():
        tensor.note = {"any": collections.Counter("thing")}
    torch.save(weights, tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True))


def test_names_the_entry_that_is_no_tensor(tmp_path):
    torch.save({3: torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a key is int"):
        read_tensors(tmp_path / "x.pth")
    torch.save([torch.ones(2)], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="expected a dict of tensors, not list"):
        read_tensors(tmp_path / "x.pth")
    torch.save({"w": {"a": {"b": {"deeper": torch.ones(2)}}}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="entry 'w' is dict"):
        read_tensors(tmp_path / "x.pth")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not torch\.nn\.modules\.linear\.Linear\. In torch"):
        read_tensors(tmp_path / "x.pth")
    torch.save({"w": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"entry 'w' is torch\._utils\._rebuild_tensor_v3"):
        read_tensors(tmp_path / "x.pth")


def test_reads_the_mobile_sam_checkpoint(mobile_sam_file):
    assert_same(read_tensors(mobile_sam_file), torch.load(mobile_sam_file, weights_only=True))


# ---- safetensors ---------------------------------------------------------------------------------


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


# ---- writing -------------------------------------------------------------------------------------


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


def test_torch_reads_what_write_safetensors_writes(tmp_path):
    arrays = arrays_to_write()
    write_safetensors(tmp_path / "x.safetensors", arrays)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert_same(arrays, {name: tensors[name] for name in arrays})
    assert len(tensors) == len(arrays)
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


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
def test_a_full_disk_is_told_with_the_file(tmp_path, write):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # stands for the disk
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


# ---- memory --------------------------------------------------------------------------------------


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


def test_write_torch_copies_one_tensor_at_a_time(tmp_path):
    transposed = np.ones((1024, 2048), np.uint8).T
    tracemalloc.start()
    try:
        write_torch(tmp_path / "x", {str(i): transposed for i in range(8)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * 2**20


# ---- files that are no checkpoints ---------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.pth does not exist; expected a torch"):
        read_tensors(tmp_path / "x.pth")


def test_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is no file; expected a torch checkpoint"):
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
def test_what_a_file_is_instead(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path / "x.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_from_before_torch_1_6(tmp_path, protocol):
    """Pickles and storages in a row. As torch reads them, or refused, wherever they are damaged."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(9).bfloat16(), "c": torch.arange(7)}
    tensors["view"] = tensors["a"].t()
    beside = {"epoch": 3, "steps": collections.Counter({3: 1}), "z": torch.zeros(3).cfloat()}
    path, old = tmp_path / "x", {"_use_new_zipfile_serialization": False}
    torch.save({"model": tensors, **beside}, path, pickle_protocol=protocol, **old)
    found, expected = read_tensors(path), torch.load(path, weights_only=False)["model"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert np.array_equal(found[name].astype(np.float64), tensor.double().numpy())
    content, rng = path.read_bytes(), np.random.default_rng(0)
    with pytest.raises(CheckpointError, match=r"ends within a tensor\. Fetch it again"):
        read_tensors(write_bytes(path, content[:-1]))
    for position in rng.integers(0, len(content), 500):
        damaged = bytearray(content)
        damaged[position] = rng.integers(256)
        with contextlib.suppress(CheckpointError):
            read_tensors(write_bytes(path, damaged))


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path, is_legacy):
    weights, negated = {"w": torch.ones(2)}, torch._neg_view(torch.ones(3))
    options = {"_use_new_zipfile_serialization": not is_legacy}
    torch.save({"model": weights, "beside": negated}, tmp_path / "x", **options)
    assert_same(read_tensors(tmp_path / "x"), weights)
    torch.save({"w": negated}, tmp_path / "x", **options)
    with pytest.raises(CheckpointError, match=r"'w' is a tensor .*save tensor\.resolve_neg"):
        read_tensors(tmp_path / "x")


def test_quantized_tensors_beside_the_weights_of_an_old_file(tmp_path):
    weights = {"w": torch.ones(2)}
    for dtype in (torch.quint8, torch.qint8, torch.qint32):
        with warnings.catch_warnings(action="ignore"):
            quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)
        beside = {"a": quantized, "model": weights}
        torch.save(beside, tmp_path / "x", _use_new_zipfile_serialization=False)
        assert_same(read_tensors(tmp_path / "x"), weights)


def test_python_2(tmp_path):
    """Its strings, its OrderedDict of pairs, and torch 0.1's way to make a tensor."""
    tensor = tensor_opcodes(1, (2,), (2,)).replace(b"_v2", b"").replace(b"\x89}tR", b"tR")
    pairs = b"]](U\x01w" + tensor + b"ea"
    write_zip(tmp_path / "x", b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.")
    assert_same(read_tensors(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=True))


def test_a_number_of_megabytes_takes_no_longer(tmp_path):
    """As the number of a storage's elements, which is multiplied, any number of times."""
    write_forged(tmp_path / "x", tensor_opcodes(0, (2,), (1,), claimed=1 << 2**23))
    with pytest.raises(CheckpointError, match="refers to data in an unknown way"):
        read_tensors(tmp_path / "x")


def write_bytes(path, content):
    path.write_bytes(content)
    return path


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
def test_damaged_bytes_give_tensors_or_a_checkpoint_error(tmp_path, write):
    """Flips bytes at random: nothing but CheckpointError may come out, and no crash."""
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


# ---- files made to do harm -----------------------------------------------------------------------

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
    """A torch file of {"w": what value_opcodes leave on the stack}."""
    write_zip(path, b"\x80\x02}X\x01\x00\x00\x00w" + value_opcodes + b"s.", **kwargs)


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, byteorder="little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", STORAGE)


def test_a_forged_file_is_otherwise_good(tmp_path):
    """The files of this section are refused for what is forged in them, not for being forged."""
    write_forged(tmp_path / "x", tensor_opcodes(1, (2, 2), (2, 1)))
    assert_same(read_tensors(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=True))


class Runs:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, rf"{os.name}\.system"), (eval, r"\w+\.eval"), (os.mkdir, rf"{os.name}\.mkdir")],
)
def test_code_is_named_and_not_run(tmp_path, function, name, protocol):
    marker = tmp_path / "marker"
    command = {
        os.system: f"touch {marker}",
        eval: f"open({str(marker)!r}, 'w')",
        os.mkdir: str(marker),
    }[function]
    code = Runs(function, command)
    torch.save({"w": code}, tmp_path / "x", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=f"entry 'w' is {name}; nothing was run"):
        read_tensors(tmp_path / "x")
    weights = {"w": torch.ones(2)}
    beside = {"code": code, "model": weights, "hooks": [code], 3: {code}}
    torch.save(beside, tmp_path / "x", pickle_protocol=protocol)
    assert_same(read_tensors(tmp_path / "x"), weights)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        # NEWOBJ, NEWOBJ_EX, INST, OBJ, EXT1: the other ways to call something.
        (b"cos\nmkdir\nX\x01\x00\x00\x00.\x85\x81", r"entry 'w' is os\.mkdir; nothing was run"),
        (b"cos\nmkdir\n)}\x92", r"entry 'w' is os\.mkdir; nothing was run"),
        (b"(X\x01\x00\x00\x00.ios\nmkdir\n", r"what torch\.save does not .INST"),
        (b"(ccollections\nOrderedDict\no", r"what torch\.save does not .OBJ"),
        (b"\x82\x01", r"what torch\.save does not .EXT1"),
        # A path through a known module.
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", r"'w' is torch\._utils\._rebuild_ten"),
        (b"ctorch.storage\n_load_from_bytes\n)R", r"'w' is torch\.storage\._load_from_bytes"),
        (b"})\x93", "dict in the place of str"),
        # Known names in the wrong place.
        (b"ctorch\nFloatStorage\n)R", r"'w' is torch\.FloatStorage"),
        (b"ccollections\nOrderedDict\n(}tR", r"'w' is collections\.OrderedDict"),
        (b"ctorch._utils\n_rebuild_parameter\n(}tR", "dict in the place of ndarray"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}}}}tR", "dict in the place of Storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}tR", "_rebuild_tensor_v2 has 1 arguments"),
        # A call within a call, which could be nested without end.
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)NtR",
            r"'w' is torch\._tensor\._rebuild_from_type_v2",
        ),
        # Items of what is no list or dict.
        (b"Na", "damaged"),
        (b"]K\x01K\x02s", "damaged"),
        # A key that takes for ever to hash, or cannot be; made of one string many times.
        (b"}))\x86Ns", "'w' is dict"),
        (b"}}Ns", "'w' is dict"),
        (b"X\xf4\x01\x00\x00" + 500 * b"m" + b"q\x00h\x00h\x00\x93", "a name has 1001 characters"),
        # One opcode that asks for gigabytes.
        (b"Nr\xff\xff\xff\x7f", "'w' is NoneType"),
        (b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00", "damaged"),
        (b"B\xff\xff\xff\x7f", "damaged"),
        (b"X\xff\xff\xff\x7f", "damaged"),
        # Ill-formed stacks.
        (b"0000", "damaged"),
        (b"u", "damaged"),
        (b"h\x09", "damaged"),
        (b"\x87\x87\x87", "damaged"),
        (b"Q", "in an unknown way"),
    ],
)
def test_refused_opcodes(tmp_path, opcodes, message):
    write_forged(tmp_path / "x", opcodes)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_tensors(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_attributes_of_a_tensor_are_dropped(tmp_path):
    write_forged(tmp_path / "x", tensor_opcodes(0, (2,), (1,)) + plain({"shape": 3}) + b"b")
    assert read_tensors(tmp_path / "x")["w"].shape == (2,)


def test_keys_that_collide_take_no_longer(tmp_path):
    """Integers that all have one hash: a dict of them takes time by the square of their number."""
    keys = (((2**61 - 1) * i).to_bytes(10, "little") for i in range(1, 30_000))
    items = b"".join(b"\x8a\x0a" + key + b"N" for key in keys)
    beside = b"X\x01\x00\x00\x00b}(" + items + b"usX\x01\x00\x00\x00m"
    model = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + tensor_opcodes(0, (2,), (1,)) + b"ss"
    write_zip(tmp_path / "x", b"\x80\x02}" + beside + b"Ns" + model + b".")
    start = time.process_time()
    assert list(read_tensors(tmp_path / "x")) == ["w"]
    assert time.process_time() - start < 5


def test_the_number_of_values_is_bounded(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2), "many": [0] * 1000}, tmp_path / "x")
    monkeypatch.setattr(unpickle, "_MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="holds more than 1,000 values"):
        read_tensors(tmp_path / "x")


def test_attributes_of_a_dict_are_dropped(tmp_path):
    """BUILD could otherwise put a value from the file in the place of a method."""
    build = plain({"items": None, "__class__": None, "_metadata": {}})
    write_zip(tmp_path / "x", b"\x80\x02ccollections\nOrderedDict\n)R" + build + b"b.")
    tensors = read_tensors(tmp_path / "x")
    assert tensors == {}
    assert callable(tensors.items)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (3, (2, 2), (2, 1)),
        (6, (1,), (1,)),
        (2**62, (1,), (1,)),
        (0, (2,), (2**62,)),
    ],
)
def test_a_tensor_stays_in_its_storage(tmp_path, offset, size, stride):
    write_forged(tmp_path / "x", tensor_opcodes(offset, size, stride))
    with pytest.raises(CheckpointError, match="outside its storage of 6 elements"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("size", [10**9, 10**12])
def test_a_tensor_does_not_repeat_its_storage_without_end(tmp_path, size):
    write_forged(tmp_path / "x", tensor_opcodes(0, (size,), (0,)))
    with pytest.raises(CheckpointError, match=r"cannot be tensors of .*,000,000"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (5, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1.0,), (1,)),
        (0, (True,), (1,)),
        (0, 2, 1),
        (0, (10**30,), (0,)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_a_tensor_is_described_by_whole_numbers(tmp_path, offset, size, stride):
    write_forged(tmp_path / "x", tensor_opcodes(offset, size, stride))
    with pytest.raises(CheckpointError, match="not made of whole numbers from 0 up"):
        read_tensors(tmp_path / "x")


def test_an_impossible_empty_tensor(tmp_path):
    write_forged(tmp_path / "x", tensor_opcodes(0, (0, 2**62, 2**62), (1, 1, 1)))
    with pytest.raises(CheckpointError, match="entry 'w' is a tensor"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("claimed", [5, 7, 10**12, -6])
def test_a_storage_of_another_size_than_it_claims(tmp_path, claimed):
    write_forged(tmp_path / "x", tensor_opcodes(0, (1,), (1,), claimed))
    with pytest.raises(CheckpointError, match=f"has 24 bytes, but claims {claimed} of float32"):
        read_tensors(tmp_path / "x")


def test_an_unknown_kind_of_storage(tmp_path):
    opcodes = tensor_opcodes(0, (1,), (1,)).replace(b"torch\nFloat", b"torch\nQInt8")
    write_forged(tmp_path / "x", opcodes)
    with pytest.raises(CheckpointError, match=r"entry 'w' is torch\.QInt8Storage"):
        read_tensors(tmp_path / "x")
    opcodes = tensor_opcodes(0, (1,), (1,)).replace(
        b"torch\nFloatStorage", b"collections\nOrderedDict"
    )
    write_forged(tmp_path / "x", opcodes)
    with pytest.raises(CheckpointError, match=r"entry 'w' is collections\.OrderedDict"):
        read_tensors(tmp_path / "x")


def test_a_storage_that_is_not_there(tmp_path):
    opcodes = tensor_opcodes(0, (1,), (1,)).replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")
    write_forged(tmp_path / "x", opcodes)
    with pytest.raises(CheckpointError, match="lacks its entry 'archive/data/9'"):
        read_tensors(tmp_path / "x")


def test_a_compressed_file(tmp_path):
    write_forged(tmp_path / "x", tensor_opcodes(0, (1,), (1,)), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        read_tensors(tmp_path / "x")


def test_a_big_endian_file(tmp_path):
    write_forged(tmp_path / "x", tensor_opcodes(0, (1,), (1,)), byteorder="big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_tensors(tmp_path / "x")


def test_a_pickle_without_end(tmp_path):
    write_zip(tmp_path / "x", b"\x80\x02}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("offset", "forged", "message"),
    [
        # Where an entry of the zip's table of contents has its flags, its method and both sizes.
        (8, struct.pack("<H", 1), "is compressed or encrypted"),
        (10, struct.pack("<H", zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (20, struct.pack("<I", 12), "is compressed or encrypted"),
        (20, struct.pack("<II", 10**6, 10**6), "is damaged"),
    ],
)
def test_an_entry_is_its_bytes_in_the_file(tmp_path, offset, forged, message):
    write_forged(tmp_path / "x", tensor_opcodes(0, (1,), (1,)))
    content = bytearray((tmp_path / "x").read_bytes())
    entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
    content[entry + offset : entry + offset + len(forged)] = forged
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"'archive/data/0' {message}"):
        read_tensors(tmp_path / "x")
