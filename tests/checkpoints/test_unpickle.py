import os
import time
import tracemalloc

import pytest
import torch
from torch_files import assert_same, plain, tensor_opcodes, write_forged, write_zip

from sam_jax.checkpoints import unpickle
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.errors import CheckpointError


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path, is_legacy):
    weights, negated = {"w": torch.ones(2)}, torch._neg_view(torch.ones(3))
    options = {"_use_new_zipfile_serialization": not is_legacy}
    torch.save({"model": weights, "other": negated}, tmp_path / "x", **options)
    assert_same(read_tensors(tmp_path / "x"), weights)
    torch.save({"w": negated}, tmp_path / "x", **options)
    with pytest.raises(CheckpointError, match=r"'w' is a tensor .*save tensor\.resolve_neg"):
        read_tensors(tmp_path / "x")


def test_python_2(tmp_path):
    """Reads Python 2's strings and OrderedDict of pairs, and tensors as torch 0.1 wrote them."""
    tensor = tensor_opcodes(1, (2,), (2,)).replace(b"_v2", b"").replace(b"\x89}tR", b"tR")
    pairs = b"]](U\x01w" + tensor + b"ea"
    write_zip(tmp_path / "x", b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.")
    assert_same(read_tensors(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=True))


def test_a_huge_integer_takes_no_longer(tmp_path):
    """The integer is a storage's number of elements, which could be multiplied repeatedly."""
    write_forged(tmp_path / "x", tensor_opcodes(0, (2,), (1,), claimed=1 << 2**23))
    with pytest.raises(CheckpointError, match="refers to data in an unknown way"):
        read_tensors(tmp_path / "x")


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
    other = {"code": code, "model": weights, "hooks": [code], 3: {code}}
    torch.save(other, tmp_path / "x", pickle_protocol=protocol)
    assert_same(read_tensors(tmp_path / "x"), weights)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        # NEWOBJ, NEWOBJ_EX, INST, OBJ, EXT1: the other ways to call something.
        (b"cos\nmkdir\nX\x01\x00\x00\x00.\x85\x81", r"entry 'w' is os\.mkdir; nothing was run"),
        (b"cos\nmkdir\n)}\x92", r"entry 'w' is os\.mkdir; nothing was run"),
        (b"(X\x01\x00\x00\x00.ios\nmkdir\n", r"that torch\.save does not write .INST"),
        (b"(ccollections\nOrderedDict\no", r"that torch\.save does not write .OBJ"),
        (b"\x82\x01", r"that torch\.save does not write .EXT1"),
        # A path through a known module.
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", r"'w' is torch\._utils\._rebuild_ten"),
        (b"ctorch.storage\n_load_from_bytes\n)R", r"'w' is torch\.storage\._load_from_bytes"),
        (b"})\x93", "dict in place of str"),
        # Known names in the wrong place.
        (b"ctorch\nFloatStorage\n)R", r"'w' is torch\.FloatStorage"),
        (b"ccollections\nOrderedDict\n(}tR", r"'w' is collections\.OrderedDict"),
        (b"ctorch._utils\n_rebuild_parameter\n(}tR", "dict in place of ndarray"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}}}}tR", "dict in place of Storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}tR", "_rebuild_tensor_v2 has 1 arguments"),
        # A call within a call, which could be nested at any depth.
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN)NtR",
            r"'w' is torch\._tensor\._rebuild_from_type_v2",
        ),
        # Items of something that is not a list or dict.
        (b"Na", "damaged"),
        (b"]K\x01K\x02s", "damaged"),
        # Keys that take forever to hash, or cannot be hashed; a name that repeats one string.
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
    """The integers all have the same hash, so a dict of them would take quadratic time."""
    keys = (((2**61 - 1) * i).to_bytes(10, "little") for i in range(1, 30_000))
    items = b"".join(b"\x8a\x0a" + key + b"N" for key in keys)
    other = b"X\x01\x00\x00\x00b}(" + items + b"usX\x01\x00\x00\x00m"
    model = b"X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + tensor_opcodes(0, (2,), (1,)) + b"ss"
    write_zip(tmp_path / "x", b"\x80\x02}" + other + b"Ns" + model + b".")
    start = time.process_time()
    assert list(read_tensors(tmp_path / "x")) == ["w"]
    assert time.process_time() - start < 5


def test_the_number_of_values_is_bounded(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2), "many": [0] * 1000}, tmp_path / "x")
    monkeypatch.setattr(unpickle, "_MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="has more than 1,000 values"):
        read_tensors(tmp_path / "x")


def test_attributes_of_a_dict_are_dropped(tmp_path):
    """Otherwise BUILD could replace a method by a value from the file."""
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
