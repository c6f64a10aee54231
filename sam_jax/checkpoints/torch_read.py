"""Reads tensors from torch checkpoint files (`.pth .pt .bin`), without torch.

Code in a file is never run: a torch file is a zip of raw storages and one pickle, which is
interpreted here, opcode by opcode, by a machine that knows only tensors and dicts. Anything else in
the file becomes an inert placeholder. The arrays are views of the memory-mapped file, so only the
parts that are used take memory.
"""

import itertools
import mmap
import struct
import zipfile
from collections.abc import Callable
from typing import BinaryIO, cast

import numpy as np

from sam_jax.checkpoints.unpickle import (
    RESAVE,
    TORCH_DTYPES,
    Placeholder,
    Storage,
    end_of_pickle,
    kind_of,
    unpickle,
)
from sam_jax.errors import CheckpointError, clip, listed
from sam_jax.files import map_file

EXPECTED = "a torch checkpoint (from torch.save) or a .safetensors file"
# Where training scripts keep the weights among their other state.
_WEIGHTS = ["model", "state_dict", "model_state_dict", "model_state", "module", "network", "net"]
# The pickled beginning of a file of `torch.save` before version 1.6, and the sizes of storages that
# are skipped.
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_OTHER_SIZES = {
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    **dict.fromkeys(("torch.QUInt8Storage", "torch.QInt8Storage"), 1),
    **dict.fromkeys(("torch.QUInt4x2Storage", "torch.QUInt2x4Storage"), 1),
    "torch.QInt32Storage": 4,
}
# With strides of 0, a small file can declare any number of elements.
_MOST_EXPANDED, _ALWAYS_ALLOWED = 100, 256 << 20


