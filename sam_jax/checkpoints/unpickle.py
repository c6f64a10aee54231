"""Interprets the pickles of PyTorch checkpoints without calling what they name.

Only opcodes and functions that build dictionaries of tensors have an effect; anything else becomes
an inert placeholder.
"""

import contextlib
import math
import mmap
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sam_jax.errors import CheckpointError

RESAVE = "In torch, save only the tensors again: torch.save(model.state_dict(), path)."

TORCH_DTYPES = {
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

TORCH_STORAGES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_TENSORS = (REBUILD_TENSOR, "torch._utils._rebuild_tensor")  # the latter in torch 0.1
_REBUILD_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # a tensor with attributes
_TUPLE_SIZES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A hundred times as many as a SAM with its optimizer has; they take seconds.
_MAX_OPCODES = 4_000_000
_MAX_NAME = 1000
# Raised by genops for bytes that are not a pickle, and by pops and lookups for a malformed pickle.
# DeprecationWarning, if warnings are errors: genops on a name with a stray backslash.
_PICKLE_ERRORS = ValueError, IndexError, KeyError, TypeError, OverflowError, DeprecationWarning


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Stands for an object that the pickle names or builds, which is never imported or run.

    It is compared and hashed by identity, so that files cannot choose hashes.
    """

    name: str
    problem: str | None = None  # for a tensor: why it cannot be read


@dataclass(frozen=True, slots=True)
class Storage:
    """The elements in the file of one or more tensors."""

    dtype: np.dtype
    elements: int
    content: memoryview


def end_of_pickle(file: mmap.mmap, start: int) -> int:
    """The offset at which a pickle ends; a mapped file cannot allocate more than its size."""
    file.seek(start)
    with _reading_pickle():
        for _ in _opcodes(file):
            pass
    return file.tell()


def unpickle(pickled: bytes, storage: Callable[[object], Storage | Placeholder]) -> object:
    """Interprets the opcodes that Python's pickle module writes, in time linear in their number.

    Even with a restricted `find_class`, `pickle.Unpickler` would let a file call and modify the
    allowed names (BUILD sets attributes, even of functions) and allocate gigabytes in one opcode.
    Here names are data, only functions that build tensors are called (`_call`), attributes are
    dropped, and anything else becomes a placeholder.
    """
    with _reading_pickle():
        return _run_pickle(pickled, storage)


@contextlib.contextmanager
def _reading_pickle() -> Iterator[None]:
    """Reports errors of interpreting the pickle as damage."""
    try:
        yield
    except CheckpointError:
        raise
    except _PICKLE_ERRORS as error:
        raise CheckpointError(
            f"the pickle is damaged ({error!r}). Fetch the file again."
        ) from error


def _opcodes(pickled: bytes | mmap.mmap) -> Iterator[tuple]:
    """The opcodes of `pickletools.genops`, up to a limit."""
    found = pickletools.genops(pickled)  # pyright: ignore[reportArgumentType]  a map is a file too
    for count, opcode in enumerate(found):
        if count == _MAX_OPCODES:
            raise CheckpointError(f"has more than {_MAX_OPCODES:,} values. {RESAVE}")
        yield opcode


def _run_pickle(pickled: bytes, storage: Callable[[object], Storage | Placeholder]) -> object:
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
        if not isinstance(stack[-1], Placeholder):
            _expect(stack[-1], list).extend(items)

    def set_items(flat: tuple) -> None:
        if isinstance(stack[-1], Placeholder):
            return
        _expect(stack[-1], dict).update(zip(map(_key, flat[::2]), flat[1::2], strict=True))

    def call(function: object, arguments: object) -> None:
        name = _expect(function, Placeholder).name
        stack.append(_call(name, _expect(arguments, tuple)))

    def push_global(name: str) -> None:
        if len(name) > _MAX_NAME:  # one long string could be used any number of times
            raise ValueError(f"a name has {len(name)} characters")
        stack.append(Placeholder(name))

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
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                stack.append(argument)
            case "LONG1" | "LONG4":  # multiplying ever larger numbers would take ever longer
                stack.append(argument if abs(argument) < 2**63 else Placeholder("a large number"))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # by Python 2
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
                stack.append(Placeholder("set"))
            case "ADDITEMS":
                pop_to_mark()
            case "FROZENSET":
                pop_to_mark()
                stack.append(Placeholder("frozenset"))
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
            case name:  # INST, OBJ, EXT1, ...: unused for decades
                raise CheckpointError(
                    f"the pickle has an opcode that torch.save does not write ({name} at byte "
                    f"{position}); nothing was run. {RESAVE}"
                )
    raise ValueError("the pickle has no end")


def _key(value: object) -> object:
    """A key of a dictionary: a name, or a placeholder.

    Integers can be chosen to collide, and a nested tuple can take forever to hash.
    """
    return value if isinstance(value, str) else Placeholder(kind_of(value))


def _call(name: str, arguments: tuple) -> object:
    """The dict or tensor that torch builds by this call, or a placeholder for any other call.

    Arguments after those used are ignored.
    """
    if name == ORDERED_DICT and not arguments:
        return {}
    if name == ORDERED_DICT and isinstance(arguments[0], list):  # by Python 2
        return {_key(key): value for key, value in arguments[0]}
    if name == _REBUILD_FROM_TYPE and len(arguments) > 2:
        function, _, inner = arguments[:3]
        # Only this function: calls within calls could be nested endlessly.
        if isinstance(function, Placeholder) and function.name == REBUILD_TENSOR:
            name, arguments = REBUILD_TENSOR, _expect(inner, tuple)
    if name in _REBUILD_TENSORS:
        if len(arguments) < 4:
            raise TypeError(f"{name} has {len(arguments)} arguments")
        storage, offset, size, stride = arguments[:4]
        if isinstance(storage, Placeholder):
            return storage
        if len(arguments) > 6 and arguments[6]:  # {"neg": True}: the stored signs are inverted
            return Placeholder("a tensor", "it is a negated view; save tensor.resolve_neg()")
        try:
            return _tensor(_expect(storage, Storage), offset, size, stride)
        except ValueError as error:
            return Placeholder("a tensor", str(error))
    if name in _REBUILD_PARAMETERS and arguments:
        if isinstance(arguments[0], Placeholder):
            return arguments[0]
        return _expect(arguments[0], np.ndarray)
    is_tensor = name.startswith("torch._utils._rebuild_")
    return Placeholder(name, "its type is not read" if is_tensor else None)


def _tensor(storage: Storage, offset: object, size: object, stride: object) -> np.ndarray:
    """`torch.as_strided` within the storage; offset and strides are in elements."""
    if not (
        isinstance(offset, int)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= 64  # numpy's most
        # type() and not isinstance(): True is an int.
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride))
    ):
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


def _expect(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind_of(value)} in place of {kind.__name__}")
    return value


def kind_of(value: object) -> str:
    """The name of a value in messages."""
    if isinstance(value, Placeholder):
        return value.name
    return "a tensor" if isinstance(value, np.ndarray) else type(value).__name__
