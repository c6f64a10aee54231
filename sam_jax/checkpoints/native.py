"""Our own checkpoint folder: `config.json` beside the arrays, which Orbax keeps in `params/`.

It holds all that is needed to load it again, and nothing of where it came from.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from sam_jax.checkpoints.params import check_depth, check_tensors, param_shapes
from sam_jax.config import SamConfig
from sam_jax.errors import CheckpointError, clip
from sam_jax.files import atomic_write, folder_size, read_json

CONFIG, PARAMS = "config.json", "params"
_BATCH_BYTES = 128 << 20
MAX_CONFIG_BYTES = 1 << 20
_NAME_BYTES = 64
# That of ViT-H has 127 kB; an array's layout less than 1 kB.
_MAX_METADATA_BYTES, _MAX_LAYOUT_BYTES = 1 << 20, 1 << 16
# How much larger than its files a checkpoint may be: weights hardly compress, and tensorstore
# allocates whatever size a file declares.
_MOST_COMPRESSED, _ALWAYS_ALLOWED = 100, 256 << 20
# An array is saved as one chunk; whoever saves it again from many devices makes some per device.
# To find one may take milliseconds.
_MOST_CHUNKS = 1 << 16
# ViT-H and the state of its optimizer have 2,000.
_MOST_ARRAYS = 6_000
# What Orbax writes, in a shard or without one. Others allocate what the data asks for.
_CODECS, _INDEX_CODECS = (["bytes"], ["bytes", "zstd"]), ["bytes", "crc32c"]
_NODE_CACHE_BYTES = 256 << 20
_READ_AT_ONCE = 8


def save(
    path: str | os.PathLike,
    params: Mapping[str, np.ndarray | jax.Array],
    config: SamConfig,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a checkpoint folder, which appears whole or not at all.

    Of several hosts all have to call this together, as Orbax wants it; the first one writes.

    Args:
        path: of the new folder; of several hosts on a disk that they share.
        params: every parameter by its path, as `flat_params` gives them.
        config: of the model.
        dtype: what to keep the parameters as; None keeps each as it is. Counters stay integers,
            and the matrix of the positional encoding as it is.

    Raises:
        FileExistsError: if there is something at `path` already.
        OSError: if it cannot be written, such as on a full disk; nothing is left then.
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder or remove it first")
    with contextlib.ExitStack() as stack:
        is_first = jax.process_index() == 0
        temporary = stack.enter_context(atomic_write(path)) if is_first else None
        temporary = path.parent / _from_first(temporary and temporary.parent.name) / path.name
        try:
            _check_space(path, params, dtype)
            _save_params(str(temporary / PARAMS), params, dtype)
        except Exception as error:
            # Of what Orbax raises the cause comes last, after every path on the way to it.
            cause = str(error).rpartition('": ')[2]
            raise OSError(f"cannot write {path}: {cause}") from error
        if is_first:
            # Orbax writes the path of the temporary folder here; only that there is a file matters.
            (temporary / PARAMS / "commit_success.txt").write_text("")
            (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    multihost_utils.sync_global_devices(f"saved {path}")


def _check_space(
    path: Path, params: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike | None
) -> None:
    """Before Orbax, which on a full disk prints tracebacks from its threads."""
    size = sum(array.size * np.dtype(dtype or array.dtype).itemsize for array in params.values())
    free = shutil.disk_usage(path.parent).free
    if free < 0.9 * size:  # weights hardly compress
        raise OSError(f"it takes about {size:,} bytes, and its disk has {free:,} left")


def _from_first(name: str | None) -> str:
    """The first host's name, of ASCII letters, on every host."""
    mine = np.frombuffer((name or "").encode().ljust(_NAME_BYTES), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine)).decode().rstrip()


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    return (path / PARAMS).is_dir() and (path / CONFIG).is_file()


def load_config(path: str | os.PathLike) -> SamConfig:
    """The configuration of a folder that `save` wrote.

    Raises:
        CheckpointError: if there is none.
    """
    file = Path(path) / CONFIG
    try:
        return SamConfig.from_dict(read_json(file, max_bytes=MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is no configuration of sam_jax: {error}") from error


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], SamConfig]:
    """The parameters and the configuration of a folder that `save` wrote.

    tensorstore reads the arrays, not Orbax: after an error the other reads of Orbax print
    tracebacks, and what it reads first has no bounds.

    Raises:
        CheckpointError: if a part is missing or damaged, or does not fit the configuration.
    """
    path = Path(os.path.abspath(path))  # without "..", which tensorstore refuses
    config = load_config(path)
    try:
        size = folder_size(path / PARAMS)
        arrays = open_arrays(path / PARAMS / "state")
        declared = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
            for name, array in arrays.items()
        }
    except Exception as error:  # whatever tensorstore meets in a damaged folder
        raise _unreadable(path, error) from error
    # All of this before an array is allocated.
    check_depth(config, len(declared))
    check_tensors(declared, param_shapes(config))
    expected = sum(math.prod(array.shape) * array.dtype.itemsize for array in declared.values())
    if expected > max(_MOST_COMPRESSED * size, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"{path / PARAMS} has {size:,} bytes, which cannot be the {expected:,} that it declares"
        )
    chunks = sum(map(_count_chunks, arrays.values()))
    if chunks > _MOST_CHUNKS:
        raise CheckpointError(
            f"{path / PARAMS} has {chunks:,} chunks, expected at most {_MOST_CHUNKS:,}"
        )
    try:
        return _read_arrays(arrays), config
    except Exception as error:
        raise _unreadable(path, error) from error


