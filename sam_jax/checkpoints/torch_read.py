"""Reads and writes tensors in checkpoint files (`.pth .pt .bin .safetensors`), without torch.

Nothing in a file is ever run: a torch file is a zip of raw storages and one pickle, and the pickle
is interpreted here, opcode by opcode, by a machine that knows tensors and dicts. Whatever else lies
beside the weights becomes an inert placeholder.
The arrays are views of the memory-mapped file, so only what is used of them costs memory.
"""

import contextlib
import itertools
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sam_jax.errors import CheckpointError, clip, listed
from sam_jax.files import map_file

EXPECTED = "a torch checkpoint (from torch.save) or a .safetensors file"


_RESAVE = "In torch, re-save the tensors alone: torch.save(model.state_dict(), path)."


_TORCH_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}


TORCH_STORAGES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


ORDERED_DICT = "collections.OrderedDict"


REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"


_REBUILD_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)


_REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # a tensor that has attributes


_TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


# Where training scripts keep the weights beside their other state.
_WEIGHTS = ["model", "state_dict", "model_state_dict", "model_state", "module", "network", "net"]


# A SAM with its optimizer has a hundredth of that; these take seconds.
_MAX_OPCODES = 4_000_000


_MAX_NAME = 1000


# What `torch.save` before version 1.6 begins with, as a pickle; and types whose storages are passed
# over by their size.
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


_OTHER_SIZES = {"torch.ComplexFloatStorage": 8, "torch.ComplexDoubleStorage": 16}


# What genops raises for bytes that are no pickle, and pops and look-ups for an ill-formed one.
# DeprecationWarning, where warnings are errors: genops on a name with a stray backslash.
_PICKLE_ERRORS = ValueError, IndexError, KeyError, TypeError, OverflowError, DeprecationWarning


# By strides of 0 a small file can stand for any number of elements.
_MOST_EXPANDED, _ALWAYS_ALLOWED = 100, 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Placeholder:
    """Stands for what the pickle names, or makes by that name; it is never imported, made or run.

    Compared and hashed by identity, so that no file chooses its hash.
    """

    name: str
    problem: str | None = None  # of a tensor: why it is none here


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: np.dtype
    elements: int
    content: memoryview


