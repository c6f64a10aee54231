"""`SamPredictor`, with the API of Meta's: one image, many prompts."""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sam_jax.arrays import ArrayLike, Device, as_numpy, is_array
from sam_jax.errors import NonFiniteError, check_bool
from sam_jax.export.openvino import encoder_for
from sam_jax.idioms import WithAdvice
from sam_jax.image import ImageInput, load_image
from sam_jax.models.checks import check_multimask
from sam_jax.models.compiled import chunk_size_for, decode, encode_image
from sam_jax.models.sam import Sam
from sam_jax.ops.prompts import PADDING, join_prompts, pad_prompts, warn_outside
from sam_jax.processing import SamProcessor
from sam_jax.types import Runtime
from sam_jax.validation import (
    ImagePrompts,
    check_embedding,
    check_model,
    check_sizes,
    parse_prompts,
    to_numbers,
)


class MaskPrediction(NamedTuple):
    """A prediction of `SamPredictor`: numpy arrays, which unpack in Meta's order.

    Results of `predict_batch` have a leading axis of prompts.
    """

    masks: Bool[np.ndarray, "*b m h w"] | Float[np.ndarray, "*b m h w"]
    """Masks of the image's size: booleans, or float32 logits with `return_logits`."""
    scores: Float[np.ndarray, "*b m"]
    """Predicted IoUs."""
    logits: Float[np.ndarray, "*b m side side"]
    """Low-resolution logits, which can be a later `mask_input`."""