def open_arrays(
    state: Path, max_metadata_bytes: int = _MAX_METADATA_BYTES
) -> dict[str, tensorstore.TensorStore]:
    """The arrays of a flat dictionary that Orbax saved, by name; none is read yet.

    Their names are those of Orbax's metadata. The store is never asked to list its keys: a few
    kilobytes can make it list billions.

    Raises:
        Exception: of any type, if something is damaged or laid out in another way than Orbax does.
    """
    kind = read_json(state / "_METADATA", max_bytes=max_metadata_bytes)
    if not (kind["use_ocdbt"] is kind["use_zarr3"] is True):
        raise ValueError("expected arrays in OCDBT and zarr 3")
    names = list(map(_name, kind["tree_metadata"].values()))
    if len(names) > _MOST_ARRAYS:
        raise ValueError(f"it has {len(names):,} arrays, expected at most {_MOST_ARRAYS:,}")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    # Each node of the B-tree is read and decoded once, not for each array.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _NODE_CACHE_BYTES}})
    store = tensorstore.KvStore.open(spec, context=context).result()
    return {name: _open_array(store, name) for name in names}


def _name(entry: dict[str, Any]) -> str:
    keys = [key["key"] for key in entry["key_metadata"]]
    if len(keys) != 1 or not isinstance(keys[0], str):
        raise ValueError("expected a flat dictionary of arrays")
    return keys[0]


def _open_array(store: tensorstore.KvStore, name: str) -> tensorstore.TensorStore:
    """Opens an array whose chunks and codecs bound what reading it takes.

    Otherwise the process may abort, since tensorstore allocates whatever the data asks for.
    """
    content = store.read(f"{name}/zarr.json").result()
    if content.state != "value":
        raise ValueError(f"the array {clip(name)} is missing")
    if len(content.value) > _MAX_LAYOUT_BYTES:
        raise ValueError(f"the layout of {clip(name)} has {len(content.value):,} bytes")
    layout = read_json(bytes(content.value))
    shape, grid = layout["shape"], layout["chunk_grid"]["configuration"]
    if not (_fits(shape, grid) and _codecs_fit(shape, layout["codecs"])):
        raise ValueError(
            f"the chunks of {clip(name)} do not fit its shape, or its codecs are not Orbax's"
        )
    spec = {"driver": "zarr3", "fill_missing_data_reads": False}
    return tensorstore.open(spec, kvstore=store / f"{name}/", read=True).result()


def _codecs_fit(shape: list[int], codecs: list[dict[str, Any]]) -> bool:
    if _names(codecs) != ["sharding_indexed"]:
        return _names(codecs) in _CODECS
    inner = codecs[0]["configuration"]
    return (
        _fits(shape, inner)
        and _names(inner["codecs"]) in _CODECS
        and _names(inner["index_codecs"]) == _INDEX_CODECS
    )


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    return [codec["name"] for codec in codecs]


def _fits(shape: list[int], grid: dict[str, Any]) -> bool:
    chunk = grid["chunk_shape"]
    return len(chunk) == len(shape) and all(
        type(n) is int and 1 <= n <= max(size, 1) for n, size in zip(chunk, shape, strict=True)
    )


def _count_chunks(array: tensorstore.TensorStore) -> int:
    # Of no dimensions: None. Of an array in a file all sizes are known.
    chunk = cast(tuple[int, ...], array.chunk_layout.read_chunk.shape or ())
    return math.prod(-(-size // n) for size, n in zip(array.shape, chunk, strict=True))


def _read_arrays(arrays: dict[str, tensorstore.TensorStore]) -> dict[str, np.ndarray]:
    """Several at a time; not all, since what is read of a damaged one may be the whole folder."""
    result: dict[str, Any] = {}
    names = list(arrays)
    for i, name in enumerate(names):
        for ahead in names[i : i + _READ_AT_ONCE]:
            if ahead not in result:
                result[ahead] = arrays[ahead].read()
        result[name] = result[name].result()
    return result


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path / PARAMS} cannot be read: {error}")


def _save_params(
    path: str, params: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike | None
) -> None:
    from orbax.checkpoint import v1 as ocp

    # In batches: Orbax copies all that it is given and holds it, compressed, until the end.
    batch, size = {}, 0
    for name, value in params.items():
        # Positions are encoded in float32 whatever the rest is.
        cast = not name.endswith("positional_encoding_gaussian_matrix")
        batch[name] = _to_numpy(value, dtype if cast else None)
        size += batch[name].nbytes
        if size >= _BATCH_BYTES:
            ocp.partial.save(path, batch)
            batch, size = {}, 0
    if batch:
        ocp.partial.save(path, batch)
    ocp.partial.finalize(path)


def _to_numpy(array: np.ndarray | jax.Array, dtype: DTypeLike | None) -> np.ndarray:
    """As a numpy array, so that the folder names no device or sharding of this machine."""
    array = np.asarray(array)
    return array if dtype is None or array.dtype.kind == "i" else array.astype(dtype, copy=False)