def read_torch(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of a file that torch 1.6 or newer saved."""
    data = map_file(file)
    try:
        archive = zipfile.ZipFile(file)
    # zipfile lets these out too when the table is damaged rather than absent.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(
            f"begins like a torch checkpoint, but the zip's table of contents at the end of its "
            f"{len(data):,} bytes is missing or damaged ({error}): most likely an unfinished "
            "download. Fetch it again."
        ) from error
    with archive:
        entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"this is a zip file without a torch checkpoint; expected {EXPECTED}."
        )
    root = pickles[0].removesuffix("/data.pkl")

    def entry(name: str) -> memoryview:
        if name not in entries:
            raise CheckpointError(f"the zip lacks its entry {clip(name)!r}. {_RESAVE}")
        return _stored_bytes(data, entries[name])

    if f"{root}/byteorder" in entries and entry(f"{root}/byteorder") != b"little":
        raise CheckpointError(f"written on a big-endian machine. {_RESAVE}")

    def storage(persistent_id: object) -> _Storage | _Placeholder:
        match persistent_id:
            case ("storage", _Placeholder(name=kind), str(key), str(), int(elements)):
                pass
            case _:
                raise CheckpointError(f"refers to data in an unknown way. {_RESAVE}")
        if kind not in _TORCH_DTYPES:
            return _Placeholder(kind, "its type is not read")
        dtype = _TORCH_DTYPES[kind]
        try:
            content = entry(f"{root}/data/{key}")
        except CheckpointError as error:  # which matters for a weight only
            return _Placeholder("a tensor", str(error))
        if len(content) != elements * dtype.itemsize:
            problem = f"has {len(content)} bytes, but claims {elements} of {dtype}"
            return _Placeholder("a tensor", f"storage {clip(key)!r} {problem}")
        return _Storage(dtype, elements, content)

    return _tensors(bytes(entry(pickles[0])), storage, len(data))


def read_legacy_torch(file: BinaryIO) -> dict[str, np.ndarray]:
    """The format before torch 1.6.

    Five pickles (a number, a version, the machine, the object, the keys of its storages), then for
    each key the number of its elements, in 8 bytes, and they themselves.
    """
    data, ends = map_file(file), [0]
    for _ in range(5):
        ends.append(_end_of_pickle(data.obj, ends[-1]))
    _, _, machine, tree, keys = (bytes(data[start:end]) for start, end in itertools.pairwise(ends))
    machine = _unpickle(machine, _no_storage)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"written on a big-endian machine. {_RESAVE}")
    kinds: dict[str, str] = {}

    def note_kind(persistent_id: object) -> _Placeholder:
        kind, key, _ = _legacy_storage(persistent_id)
        kinds[key] = kind
        return _Placeholder("a tensor")

    _unpickle(tree, note_kind)
    keys = _unpickle(keys, _no_storage)
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise CheckpointError("the list of its storages is damaged. Fetch the file again.")
    contents, position = {}, ends[-1]
    for key in keys:
        kind = kinds.get(key)
        size = _TORCH_DTYPES[kind].itemsize if kind in _TORCH_DTYPES else _OTHER_SIZES.get(kind)
        if size is None:
            raise CheckpointError(f"a storage is {kind}, whose size is not known. {_RESAVE}")
        elements = int.from_bytes(data[position : position + 8], "little")
        contents[key] = data[position + 8 : position + 8 + elements * size]
        position += 8 + elements * size
        if position > len(data):
            raise CheckpointError("the file ends within a tensor. Fetch it again.")

    def storage(persistent_id: object) -> _Storage | _Placeholder:
        kind, key, elements = _legacy_storage(persistent_id)
        if kind not in _TORCH_DTYPES:
            return _Placeholder(kind, "its type is not read")
        if key not in contents or len(contents[key]) != elements * _TORCH_DTYPES[kind].itemsize:
            return _Placeholder("a tensor", f"storage {clip(key)!r} is not as long as it claims")
        return _Storage(_TORCH_DTYPES[kind], elements, contents[key])

    return _tensors(tree, storage, len(data))


def _legacy_storage(persistent_id: object) -> tuple[str, str, int]:
    match persistent_id:
        case ("storage", _Placeholder(name=kind), str(key), str(), int(elements), None):
            return kind, key, elements
    raise CheckpointError(f"refers to data in an unknown way. {_RESAVE}")


def _no_storage(_: object) -> _Placeholder:
    raise CheckpointError(f"refers to data where there is none. {_RESAVE}")


def _end_of_pickle(file: mmap.mmap, start: int) -> int:
    """Where a pickle ends; of a mapped file, which allocates no more than there is."""
    file.seek(start)
    with _reading_pickle():
        for _ in _opcodes(file):
            pass
    return file.tell()


def _tensors(
    pickled: bytes, storage: Callable[[object], _Storage | _Placeholder], file_size: int
) -> dict[str, np.ndarray]:
    tensors = _state_dict(_unpickle(pickled, storage))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > max(_MOST_EXPANDED * file_size, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"{file_size:,} bytes, which cannot be tensors of {size:,}: they repeat their storage."
        )
    return tensors


def _stored_bytes(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of one uncompressed entry, as a view of the whole zip file `data`."""
    if (
        info.compress_type != zipfile.ZIP_STORED
        or info.compress_size != info.file_size
        or info.flag_bits & 0x1  # encrypted
    ):
        raise CheckpointError(
            f"the zip's entry {clip(info.filename)!r} is compressed or encrypted, and torch does "
            f"neither. {_RESAVE}"
        )
    # The local header may be longer than the table of contents tells: torch pads it to align data.
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) == 30 and header[:4] == b"PK\x03\x04":
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size <= len(data):
            return data[start : start + info.file_size]
    raise CheckpointError(
        f"the zip's entry {clip(info.filename)!r} is damaged. Fetch the file again."
    )


def _unpickle(pickled: bytes, storage: Callable[[object], _Storage | _Placeholder]) -> object:
    """Interprets the opcodes that Python's pickle module writes, in time linear in their number.

    `pickle.Unpickler` with a restricted `find_class` would still let a file call and modify
    whatever it may name (BUILD sets attributes, even of functions) and ask for gigabytes in one
    opcode. Here names are data, only what makes a tensor is called (`_call`), attributes are
    dropped, and the rest becomes placeholders.
    """
    with _reading_pickle():
        return _run_pickle(pickled, storage)


