"""Our own checkpoint folder: `config.json` beside the arrays, which Orbax keeps in `params/`.

It holds all that is needed to load it again, and nothing of where it came from.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from sam_jax.checkpoints.params import check_depth, check_tensors, param_shapes
from sam_jax.checkpoints.torch_file import CheckpointError
from sam_jax.config import SamConfig

CONFIG, PARAMS = "config.json", "params"
_BATCH_BYTES = 128 << 20


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
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_first = jax.process_index() == 0
    (number,) = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(4), np.uint32))
    temporary = path.with_name(f".{path.name}.{number:08x}")
    try:
        _save_params(temporary / PARAMS, params, dtype)
        if is_first:
            # Orbax writes the path of the temporary folder here; only that there is a file matters.
            (temporary / PARAMS / "commit_success.txt").write_text("")
            (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            temporary.rename(path)
        multihost_utils.sync_global_devices(f"saved {path}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        return SamConfig.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no configuration of sam_jax: {error}") from error


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], SamConfig]:
    """The parameters and the configuration of a folder that `save` wrote.

    Of several hosts all have to call this together, as Orbax wants it.

    Raises:
        CheckpointError: if a part is missing or damaged, or does not fit the configuration.
    """
    path = Path(path).absolute()
    config = load_config(path)
    try:
        params = ocp.load(path / PARAMS)
        if not all(hasattr(value, "shape") for value in params.values()):
            raise ValueError("it is no flat dictionary of arrays")
    except Exception as error:  # whatever Orbax meets in a damaged folder
        raise CheckpointError(f"{path / PARAMS} cannot be read by Orbax: {error}") from error
    check_depth(config, len(params))
    check_tensors(params, param_shapes(config))
    return params, config


def _save_params(
    path: Path, params: Mapping[str, np.ndarray | jax.Array], dtype: DTypeLike | None
) -> None:
    # In batches: Orbax copies all that it is given and holds it, compressed, until the end.
    batch, size = {}, 0
    for name, value in params.items():
        # Positions are encoded in float32 whatever the rest is.
        short = not name.endswith("positional_encoding_gaussian_matrix")
        batch[name] = _to_numpy(value, dtype if short else None)
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
