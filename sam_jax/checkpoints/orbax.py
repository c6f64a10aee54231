"""Our own checkpoint folder: `config.json` beside the arrays, which Orbax keeps in `params/`.

It holds all that is needed to load it again, and nothing of where it came from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sam_jax.checkpoints.params import check_tensors, param_shapes
from sam_jax.checkpoints.torch_file import CheckpointError
from sam_jax.config import SamConfig

CONFIG, PARAMS = "config.json", "params"


def save(
    path: str | os.PathLike, params: Mapping[str, np.ndarray | jax.Array], config: SamConfig
) -> None:
    """Writes a checkpoint folder, which appears whole or not at all.

    Args:
        path: of the new folder.
        params: every parameter by its path, as `flat_params` gives them.
        config: of the model.

    Raises:
        FileExistsError: if there is something at `path` already.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another folder or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # As numpy arrays, so that the folder names no device or sharding of this machine.
        ocp.save(temporary / PARAMS, {k: np.asarray(v) for k, v in params.items()})
        (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    return (path / PARAMS).is_dir() and (path / CONFIG).is_file()


def load_config(path: str | os.PathLike) -> SamConfig:
    """The configuration of a folder that `save` wrote."""
    file = Path(path) / CONFIG
    try:
        return SamConfig.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is no configuration of sam_jax: {error}") from error


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], SamConfig]:
    """The parameters and the configuration of a folder that `save` wrote.

    Raises:
        CheckpointError: if a part is missing or damaged, or does not fit the configuration.
    """
    path = Path(path).absolute()
    config = load_config(path)
    try:
        params = ocp.load(path / PARAMS)
    except Exception as error:  # whatever Orbax meets in a damaged folder
        raise CheckpointError(f"{path / PARAMS} cannot be read by Orbax: {error}") from error
    shapes = {name: value.shape for name, value in params.items()}
    check_tensors(shapes, param_shapes(config))
    return params, config


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