@contextlib.contextmanager
def _reading_pickle() -> Iterator[None]:
    """Says that the pickle is damaged, whatever is raised by what it does."""
    try:
        yield
    except CheckpointError:
        raise
    except _PICKLE_ERRORS as error:
        raise CheckpointError(
            f"the pickle is damaged ({error!r}). Fetch the file again."
        ) from error


def _opcodes(pickled: bytes | mmap.mmap) -> Iterator[tuple]:
    """Those of `pickletools.genops`, of which there may be so many."""
    for count, opcode in enumerate(pickletools.genops(pickled)):
        if count == _MAX_OPCODES:
            raise CheckpointError(f"holds more than {_MAX_OPCODES:,} values. {_RESAVE}")
        yield opcode


def _run_pickle(pickled: bytes, storage: Callable[[object], _Storage | _Placeholder]) -> object:
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def pop(count: int) -> tuple:
        if not 0 <= count <= len(stack):
            raise IndexError("stack underflow")
        taken = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> tuple:
        return pop(len(stack) - marks.pop())

    def add_to_list(items: tuple) -> None:
        if not isinstance(stack[-1], _Placeholder):
            _expect(stack[-1], list).extend(items)

    def set_items(flat: tuple) -> None:
        if isinstance(stack[-1], _Placeholder):
            return
        # A name alone is kept as a key: integers can be chosen to collide, and a nested tuple can
        # take for ever to hash.
        keys = (key if isinstance(key, str) else _Placeholder(_kind(key)) for key in flat[::2])
        _expect(stack[-1], dict).update(zip(keys, flat[1::2], strict=True))

    def call(function: object, arguments: object) -> None:
        name = _expect(function, _Placeholder).name
        stack.append(_call(name, _expect(arguments, tuple)))

    def push_global(name: str) -> None:
        if len(name) > _MAX_NAME:  # a long one could be made from one string any number of times
            raise ValueError(f"a name has {len(name)} characters")
        stack.append(_Placeholder(name))

    for opcode, argument, position in _opcodes(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "POP":
                pop(1)
            case "POP_MARK":
                pop_to_mark()
            case name if name in _TUPLE_SIZES:
                stack.append(pop(_TUPLE_SIZES[opcode.name]))
            case "TUPLE":
                stack.append(pop_to_mark())
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                add_to_list(pop(1))
            case "APPENDS":
                add_to_list(pop_to_mark())
            case "EMPTY_SET":
                stack.append(_Placeholder("set"))
            case "ADDITEMS":
                pop_to_mark()
            case "FROZENSET":
                pop_to_mark()
                stack.append(_Placeholder("frozenset"))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                set_items(pop(2))
            case "SETITEMS":
                set_items(pop_to_mark())
            case "GLOBAL":
                push_global(argument.replace(" ", "."))
            case "STACK_GLOBAL":
                module, name = pop(2)
                push_global(f"{_expect(module, str)}.{_expect(name, str)}")
            case "BINPERSID":
                stack.append(storage(*pop(1)))
            case "REDUCE" | "NEWOBJ":
                call(*pop(2))
            case "NEWOBJ_EX":
                function, arguments, _ = pop(3)
                call(function, arguments)
            case "BUILD":  # attributes, such as a state dict's `_metadata`
                pop(1)
            case "STOP":
                return pop(1)[0]
            case name:  # INST, OBJ, EXT1, ...: nothing has written them for decades
                raise CheckpointError(
                    f"the pickle does what torch.save does not ({name} at byte {position}); "
                    f"nothing was run. {_RESAVE}"
                )
    raise ValueError("the pickle has no end")


def _call(name: str, arguments: tuple) -> object:
    """The dict or tensor that torch makes by this call, and a placeholder for any other.

    An argument after the ones used is ignored.
    """
    if name == ORDERED_DICT and not arguments:
        return {}
    if name == _REBUILD_FROM_TYPE and len(arguments) > 2:
        function, _, inner = arguments[:3]
        # No other function: calls within calls could be nested without end.
        if isinstance(function, _Placeholder) and function.name == REBUILD_TENSOR:
            name, arguments = REBUILD_TENSOR, _expect(inner, tuple)
    if name == REBUILD_TENSOR:
        if len(arguments) < 4:
            raise TypeError(f"{name} has {len(arguments)} arguments")
        storage, offset, size, stride = arguments[:4]
        if isinstance(storage, _Placeholder):
            return storage
        try:
            return _tensor(_expect(storage, _Storage), offset, size, stride)
        except ValueError as error:
            return _Placeholder("a tensor", str(error))
    if name in _REBUILD_PARAMETERS and arguments:
        if isinstance(arguments[0], _Placeholder):
            return arguments[0]
        return _expect(arguments[0], np.ndarray)
    is_tensor = name.startswith("torch._utils._rebuild_")
    return _Placeholder(name, "its type is not read" if is_tensor else None)


def _tensor(storage: _Storage, offset: object, size: object, stride: object) -> np.ndarray:
    """`torch.as_strided` that cannot leave the storage; offset and strides count elements."""
    plain = (
        isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= 64  # numpy's most
        # type() and not isinstance(): True is an int.
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
    )
    if not plain:
        raise CheckpointError(
            "a tensor's offset, size or stride is not made of whole numbers from 0 up."
        )
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    if elements and last >= storage.elements:
        raise CheckpointError(
            f"a tensor of size {size}, stride {stride} and offset {offset} reaches outside its "
            f"storage of {storage.elements} elements."
        )
    itemsize = storage.dtype.itemsize
    return np.ndarray(
        size,
        storage.dtype,
        buffer=storage.content,
        offset=offset * itemsize if elements else 0,
        strides=[step * itemsize for step in stride] if elements else None,
    )


def _state_dict(root: object) -> dict[str, np.ndarray]:
    if not isinstance(root, dict):
        raise CheckpointError(f"expected a dict of tensors, not {_kind(root)}. {_RESAVE}")
    found = _choose(_dicts_of_tensors(root))
    # What is no tensor has no place in a model; which of its tensors are missing is told later.
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and _is_tensor(v)}
    for key, value in tensors.items() or root.items():
        if not isinstance(key, str):
            raise CheckpointError(f"expected tensors by name, but a key is {_kind(key)}. {_RESAVE}")
        if not isinstance(value, np.ndarray):
            problem = getattr(value, "problem", None)
            raise CheckpointError(
                f"expected tensors by name, but entry {clip(key)!r} is {_kind(value)}"
                f"{f' ({problem})' if problem else ''}; nothing was run. {_RESAVE}"
            )
    return tensors


