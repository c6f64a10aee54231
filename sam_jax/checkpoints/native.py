"""sam_jax's own checkpoint folder: `config.json`, and the arrays in `params/`, written by Orbax.

It has everything that loading needs and nothing about the machine that wrote it.
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
from sam_jax.files import atomic_write, folder_size, read_json, require_absent

CONFIG, PARAMS = "config.json", "params"
_BATCH_BYTES = 128 << 20
MAX_CONFIG_BYTES = 1 << 20
_NAME_BYTES = 64
# ViT-H's metadata has 127 kB, an array's layout less than 1 kB.
_MAX_METADATA_BYTES, _MAX_LAYOUT_BYTES = 1 << 20, 1 << 16
# Limit of a checkpoint's size relative to its files: weights hardly compress, and tensorstore
# allocates any size that a file declares.
_MOST_COMPRESSED, _ALWAYS_ALLOWED = 100, 256 << 20
# sam_jax saves an array as one chunk, other programs as several per device. Finding one may take
# milliseconds.
_MOST_CHUNKS = 1 << 16
# ViT-H and its optimizer state have 2,000.
_MOST_ARRAYS = 6_000
# Codecs that Orbax writes, in shards or not. Others may allocate any size that the data declare.
_CODECS, _INDEX_CODECS = (["bytes"], ["bytes", "zstd"]), ["bytes", "crc32c"]
_NODE_CACHE_BYTES = 256 << 20
_READ_AT_ONCE = 8


def save(
    path: str | os.PathLike,
    params: Mapping[str, np.ndarray | jax.Array],
    config: SamConfig,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a checkpoint folder atomically.

    With several hosts, all must call this together, as Orbax requires; the first one writes.

    Args:
        path: the folder to create; with several hosts, on a shared disk.
        params: the parameters by path, as `flat_params` returns them.
        config: the model's configuration.
        dtype: dtype of the stored parameters; None keeps each parameter's. Counters stay integers,
            and the matrix of the positional encoding keeps its dtype.

    Raises:
        FileExistsError: if the path exists already.
        OSError: if it cannot be written, for example because the disk is full; nothing is left
            behind.
    """
    path = Path(path).expanduser().absolute()
    require_absent(path)
    with contextlib.ExitStack() as stack:
        is_first = jax.process_index() == 0
        temporary = stack.enter_context(atomic_write(path)) if is_first else None
        temporary = path.parent / _from_first(temporary and temporary.parent.name) / path.name
        try:
            _check_space(path, params, dtype)
            _save_params(str(temporary / PARAMS), params, dtype)
        except Exception as error:
            # Orbax's messages end with the cause, after every path that leads to it.
            cause = str(error).rpartition('": ')[2]
            raise OSError(f"cannot write {path}: {cause}") from error
        if is_first:
            # Orbax writes the temporary folder's path here, but only the file's existence matters.
            (temporary / PARAMS / "commit_success.txt").write_text("")
            (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    multihost_utils.sync_global_devices(f"saved {path}")


def _check_space(
    path: Path, params: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike | None
) -> None:
    """Checks before Orbax does, whose threads print tracebacks if the disk is full."""
    size = sum(array.size * np.dtype(dtype or array.dtype).itemsize for array in params.values())
    free = shutil.disk_usage(path.parent).free
    if free < 0.9 * size:  # weights hardly compress
        raise OSError(f"it needs about {size:,} bytes, but the disk has only {free:,} left")


def _from_first(name: str | None) -> str:
    """Broadcasts the first host's name, in ASCII, to every host."""
    mine = np.frombuffer((name or "").encode().ljust(_NAME_BYTES), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine)).decode().rstrip()


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    return (path / PARAMS).is_dir() and (path / CONFIG).is_file()


def load_config(path: str | os.PathLike) -> SamConfig:
    """The configuration of a folder that `save` wrote.

    Raises:
        CheckpointError: if it is missing or invalid.
    """
    file = Path(path) / CONFIG
    try:
        return SamConfig.from_dict(read_json(file, max_bytes=MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a configuration of sam_jax: {error}") from error


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], SamConfig]:
    """The parameters and the configuration of a folder that `save` wrote.

    The arrays are read by tensorstore instead of Orbax, which prints tracebacks after an error and
    does not limit what it reads first.

    Raises:
        CheckpointError: if a part is missing or damaged, or does not match the configuration.
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
    except Exception as error:  # anything that tensorstore raises for a damaged folder
        raise _unreadable(path, error) from error
    # Check all of this before allocating an array.
    check_depth(config, len(declared))
    check_tensors(declared, param_shapes(config))
    expected = sum(math.prod(array.shape) * array.dtype.itemsize for array in declared.values())
    if expected > max(_MOST_COMPRESSED * size, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"{path / PARAMS} has {size:,} bytes, which cannot be the declared {expected:,}"
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
    """Opens the arrays of a flat dictionary that Orbax saved, by name, without reading them.

    The names come from Orbax's metadata. The store is never asked to list its keys: a few kilobytes
    can make it list billions.

    Raises:
        Exception: of any type, if something is damaged or not laid out as Orbax does.
    """
    kind = read_json(state / "_METADATA", max_bytes=max_metadata_bytes)
    if not (kind["use_ocdbt"] is kind["use_zarr3"] is True):
        raise ValueError("expected arrays in OCDBT and zarr 3")
    names = list(map(_name, kind["tree_metadata"].values()))
    if len(names) > _MOST_ARRAYS:
        raise ValueError(f"it has {len(names):,} arrays, expected at most {_MOST_ARRAYS:,}")
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    # The cache makes tensorstore read and decode each node of the B-tree once, not for each array.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _NODE_CACHE_BYTES}})
    store = tensorstore.KvStore.open(spec, context=context).result()
    return {name: _open_array(store, name) for name in names}


def _name(entry: dict[str, Any]) -> str:
    keys = [key["key"] for key in entry["key_metadata"]]
    if len(keys) != 1 or not isinstance(keys[0], str):
        raise ValueError("expected a flat dictionary of arrays")
    return keys[0]


def _open_array(store: tensorstore.KvStore, name: str) -> tensorstore.TensorStore:
    """Opens an array after checking that its chunks and codecs bound the memory for reading it.

    Otherwise the process could abort, since tensorstore allocates any size that the data declare.
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
            f"the chunks of {clip(name)} do not match its shape, or its codecs are not Orbax's"
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
    # None for an array without dimensions. All sizes of an array in a file are known.
    chunk = cast(tuple[int, ...], array.chunk_layout.read_chunk.shape or ())
    return math.prod(-(-size // n) for size, n in zip(array.shape, chunk, strict=True))


def _read_arrays(arrays: dict[str, tensorstore.TensorStore]) -> dict[str, np.ndarray]:
    """Reads several at a time, not all: for a damaged array, the whole folder may be read."""
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

    # In batches: Orbax copies its input and keeps it, compressed, until the end.
    batch, size = {}, 0
    for name, value in params.items():
        # Positions are always encoded in float32.
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
    """Converts to numpy, so that the folder does not record this machine's devices or sharding."""
    array = np.asarray(array)
    return array if dtype is None or array.dtype.kind == "i" else array.astype(dtype, copy=False)
