"""Reads and writes checkpoints of every kind.

`from_pretrained` loads a model, `save_pretrained` writes a folder in sam_jax's own format, and
`write_checkpoint` writes a file for PyTorch.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sam_jax.arrays import as_array
from sam_jax.checkpoints import native
from sam_jax.checkpoints.download import HF_FILES, find_weights, read_index, resolve
from sam_jax.checkpoints.hf_config import from_hf, to_hf, to_hf_preprocessor
from sam_jax.checkpoints.infer_config import infer_config, strip_prefix
from sam_jax.checkpoints.names import Format, detect_format, from_torch, to_torch
from sam_jax.checkpoints.params import (
    build_model,
    check_depth,
    check_finite,
    check_tensors,
    flat_params,
    param_shapes,
    params_sha256,
    resize_positions,
)
from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.checkpoints.tensor_files import read_tensors
from sam_jax.checkpoints.torch_write import write_torch
from sam_jax.config import Preprocessing, SamConfig, check_preprocessing, with_preprocessing
from sam_jax.errors import CheckpointError, clip
from sam_jax.files import atomic_write, read_json, require_absent
from sam_jax.models.checks import check_dtype
from sam_jax.models.sam import ENCODERS, Sam
from sam_jax.ops.attention import Implementation, check_implementation

__all__ = [
    "CheckpointError",
    "flat_params",
    "from_pretrained",
    "load_config",
    "load_params",
    "params_sha256",
    "read_state_dict",
    "save_pretrained",
    "write_checkpoint",
]


def from_pretrained(
    name_or_path: str | os.PathLike = "mobile_sam",
    *,
    dtype: DTypeLike = jnp.float32,
    attention: Implementation = "portable",
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Sam:
    """Loads a model with the weights of a checkpoint.

    Args:
        name_or_path: a short name ("mobile_sam", "vit_b", "vit_l", "vit_h", "lite_medsam"), a hub
            repository ("facebook/sam-vit-base"), a Hugging Face folder, a file of Meta or MobileSAM
            (`.pth`, `.pt`), a `.safetensors` file, or a folder of `save_pretrained`.
        dtype: compute dtype: float32, bfloat16 or float16; parameters keep their dtype.
        attention: how the ViT's attention is computed; the default runs everywhere
            (`sam_jax.ops.rel_pos_attention`).
        image_size: side of the model's input in pixels; None for the checkpoint's. Position
            embeddings are resized.
        preprocessing: "medsam" for a MedSAM (such as "wanglab/medsam-vit-base"): images are
            resized to a square and their values are scaled to 0 to 1; None for what the checkpoint
            says.

    Raises:
        FileNotFoundError: if a path does not exist.
        CheckpointError: if the file is not a SAM checkpoint, or its weights have NaN or infinity.
        ValueError: for an unknown name or an invalid option.
        ConnectionError: if a download is needed and fails.
    """
    check_dtype(dtype)
    check_implementation(attention)
    check_preprocessing(preprocessing)
    params, config = load_params(name_or_path)
    try:
        check_finite(params)
    except CheckpointError as error:
        raise CheckpointError(f"{name_or_path}: {error}") from error
    if image_size is not None:
        params, config = resize_positions(params, config, image_size)
    return build_model(params, with_preprocessing(config, preprocessing), dtype, attention)


def save_pretrained(model: Sam, path: str | os.PathLike) -> None:
    """Writes the model to a new folder that `from_pretrained` loads.

    With several hosts, all must call this together; the first one writes.

    Raises:
        FileExistsError: if the path exists already.
        OSError: if the folder cannot be written, for example because the disk is full.
        CheckpointError: if the model has other parameters than its configuration says, such as
            LoRA's adapters, or an image encoder of your own.
    """
    if not isinstance(model, Sam):
        raise TypeError(f"model is a {type(model).__name__}, expected a Sam")
    encoder = model.image_encoder
    if not isinstance(encoder, tuple(ENCODERS.values())):
        raise CheckpointError(
            f"the image encoder is a {type(encoder).__name__}, for which there is no format; save "
            "nnx.state(model) with Orbax"
        )
    params = flat_params(model)
    _check_complete(params, model.config)
    native.save(path, params, model.config)


def _check_complete(params: Mapping[str, Any], config: SamConfig) -> None:
    """Rejects parameters that are not exactly those of a model."""
    if any(name.endswith("lora_a") for name in params):
        raise CheckpointError(
            "the model has adapters of LoRA, for which there is no format; save merge_lora(model), "
            "or the adapters alone with save_lora"
        )
    check_tensors(params, param_shapes(config))


def load_params(name_or_path: str | os.PathLike) -> tuple[dict[str, np.ndarray], SamConfig]:
    """A checkpoint's parameters by path, and its configuration; arrays may be views of the file.

    Accepts the names and paths of `from_pretrained` and raises the same errors.
    """
    path = resolve(name_or_path)
    if native.is_checkpoint(path):
        return native.load(path)
    tensors = read_state_dict(path)
    config = _torch_config(path, tensors)
    check_depth(config, len(tensors))
    return from_torch(tensors, config, param_shapes(config)), config


def read_state_dict(name_or_path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch checkpoint by name, unchanged, as views of the file.

    A common prefix that is not part of a SAM's names (`module.`, `model.sam.`) is removed, with a
    warning. Accepts the PyTorch checkpoints that `from_pretrained` accepts and raises the same
    errors.
    """
    path = resolve(name_or_path)
    tensors = _read_folder(path) if path.is_dir() else read_tensors(path)
    try:
        tensors, left_out = strip_prefix(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if left_out:
        parts = " and ".join(repr(clip(part)) for part in left_out)
        warnings.warn(f"{path}: removed {parts} from the names of the tensors", stacklevel=2)
    return tensors


def load_config(name_or_path: str | os.PathLike) -> SamConfig:
    """The configuration of a checkpoint; of its tensors, only names and shapes are read.

    Accepts the names and paths of `from_pretrained` and raises the same errors.
    """
    path = resolve(name_or_path)
    if native.is_checkpoint(path):
        return native.load_config(path)
    return _torch_config(path, read_state_dict(path))


def write_checkpoint(
    path: str | os.PathLike, params: Mapping[str, ArrayLike], *, config: SamConfig, fmt: Format
) -> None:
    """Writes a file for PyTorch; converting from PyTorch and back preserves every bit.

    Args:
        path: ends in `.safetensors`, or in `.pth`, `.pt` or `.bin` for `torch.load`.
        params: the parameters by path, as `flat_params` returns them.
        config: the model's configuration. The "hf" format also writes it, as `config.json` and
            `preprocessor_config.json` next to the file, whose name must be one that
            `transformers.SamModel.from_pretrained` looks for in a folder. Meta's format cannot
            store it: a warning lists the settings that a reader would get wrong.
        fmt: "meta" for the names of `segment_anything` and MobileSAM, "hf" for those of
            `transformers`.

    Raises:
        FileExistsError: if a file exists already.
        CheckpointError: if the parameters are not exactly those of a model with this configuration.
        ValueError: for another suffix or format, or a model that the format does not support.
    """
    path = Path(path).expanduser()
    writers = {".safetensors": write_safetensors}
    writers |= dict.fromkeys((".pth", ".pt", ".bin"), write_torch)
    if path.suffix not in writers:
        raise ValueError(f"cannot write {path}: the suffix must be one of {', '.join(writers)}")
    if fmt not in get_args(Format):
        raise ValueError(f"fmt is {fmt!r}, expected one of {list(get_args(Format))}")
    params = {name: as_array(value, name) for name, value in params.items()}
    _check_complete(params, config)
    tensors, texts = to_torch(params, config, fmt), {}
    if fmt == "hf":
        if path.name not in HF_FILES:
            raise ValueError(
                f"cannot write {path}: transformers looks for {' or '.join(HF_FILES)} in a folder"
            )
        texts = {
            path.with_name("config.json"): to_hf(config),
            path.with_name("preprocessor_config.json"): to_hf_preprocessor(config),
        }
    else:
        _warn_of_lost_settings(config, tensors)
    for file in (path, *texts):
        require_absent(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The files appear together: a partly written folder would block the next run.
    with contextlib.ExitStack() as stack:
        for file, values in texts.items():
            temporary = stack.enter_context(atomic_write(file))
            temporary.write_text(json.dumps(values, indent=2) + "\n")
        writers[path.suffix](path, tensors)


def _warn_of_lost_settings(config: SamConfig, tensors: dict[str, np.ndarray]) -> None:
    """Warns of settings that cannot be inferred from tensors and differ from Meta's models."""
    try:
        inferred = dict(_flat(infer_config(tensors)))
    except CheckpointError as error:
        lost = [f"none can be inferred ({error})"]
    else:
        lost = [
            f"{name} is {value}, inferred as {inferred[name]}"
            for name, value in _flat(config)
            if value != inferred[name] and not name.endswith("layer_norm_eps")
        ]
    if lost:
        warnings.warn(
            "Meta's format stores only tensors; a model built from them has different settings "
            "unless you specify them: " + "; ".join(lost),
            stacklevel=3,
        )


def _flat(config: SamConfig) -> list[tuple[str, Any]]:
    """All settings by name; those of parts are "part.name"."""
    return [
        (f"{name}.{key}" if key else name, value)
        for name, part in dataclasses.asdict(config).items()
        for key, value in (part.items() if isinstance(part, dict) else [("", part)])
    ]


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder, from one file or from several with an index."""
    weights = find_weights([file.name for file in path.iterdir() if file.is_file()])
    if weights is None:
        raise CheckpointError(
            f"the folder {path} does not have a checkpoint: expected {' or '.join(HF_FILES)} with "
            "a config.json (Hugging Face), or config.json and params/ (sam_jax)"
        )
    if weights in HF_FILES:
        return read_tensors(path / weights)
    shards = read_index(path / weights)
    return {k: v for shard in shards for k, v in read_tensors(path / shard).items()}


def _torch_config(path: Path, tensors: dict[str, np.ndarray]) -> SamConfig:
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if detect_format(tensors) != "hf" or not file.is_file():
        return infer_config(tensors)
    try:
        values = _read_json(file)
    except CheckpointError as error:
        if path.is_dir():
            raise
        warnings.warn(f"{error}; the configuration is inferred from the shapes", stacklevel=3)
        return infer_config(tensors)
    model_type = values.get("model_type")
    is_sam = model_type in ("sam", "sam_hq") or (model_type is None and "vision_config" in values)
    if not is_sam:
        if path.is_file():
            return infer_config(tensors)  # it belongs to something else in the same folder
        what = f"describes a {short(model_type)} model" if model_type else "has no model_type"
        raise CheckpointError(
            f"{file} {what}, expected model_type 'sam' or 'sam_hq'; "
            "if it does not belong to the weights, pass the path of the weights' file"
        )
    try:
        return from_hf(values, _hf_preprocessor(folder))
    except ValueError as error:
        raise CheckpointError(
            f"the configuration in {folder} is not that of a SAM: {error}"
        ) from error


def _hf_preprocessor(folder: Path) -> Any:
    """The folder's image processor settings, looked up in the order of `ImageProcessingMixin`.

    `SamProcessor` of transformers 5 writes `processor_config.json`, older ones the second file.
    """
    processor, preprocessor = (
        _read_json(file) if (file := folder / name).is_file() else {}
        for name in ("processor_config.json", "preprocessor_config.json")
    )
    return processor.get("image_processor", preprocessor)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file, max_bytes=native.MAX_CONFIG_BYTES)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is {short(values)}, expected names and values")
    return values