class SamPredictor(WithAdvice):
    """Computes an image's embedding once, then predicts masks for prompts quickly.

    Points and boxes are in pixels of the image. Predictors of models with the same shapes share
    compiled programs. A new image size recompiles only the small program that resizes masks, and
    only beyond the next of 256, 384, 512, 768, ... pixels.

    Args:
        model: its current parameters are used; create a new predictor after changing them.
        runtime: what runs the image encoder. "openvino" is the fastest on a CPU; it needs the extra
            `openvino`, and one of sam_jax's encoders without adapters.

    Raises:
        TypeError: if `model` is not a `Sam`, for example a model's name.
        ValueError: for another runtime, or a model that the runtime cannot run.
        MissingExtra: if the runtime is not installed.
    """

    def __init__(self, model: Sam, *, runtime: Runtime = "jax"):
        check_model(model)
        self._encoder = encoder_for(model, runtime)
        self.config = model.config
        self.processor = SamProcessor(model.config)
        # The state that `split` returns shares its variables with the model, so copy the tree (not
        # the arrays).
        self._graphdef, params = nnx.split(model)
        device, *others = jax.tree.leaves(params)[0].devices()
        if others:  # the model is spread over a mesh, and one image needs one device
            params = jax.device_put(params, device)
        self._params = jax.tree.map(lambda array: array, params)
        self._dtype = model.mask_decoder.dtype
        self.reset_image()

    @property
    def model(self) -> Sam:
        """A model with the predictor's parameters."""
        return nnx.merge(self._graphdef, self._params)

    @property
    def device(self) -> Device:
        """The device of the model's parameters, on which the predictor computes."""
        # Not stored, since devices cannot be pickled; a copy in another process has its own.
        (device, *_) = jax.tree.leaves(self._params)[0].devices()
        return device

    def set_image(self, image: ImageInput, image_format: str = "RGB") -> None:
        """Computes an image's embedding for the following predictions.

        Args:
            image: a uint8 array [h, w, 3], or anything else that `load_image` accepts.
            image_format: "RGB" or "BGR", the order of an array's channels.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load_image`, and for another format.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}, expected 'RGB' or 'BGR'")
        array = load_image(image)
        # PIL images and files define the order of their channels themselves.
        if image_format == "BGR" and is_array(image) and not isinstance(image, Image.Image):
            array = np.ascontiguousarray(array[..., ::-1])
        pixels = self.processor.preprocess(array)[None]
        if self._encoder is not None:
            self._set_features(self._encoder(pixels))
        else:
            pixels = jax.device_put(pixels, self.device)
            self._set_features(encode_image(self._graphdef, self._params, pixels))
        self.original_size = array.shape[:2]

    def get_image_embedding(self) -> Float[np.ndarray, "1 c g g"]:
        """The current image's embedding, float32 [1, c, g, g], channels first as in Meta's code.

        Save it with `np.save` (with `original_size`) and pass it to `set_image_embedding` later.

        Raises:
            RuntimeError: if no image is set.
        """
        features, _ = self._image()
        return np.ascontiguousarray(np.moveaxis(jax.device_get(features).astype(np.float32), -1, 1))

    features = property(get_image_embedding)

    @property
    def transform(self) -> "Transform":
        """Meta's transform, which resizes images and scales coordinates for `predict_torch`."""
        return Transform(self.processor)

    def set_image_embedding(self, embedding: ArrayLike, original_size: ArrayLike) -> None:
        """Sets an image by its embedding.

        Args:
            embedding: [1, c, g, g] from `get_image_embedding` of the same model.
            original_size: (h, w) of the image in pixels.

        Raises:
            ValueError: if the embedding has another shape or numbers that are not finite, or if the
                size is not two positive integers.
        """
        embedding = check_embedding(embedding, self.config)
        (size,) = check_sizes([original_size], 1, "original_size")
        self._set_features(embedding[None].astype(self._dtype))
        self.original_size = size

    def _set_features(self, features: np.ndarray | jax.Array) -> None:
        # Always a committed JAX array, so that `decode` is compiled only once.
        self._features = jax.device_put(features, self.device)

    def reset_image(self) -> None:
        """Forgets the current image."""
        self._features: jax.Array | None = None
        self.original_size: tuple[int, int] | None = None

    @property
    def is_image_set(self) -> bool:
        """Whether an image is set."""
        return self._features is not None

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the current image after resizing for the model.

        Raises:
            RuntimeError: if no image is set.
        """
        _, original_size = self._image()
        return self.processor.input_size(original_size)

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool | None = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> MaskPrediction:
        """Predicts masks for one prompt.

        Coordinates outside the image are allowed, but cause a warning.

        Args:
            point_coords: [n, 2], x and y of each point.
            point_labels: [n], 1 foreground, 0 background; required with points.
            box: [4], x0, y0, x1, y1.
            mask_input: [1, 256, 256] low-resolution logits, such as `logits[[i]]` of an earlier
                prediction, or `SamProcessor.mask_to_logits(mask)`.
            multimask_output: True for three masks, best for an ambiguous prompt such as a single
                point; False for one mask, best for an unambiguous prompt; None for all four, the
                one first.
            return_logits: return float32 logits instead of booleans.
            hq_token_only: for a SAM-HQ, return its own mask instead of its sum with SAM's.

        Returns:
            Masks [m, h, w], scores [m] and logits [m, 256, 256].

        Raises:
            RuntimeError: if no image is set.
            ValueError: if the prompt is invalid.
            NonFiniteError: if the model predicts NaN or infinity.
        """
        if box is not None:
            box = to_numbers(box, "box")
            if box.shape not in ((4,), (1, 4)):
                raise ValueError(
                    f"box has shape {box.shape}, expected (4,): x0, y0, x1, y1; "
                    "predict_batch takes several boxes"
                )
            box = box.reshape(1, 4)
        predicted = self.predict_batch(
            None if point_coords is None else [point_coords],
            None if point_labels is None else [point_labels],
            boxes=box,
            mask_input=None if mask_input is None else as_numpy(mask_input, "mask_input")[None],
            multimask_output=multimask_output,
            return_logits=return_logits,
            hq_token_only=hq_token_only,
        )
        return MaskPrediction(*(array[0] for array in predicted))

    def predict_batch(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        *,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool | None = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> MaskPrediction:
        """Predicts masks for b prompts in one compiled call.

        Args:
            point_coords: [b, n, 2] or b lists of different lengths; x and y of each point.
            point_labels: [b, n] or b lists; required with points.
            boxes: [b, 4], x0, y0, x1, y1, one for each prompt.
            mask_input: [b, 1, 256, 256] low-resolution logits, or [1, 1, 256, 256] for all.
            multimask_output: see `predict`.
            return_logits: see `predict`.
            hq_token_only: see `predict`.

        Returns:
            Masks [b, m, h, w], scores [b, m] and logits [b, m, 256, 256].

        Raises:
            RuntimeError, ValueError, NonFiniteError: see `predict`.
        """
        prompts = parse_prompts(
            point_coords, point_labels, boxes, mask_input, self.config.mask_size
        )
        return self._predict(prompts, multimask_output, return_logits, hq_token_only)

    def predict_torch(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool | None = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> MaskPrediction:
        """`predict_batch` with coordinates in pixels of the model's input, as in Meta's code.

        Takes and returns numpy arrays with the shapes of `predict_batch`. Scale coordinates with
        `SamProcessor.scale_coords`.
        """
        prompts = parse_prompts(
            point_coords, point_labels, boxes, mask_input, self.config.mask_size
        )
        return self._predict(
            prompts, multimask_output, return_logits, hq_token_only, in_image=False
        )

    def _predict(
        self,
        prompts: ImagePrompts,
        multimask_output: bool | None,
        return_logits: bool = False,
        hq_token_only: bool = False,
        *,
        in_image: bool = True,
    ) -> MaskPrediction:
        """`predict_batch` of prompts that are checked already."""
        check_multimask(multimask_output)
        check_bool("return_logits", return_logits)
        check_bool("hq_token_only", hq_token_only)
        features, original_size = self._image()
        points, labels = self._to_input(prompts, in_image)
        masks, count = prompts.masks, prompts.num_prompts
        padded = pad_prompts(points[None], labels[None], None if masks is None else masks[None])
        low_res, scores = decode(
            self._graphdef,
            self._params,
            features,
            *jax.device_put(padded, self.device),
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
            prompts_chunk_size=chunk_size_for(features, padded[1].shape[1]),
        )
        full = self.processor.resize_masks(
            low_res,
            original_size,
            input_size=self.input_size,
            threshold=None if return_logits else self.config.mask_threshold,
            count=count * low_res.shape[2],
        )
        # Copies, which are writable and do not keep the padding in memory.
        low_res, scores = (np.array(x[0, :count]) for x in jax.device_get((low_res, scores)))
        check_scores(scores)
        masks = full.reshape(*low_res.shape[:2], *original_size)
        return MaskPrediction(masks, scores, low_res)

    def _to_input(self, prompts: ImagePrompts, in_image: bool):
        """The prompts as labeled points [b, n, 2] and [b, n], in pixels of the model's input."""
        (_, size), frame = self._image(), "image"
        if not in_image:
            size, frame = self.input_size, "model's input (predict_batch takes the image's)"

        def scale(coords):
            return self.processor.scale_coords(coords, size) if in_image else np.float32(coords)

        coords, labels, boxes, _ = prompts
        count = prompts.num_prompts
        if coords is None and boxes is None:  # only a mask, or no prompt at all
            return np.zeros((count, 1, 2), np.float32), np.full((count, 1), PADDING, np.int32)
        if coords is not None:
            warn_outside(coords, labels, None, size, "point_coords", frame)
            coords = scale(coords)
        if boxes is not None:
            warn_outside(None, None, boxes, size, "boxes", frame)
            boxes = scale(boxes.reshape(count, 2, 2)).reshape(count, 4)
        return join_prompts(coords, labels, boxes)

    def _image(self) -> tuple[jax.Array, tuple[int, int]]:
        """The current image's embedding, and its size (h, w)."""
        if self._features is None or self.original_size is None:
            raise RuntimeError("no image is set; call set_image (or set_image_embedding) first")
        return self._features, self.original_size