def _is_tensor(value: object) -> bool:
    return isinstance(value, np.ndarray) or getattr(value, "problem", None) is not None


def _dicts_of_tensors(root: dict) -> dict[tuple[str, ...], dict]:
    """Those of the root and of two levels below that hold a tensor, by their keys; each once."""
    found, seen, level = {}, {id(root)}, {(): root}
    for _ in range(3):
        below = {}
        for place, values in level.items():
            for key, value in values.items():
                if not isinstance(key, str):
                    continue
                if _is_tensor(value):
                    found[place] = values
                elif isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    below[(*place, key)] = value
        level = below
    return found


def _choose(found: dict[tuple[str, ...], dict]) -> dict:
    """The weights: a SAM's rather than others, under a known name rather than at the top.

    Raises:
        CheckpointError: if there are several, none of them in a known place.
    """

    def is_sam(values: dict) -> bool:
        names = [name for name in values if isinstance(name, str)]
        return any("_encoder." in name and "patch_embed." in name for name in names)

    found = {place: values for place, values in found.items() if is_sam(values)} or found
    known = [place for place in found if place and place[-1] in _WEIGHTS]
    known.sort(key=lambda place: (len(place), _WEIGHTS.index(place[-1])))
    if () in found:
        known.append(())
    if len(found) > 1 and not known:
        places = [repr(".".join(place)) for place in found]
        raise CheckpointError(
            f"there are several dicts of tensors, under {listed(places)}. In torch, save one of "
            f"them alone: torch.save(torch.load(path)[key], new_path)."
        )
    return found[known[0]] if known else next(iter(found.values()), {})


def _expect(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{_kind(value)} in the place of {kind.__name__}")
    return value


def _kind(value: object) -> str:
    if isinstance(value, _Placeholder):
        return value.name
    return "a tensor" if isinstance(value, np.ndarray) else type(value).__name__
