import argparse
import collections
import contextlib
import datetime
import enum
import functools
import pathlib
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch_files import (
    assert_same,
    tensor_opcodes,
    tensors_of_every_dtype,
    write_bytes,
    write_forged,
    write_zip,
)

from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.errors import CheckpointError


def test_reads_every_dtype_of_a_torch_file(tmp_path):
    torch.save(tensors_of_every_dtype(), tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), torch.load(tmp_path / "x.pth", weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_a_modules_state_dict(tmp_path, protocol):
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
    other = {"epoch": 3, "loss": 0.5, "optimizer": optimizer.state_dict(), "names": ["a", "b"]}
    torch.save({**other, key: model.state_dict()}, tmp_path / "x.pth")
    assert_same(read_tensors(tmp_path / "x.pth"), model.state_dict())


class Color(enum.Enum):
    RED = 1


class Custom(dict):
    def __init__(self):
        super().__init__(a=1)
        self.attribute = [self]


def other_objects():
    """Objects that training scripts save with the weights, by name."""
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
@pytest.mark.parametrize("other", other_objects().items(), ids=lambda other: other[0])
def test_objects_next_to_the_weights_are_ignored(tmp_path, other, protocol):
    name, value = other
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    content = {f"{name}, before": value, "model": weights, f"{name}, after": value}
    torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "x.pth", weights_only=False)["model"]
    assert_same(read_tensors(tmp_path / "x.pth"), expected)


def test_finds_the_weights(tmp_path):
    """Next to other tensors, under unexpected names, one or two levels down."""
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


def test_unreadable_tensors_next_to_the_weights(tmp_path):
    bad = tensor_opcodes(0, (7,), (1,))
    good = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + tensor_opcodes(0, (2,), (1,)) + b"ss"
    other = b"X\x01\x00\x00\x00b" + bad + b"s"
    write_zip(tmp_path / "x", b"\x80\x02}" + other + good + b".")
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


def test_names_the_entry_that_is_not_a_tensor(tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_from_before_torch_1_6(tmp_path, protocol):
    """Such files are pickles, then storages. Damaged ones are read, or raise CheckpointError."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(9).bfloat16(), "c": torch.arange(7)}
    tensors["view"] = tensors["a"].t()
    other = {"epoch": 3, "steps": collections.Counter({3: 1}), "z": torch.zeros(3).cfloat()}
    path, old = tmp_path / "x", {"_use_new_zipfile_serialization": False}
    torch.save({"model": tensors, **other}, path, pickle_protocol=protocol, **old)
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


def test_quantized_tensors_in_an_old_file(tmp_path):
    weights = {"w": torch.ones(2)}
    for dtype in (torch.quint8, torch.qint8, torch.qint32):
        with warnings.catch_warnings(action="ignore"):
            quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)
        other = {"a": quantized, "model": weights}
        torch.save(other, tmp_path / "x", _use_new_zipfile_serialization=False)
        assert_same(read_tensors(tmp_path / "x"), weights)


def test_a_valid_handmade_file_is_read(tmp_path):
    """The files below are rejected for their forged part only: this one is read."""
    write_forged(tmp_path / "x", tensor_opcodes(1, (2, 2), (2, 1)))
    assert_same(read_tensors(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=True))


@pytest.mark.parametrize("size", [10**9, 10**12])
def test_repeats_of_a_storage_are_bounded(tmp_path, size):
    write_forged(tmp_path / "x", tensor_opcodes(0, (size,), (0,)))
    with pytest.raises(CheckpointError, match=r"cannot be tensors of .*,000,000"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("claimed", [5, 7, 10**12, -6])
def test_a_storage_with_a_wrong_size(tmp_path, claimed):
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


def test_a_missing_storage(tmp_path):
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


def test_an_unfinished_pickle(tmp_path):
    write_zip(tmp_path / "x", b"\x80\x02}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("offset", "forged", "message"),
    [
        # The offsets of flags, method and both sizes in an entry of the zip's table of contents.
        (8, struct.pack("<H", 1), "is compressed or encrypted"),
        (10, struct.pack("<H", zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (20, struct.pack("<I", 12), "is compressed or encrypted"),
        (20, struct.pack("<II", 10**6, 10**6), "is damaged"),
    ],
)
def test_forged_zip_entries(tmp_path, offset, forged, message):
    write_forged(tmp_path / "x", tensor_opcodes(0, (1,), (1,)))
    content = bytearray((tmp_path / "x").read_bytes())
    entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
    content[entry + offset : entry + offset + len(forged)] = forged
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"'archive/data/0' {message}"):
        read_tensors(tmp_path / "x")
