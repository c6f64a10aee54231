"""Image embeddings on disk: with a frozen encoder, each image is encoded once."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sam_jax.checkpoints.params import flat_params, params_sha256
from sam_jax.config import SamConfig
from sam_jax.files import atomic_write
from sam_jax.image import load_image
from sam_jax.models.compiled import encode_image
from sam_jax.models.sam import Sam
from sam_jax.processing import SamProcessor
from sam_jax.training.datasets import Dataset, LazyImage
from sam_jax.validation import check_model


class CachedEmbeddings:
    """A dataset whose examples also have `image_embedding`, float32 [g, g, c].

    Their images are lazy: training needs only embeddings and masks, so an image is read again only
    by `np.asarray`. The constructor computes all embeddings. File names are hashes of the image's
    pixels, in a folder named by a hash of the encoder's weights, compute dtype and configuration,
    so another image or encoder never finds a stale embedding.

    Args:
        dataset: the examples; see `sam_jax.training.datasets`.
        model: the model whose image encoder is used.
        folder: the cache, which runs may share.
        on_image: called after each image.

    Raises:
        TypeError: if `model` is not a `Sam`, for example a model's name.
        TypeError, ValueError, OSError: for an image that `load_image` rejects.
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: Sam,
        *,
        folder: str | Path,
        on_image: Callable[[], object] = lambda: None,
    ):
        check_model(model)
        self.dataset = dataset
        self.folder = Path(folder).expanduser() / _encoder_key(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        processor, split = SamProcessor(model.config), nnx.split(model)
        self._files, self._shapes = {}, {}
        # Hosts that share the folder start at different images, so that each encodes a part.
        first = jax.process_index() * len(dataset) // jax.process_count()
        for i in np.roll(np.arange(len(dataset)), -first).tolist():
            image = load_image(dataset[i]["image"])
            self._shapes[i] = image.shape
            digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes())
            self._files[i] = file = self.folder / f"{digest.hexdigest()}.npy"
            if not _is_whole(file, model.config):
                pixels = processor.preprocess(image)[None]
                embedding = np.asarray(encode_image(*split, pixels)[0], np.float32)
                with atomic_write(file) as temporary:
                    _write(temporary, embedding)
            on_image()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # also counted from the end
        file = self._files[index]
        try:
            embedding = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"the cached embedding {file} cannot be read ({error}); restart the run to compute "
                "it again"
            ) from error
        shape = self._shapes[index]
        masks = getattr(self.dataset, "read_masks", lambda _: None)(index)
        # An image that could not be read became a blank one without masks, of another size.
        if masks is None or masks.shape[1:] != shape[:2]:
            example = self.dataset[index]
        else:
            example = {"image": LazyImage(self.dataset, index, shape=shape), "masks": masks}
        return {**example, "image_embedding": embedding}

    def image_id(self, index: int) -> Any:
        """The dataset's id of the image; the index if it does not have ids."""
        return getattr(self.dataset, "image_id", int)(index)


def _is_whole(file: Path, config: SamConfig) -> bool:
    """Whether the file exists and is complete; a full disk may have truncated it."""
    grid = config.image_embedding_size
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    shape = grid, grid, config.image_embedding_channels
    return found.shape == shape and found.dtype == np.float32


def _write(file: Path, embedding: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, embedding)
    # Written by Python: numpy's error for a full disk says only how much was written.
    file.write_bytes(data.getbuffer())


def _encoder_key(model: Sam) -> str:
    weights = {k: v for k, v in flat_params(model).items() if k.startswith("image_encoder.")}
    # An encoder of one's own has settings that the configuration does not know.
    layers = [
        (path, type(layer).__qualname__, _settings(layer))
        for path, layer in nnx.iter_modules(model)
        if path[:1] == ("image_encoder",)
    ]
    settings = repr((model.config, model.dtype, layers))
    return hashlib.sha256(f"{settings} {params_sha256(weights)}".encode()).hexdigest()[:32]


def _settings(layer: nnx.Module) -> list[tuple[str, object]]:
    """A layer's settings, not its arrays and layers, as far as it can be compared between runs."""
    plain = (bool, int, float, str, tuple)
    return sorted((name, value) for name, value in vars(layer).items() if isinstance(value, plain))