def read_torch(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of a file that torch 1.6 or newer saved."""
    data = map_file(file)
    try:
        archive = zipfile.ZipFile(file)
    # zipfile also raises these if the table is damaged.
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
            raise CheckpointError(f"the zip lacks its entry {clip(name)!r}. {RESAVE}")
        return _stored_bytes(data, entries[name])

    if f"{root}/byteorder" in entries and entry(f"{root}/byteorder") != b"little":
        raise CheckpointError(f"written on a big-endian machine. {RESAVE}")

    def storage(persistent_id: object) -> Storage | Placeholder:
        match persistent_id:
            case ("storage", Placeholder(name=kind), str(key), str(), int(elements)):
                pass
            case _:
                raise CheckpointError(f"refers to data in an unknown way. {RESAVE}")
        if kind not in TORCH_DTYPES:
            return Placeholder(kind, "its type is not read")
        dtype = TORCH_DTYPES[kind]
        try:
            content = entry(f"{root}/data/{key}")
        except CheckpointError as error:  # which only matters for a weight
            return Placeholder("a tensor", str(error))
        if len(content) != elements * dtype.itemsize:
            problem = f"has {len(content)} bytes, but claims {elements} of {dtype}"
            return Placeholder("a tensor", f"storage {clip(key)!r} {problem}")
        return Storage(dtype, elements, content)

    return _tensors(bytes(entry(pickles[0])), storage, len(data))


def read_legacy_torch(file: BinaryIO) -> dict[str, np.ndarray]:
    """Every tensor of a file that torch before 1.6 saved.

    The format: five pickles (a number, a version, the machine, the object, the keys of its
    storages), then for each key the number of elements, in 8 bytes, and the elements.
    """
    data, ends = map_file(file), [0]
    for _ in range(5):
        ends.append(end_of_pickle(cast(mmap.mmap, data.obj), ends[-1]))
    _, _, machine, tree, keys = (bytes(data[start:end]) for start, end in itertools.pairwise(ends))
    machine = unpickle(machine, _no_storage)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"written on a big-endian machine. {RESAVE}")
    kinds: dict[str, str] = {}

    def note_kind(persistent_id: object) -> Placeholder:
        kind, key, _ = _legacy_storage(persistent_id)
        kinds[key] = kind
        return Placeholder("a tensor")

    unpickle(tree, note_kind)
    keys = unpickle(keys, _no_storage)
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise CheckpointError("the list of its storages is damaged. Fetch the file again.")
    contents, position = {}, ends[-1]
    for key in keys:
        kind = str(kinds.get(key))
        size = TORCH_DTYPES[kind].itemsize if kind in TORCH_DTYPES else _OTHER_SIZES.get(kind)
        if size is None:
            raise CheckpointError(f"a storage is {kind}, whose size is not known. {RESAVE}")
        elements = int.from_bytes(data[position : position + 8], "little")
        contents[key] = data[position + 8 : position + 8 + elements * size]
        position += 8 + elements * size
        if position > len(data):
            raise CheckpointError("the file ends within a tensor. Fetch it again.")

    def storage(persistent_id: object) -> Storage | Placeholder:
        kind, key, elements = _legacy_storage(persistent_id)
        if kind not in TORCH_DTYPES:
            return Placeholder(kind, "its type is not read")
        if key not in contents or len(contents[key]) != elements * TORCH_DTYPES[kind].itemsize:
            return Placeholder("a tensor", f"storage {clip(key)!r} is not as long as it claims")
        return Storage(TORCH_DTYPES[kind], elements, contents[key])

    return _tensors(tree, storage, len(data))


def _legacy_storage(persistent_id: object) -> tuple[str, str, int]:
    match persistent_id:
        case ("storage", Placeholder(name=kind), str(key), str(), int(elements), None):
            return kind, key, elements
    raise CheckpointError(f"refers to data in an unknown way. {RESAVE}")


def _no_storage(_: object) -> Placeholder:
    raise CheckpointError(f"refers to data where there is none. {RESAVE}")


def _tensors(
    pickled: bytes, storage: Callable[[object], Storage | Placeholder], file_size: int
) -> dict[str, np.ndarray]:
    tensors = _state_dict(unpickle(pickled, storage))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > max(_MOST_EXPANDED * file_size, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"{file_size:,} bytes cannot be tensors of {size:,} bytes: they repeat their storage."
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
            f"the zip's entry {clip(info.filename)!r} is compressed or encrypted, which torch does "
            f"not do. {RESAVE}"
        )
    # The local header may be longer than the table of contents says: torch pads it to align data.
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) == 30 and header[:4] == b"PK\x03\x04":
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size <= len(data):
            return data[start : start + info.file_size]
    raise CheckpointError(
        f"the zip's entry {clip(info.filename)!r} is damaged. Fetch the file again."
    )


def _state_dict(root: object) -> dict[str, np.ndarray]:
    if not isinstance(root, dict):
        raise CheckpointError(f"expected a dict of tensors, not {kind_of(root)}. {RESAVE}")
    found = _choose(_dicts_of_tensors(root))
    # Drop what is not a tensor; missing tensors are reported later.
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and _is_tensor(v)}
    for key, value in tensors.items() or root.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"expected tensors by name, but a key is {kind_of(key)}. {RESAVE}"
            )
        if not isinstance(value, np.ndarray):
            problem = getattr(value, "problem", None)
            raise CheckpointError(
                f"expected tensors by name, but entry {clip(key)!r} is {kind_of(value)}"
                f"{f' ({problem})' if problem else ''}; nothing was run. {RESAVE}"
            )
    return tensors


def _is_tensor(value: object) -> bool:
    return isinstance(value, np.ndarray) or getattr(value, "problem", None) is not None


def _dicts_of_tensors(root: dict) -> dict[tuple[str, ...], dict]:
    """The dicts with a tensor among the root and two levels below it, by key, each only once."""
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
    """Chooses the weights: prefers a SAM's, then those under a known name, then the root.

    Raises:
        CheckpointError: if there are several and none is in a known place.
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
            f"there are several dicts of tensors, under {listed(places)}. In torch, save only one "
            f"of them: torch.save(torch.load(path)[key], new_path)."
        )
    return found[known[0]] if known else next(iter(found.values()), {})