class Transform(WithAdvice):
    """The counterpart of `segment_anything`'s `ResizeLongestSide`.

    Accepts arrays of any library and returns numpy arrays. Sizes are (h, w) of the image.
    """

    def __init__(self, processor: SamProcessor):
        self._processor = processor

    def apply_image(self, image: ImageInput) -> UInt8[np.ndarray, "h w 3"]:
        """Resizes an image for the model."""
        return self._processor.resize(image)

    def apply_coords(
        self, coords: ArrayLike, original_size: ArrayLike
    ) -> Float[np.ndarray, "*batch 2"]:
        """Scales (x, y) from pixels of the image to pixels of the model's input, float32."""
        (size,) = check_sizes([original_size], 1, "original_size")
        return self._processor.scale_coords(to_numbers(coords, "coords"), size)

    def apply_boxes(
        self, boxes: ArrayLike, original_size: ArrayLike
    ) -> Float[np.ndarray, "*batch 4"]:
        """Scales boxes (x0, y0, x1, y1) from pixels of the image to pixels of the model's input."""
        boxes = to_numbers(boxes, "boxes")
        if boxes.shape[-1:] != (4,):
            raise ValueError(f"boxes have shape {boxes.shape}, expected (..., 4): x0, y0, x1, y1")
        return self.apply_coords(boxes.reshape(-1, 2, 2), original_size).reshape(boxes.shape)

    apply_coords_torch, apply_boxes_torch = apply_coords, apply_boxes


def check_scores(iou: Float[np.ndarray, "..."]) -> None:
    """Raises NonFiniteError for predicted IoUs that are NaN or infinite."""
    if not np.isfinite(iou).all():
        raise NonFiniteError(
            "the model predicts IoUs that are NaN or infinite: its weights are damaged, or too "
            "large for the dtype; check the checkpoint, or try float32"
        )
