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
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from sam_jax.checkpoints.params import check_depth, check_tensors, param_shapes
from sam_jax.config import SamConfig
from sam_jax.errors import CheckpointError, clip
from sam_jax.files import read_json, replacing

CONFIG, PARAMS = "config.json", "params"
_BATCH_BYTES = 128 << 20
MAX_CONFIG_BYTES = 1 << 20
_NAME_BYTES = 64
# How much larger than its files a checkpoint may be: weights hardly compress, and Orbax allocates
# whatever size a file declares.
_MOST_COMPRESSED, _ALWAYS_ALLOWED = 100, 256 << 20
# An array is saved as one chunk; whoever saves it anew from many devices makes some per device.
_MOST_CHUNKS = 4096
_CODECS = {"sharding_indexed", "bytes", "zstd", "crc32c"}  # others allocate what the data asks for


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
        temporary = stack.enter_context(replacing(path)) if is_first else None
        temporary = path.parent / _from_first(temporary and temporary.parent.name) / path.name
        try:
            _check_space(path, params, dtype)
            _save_params(temporary / PARAMS, params, dtype)
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

    Of several hosts all have to call this together, as Orbax wants it.

    Raises:
        CheckpointError: if a part is missing or damaged, or does not fit the configuration.
    """
    from orbax.checkpoint import v1 as ocp  # half a second that only this kind of folder takes

    path = Path(os.path.abspath(path))  # without "..", which tensorstore refuses
    config = load_config(path)
    size = _size(path / PARAMS)
    try:
        _check_layout(path / PARAMS)  # before Orbax opens an array
        metadata = ocp.metadata(path / PARAMS).metadata  # None if it is damaged
        if not metadata or not all(hasattr(array, "shape") for array in metadata.values()):
            raise ValueError("its metadata is damaged, or that of no flat dictionary of arrays")
        declared = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in metadata.items()}
    except Exception as error:  # whatever Orbax meets in a damaged folder
        raise _unreadable(path, error) from error
    # All of this before an array is allocated.
    check_depth(config, len(declared))
    check_tensors(declared, param_shapes(config))
    expected = sum(math.prod(array.shape) * array.dtype.itemsize for array in declared.values())
    if expected > max(_MOST_COMPRESSED * size, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"{path / PARAMS} has {size:,} bytes, which cannot be the {expected:,} that it declares"
        )
    try:
        return ocp.load(path / PARAMS), config
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_layout(folder: Path) -> None:
    """Refuses chunks larger than their array: the process aborts when they cannot be allocated.

    Raises:
        Exception: of any type, for what is damaged or laid out in another way than `save` does it.
    """
    state = folder / "state"
    if list(folder.rglob("_METADATA")) != [state / "_METADATA"]:
        raise ValueError("expected its metadata in state/_METADATA alone")
    kind = read_json(state / "_METADATA")
    if not (kind["use_ocdbt"] is kind["use_zarr3"] is True):
        raise ValueError("expected arrays in OCDBT and zarr 3")
    base = {"driver": "file", "path": f"{state}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key in store.list().result():
        if key.endswith(b"/zarr.json"):
            layout = read_json(bytes(store[key]))
            fits = _fits(layout["shape"], layout["chunk_grid"]["configuration"])
            if not (fits and all(_codec_fits(layout["shape"], c) for c in layout["codecs"])):
                raise ValueError(
                    f"the chunks in {clip(key.decode())} do not fit its shape, or its codecs "
                    f"are not among {', '.join(sorted(_CODECS))}"
                )


def _codec_fits(shape: list[int], codec: dict[str, Any]) -> bool:
    if codec["name"] != "sharding_indexed":
        return codec["name"] in _CODECS
    values = codec["configuration"]
    inner = [*values["codecs"], *values.get("index_codecs", [])]
    return _fits(shape, values) and all(_codec_fits(shape, codec) for codec in inner)


def _fits(shape: list[int], grid: dict[str, Any]) -> bool:
    chunk = grid["chunk_shape"]
    return (
        len(chunk) == len(shape)
        and all(type(n) is int and 1 <= n <= size for n, size in zip(chunk, shape, strict=True))
        and math.prod(-(-size // n) for n, size in zip(chunk, shape, strict=True)) <= _MOST_CHUNKS
    )


def _size(folder: Path) -> int:
    """The bytes of a folder's files.

    Raises:
        CheckpointError: if there is something else in it: a pipe would be waited for without end.
    """
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
        elif not path.is_dir():
            raise CheckpointError(f"{path} is neither a file nor a folder")
    return size


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path / PARAMS} cannot be read by Orbax: {error}")


def _save_params(
    path: Path, params: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike | None
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
