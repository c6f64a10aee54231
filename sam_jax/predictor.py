"""`SamPredictor`: one picture, many prompts. The surface is that of Meta's `SamPredictor`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from sam_jax.image import ImageInput, load_image
from sam_jax.models.sam import Sam, decode, encode_image, pad_prompts
from sam_jax.ops.prompts import PADDING, join_prompts
from sam_jax.processing import (
    SamProcessor,
    check_boxes,
    check_embedding,
    check_model,
    check_points,
    check_sizes,
    to_numbers,
)


class SamPredictor:
    """Computes a picture's embedding once, then answers prompts for it quickly.

    Points and boxes are in pixels of the picture. Compiled programs are shared by all predictors of
    models of the same shape. Pictures of another size need another only for making masks of their
    size, which is quickly compiled, and the same up to the next of 256, 384, 512, 768, ... pixels.

    Args:
        model: its parameters are taken as they are now; make a new predictor after changing them.

    Raises:
        TypeError: for what is no `Sam`, such as a model's name.
    """

    def __init__(self, model: Sam):
        check_model(model)
        self.config = model.config
        self.processor = SamProcessor(model.config)
        # The state that `split` gives shares its variables with the model; a copy of the tree (not
        # of the arrays) is this predictor's own.
        self._graphdef, params = nnx.split(model)
        self._params = jax.tree.map(lambda array: array, params)
        (self._device, *_) = jax.tree.leaves(params)[0].devices()
        self._dtype = model.mask_decoder.dtype
        self.reset_image()

    def set_image(self, image: ImageInput, image_format: str = "RGB") -> None:
        """Computes the embedding of a picture, which the following predictions are for.

        Args:
            image: a uint8 array [h, w, 3], or anything else that `load_image` takes.
            image_format: "RGB" or "BGR", the order of an array's channels.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load_image`; and for another format.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}, expected 'RGB' or 'BGR'")
        array = load_image(image)
        # Pictures of PIL and files say themselves what their channels are.
        if image_format == "BGR" and hasattr(image, "shape"):
            array = np.ascontiguousarray(array[..., ::-1])
        pixels = self.processor.preprocess(array)[None]
        self._set_features(encode_image(self._graphdef, self._params, pixels))
        self.original_size = array.shape[:2]

    def get_image_embedding(self) -> Float[np.ndarray, "1 c g g"]:
        """The current picture's embedding, channels first as Meta's, float32.

        Save it (with `original_size`) by `np.save` and give it to `set_image_embedding` later.

        Raises:
            RuntimeError: before a picture is set.
        """
        self._check_image()
        return np.ascontiguousarray(np.moveaxis(np.asarray(self._features, np.float32), -1, 1))

    def set_image_embedding(self, embedding: Any, original_size: Any) -> None:
        """Sets a picture by its embedding instead of computing it.

        Args:
            embedding: [1, c, g, g] of `get_image_embedding`, of the same model.
            original_size: (h, w) of the picture.

        Raises:
            ValueError: for an embedding of another shape or with numbers that are not finite, and
                for what is no size.
        """
        embedding = check_embedding(embedding, self.config)
        (size,) = check_sizes([original_size], 1, "original_size")
        self._set_features(embedding[None].astype(self._dtype))
        self.original_size = size

    def _set_features(self, features: Any) -> None:
        # Wherever they come from, of one kind, for which `decode` is compiled once.
        self._features = jax.device_put(features, self._device)

    def reset_image(self) -> None:
        """Forgets the current picture."""
        self._features = None
        self.original_size = None

    @property
    def is_image_set(self) -> bool:
        """Whether there is a picture to predict for."""
        return self._features is not None

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the current picture as the model sees it.

        Raises:
            RuntimeError: before a picture is set.
        """
        self._check_image()
        return self.processor.input_size(self.original_size)

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt.

        Args:
            point_coords: [n, 2], x and y of each point.
            point_labels: [n], 1 foreground, 0 background; required with points.
            box: [4], x0, y0, x1, y1.
            mask_input: [1, 256, 256] low-resolution logits, such as the third result of an earlier
                prediction.
            multimask_output: three masks, best for an ambiguous prompt such as a single point, or
                the one mask for an unambiguous prompt.
            return_logits: float32 logits instead of booleans.
            hq_token_only: of a SAM-HQ, its own mask alone instead of its sum with SAM's.

        Returns:
            masks [m, h, w] of the picture's size, predicted IoUs [m] and low-resolution logits
            [m, 256, 256], all numpy.

        Raises:
            RuntimeError: before a picture is set.
            ValueError: for a prompt that cannot be used.
        """
        if box is not None:
            box = to_numbers(box, "box")
            if box.shape not in ((4,), (1, 4)):
                raise ValueError(
                    f"box has shape {box.shape}, expected (4,): x0, y0, x1, y1; "
                    "predict_batch takes several boxes"
                )
            box = box.reshape(1, 4)
        masks, scores, low_res = self.predict_batch(
            None if point_coords is None else [point_coords],
            None if point_labels is None else [point_labels],
            box,
            None if mask_input is None else to_numbers(mask_input, "mask_input")[None],
            multimask_output,
            return_logits,
            hq_token_only,
        )
        return masks[0], scores[0], low_res[0]

    def predict_batch(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        boxes: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for b prompts in one compiled call.

        Args:
            point_coords: [b, n, 2] or b lists of different lengths; x and y of each point.
            point_labels: [b, n] or b lists; required with points.
            boxes: [b, 4], x0, y0, x1, y1, one for each prompt.
            mask_input: [b, 1, 256, 256] low-resolution logits, or [1, 1, 256, 256] for all.
            multimask_output: see `predict`.
            return_logits: see `predict`.
            hq_token_only: see `predict`.

        Returns:
            masks [b, m, h, w] of the picture's size, predicted IoUs [b, m] and low-resolution
            logits [b, m, 256, 256], all numpy.

        Raises:
            RuntimeError, ValueError: see `predict`.
        """
        prompts = point_coords, point_labels, boxes, mask_input
        options = multimask_output, return_logits, hq_token_only
        return self._predict(prompts, self._to_input, *options)

    def predict_torch(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        boxes: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        hq_token_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`predict_batch` with coordinates in pixels of the model's input, as Meta's of that name.

        Takes and gives numpy arrays, of the shapes that `predict_batch` names;
        `SamProcessor.scale_coords` makes such coordinates.
        """
        prompts = point_coords, point_labels, boxes, mask_input
        return self._predict(prompts, np.float32, multimask_output, return_logits, hq_token_only)

    def _to_input(self, coords: np.ndarray) -> np.ndarray:
        """From pixels of the picture to pixels of the model's input."""
        return self.processor.scale_coords(coords, self.original_size)

    def _predict(
        self,
        prompts: tuple,
        to_input: Callable,
        multimask_output: bool,
        return_logits: bool,
        hq_token_only: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_image()
        points, labels, masks = self._prompts(*prompts, to_input)
        count = len(labels)
        points, labels, masks = pad_prompts(
            points[None], labels[None], None if masks is None else masks[None]
        )
        low_res, scores = decode(
            self._graphdef,
            self._params,
            self._features,
            points,
            labels,
            masks,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
        )
        # Copies, which may be written to and hold no padding in memory.
        low_res, scores = (np.array(np.asarray(x)[0, :count]) for x in (low_res, scores))
        flat = low_res.reshape(-1, *low_res.shape[-2:])
        threshold = None if return_logits else self.config.mask_threshold
        full = self.processor.resize_masks(
            flat, self.original_size, self.input_size, threshold, self._device
        )
        return full.reshape(*low_res.shape[:2], *self.original_size), scores, low_res

    def _prompts(self, point_coords, point_labels, boxes, mask_input, to_input):
        """The prompts as labelled points [b, n, 2], [b, n], and masks [b, side, side] or None.

        The masks may be one for all.
        """
        if (point_coords is None) != (point_labels is None):
            given, missing = "point_coords", "point_labels"
            if point_coords is None:
                given, missing = missing, given
            raise ValueError(f"{given} are given without {missing}")
        given = {
            "point_coords": point_coords,
            "point_labels": point_labels,
            "boxes": boxes,
            "mask_input": mask_input,
        }
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if not hasattr(value, "__len__"):
                raise ValueError(f"{name} is {value!r}, expected an entry for each prompt")
        counts = {name: len(value) for name, value in given.items()}
        if len(counts) > 1 and counts.get("mask_input") == 1:
            del counts["mask_input"]  # one for all
        if len(set(counts.values())) > 1:
            raise ValueError(f"there must be as many of each prompt, but there are {counts}")
        count = next(iter(counts.values()), 1)
        if count == 0:
            raise ValueError(f"there are no prompts: {', '.join(counts)} are empty")

        coords = labels = None
        if point_coords is not None:
            # Iterating over a JAX array would compile a slice for each shape.
            lists = [
                np.asarray(x) if hasattr(x, "__array__") else x
                for x in (point_coords, point_labels)
            ]
            checked = [check_points(c, k, "point_coords") for c, k in zip(*lists, strict=True)]
            length = max(len(c) for c, _ in checked)
            coords = np.zeros((count, length, 2), np.float32)
            labels = np.full((count, length), PADDING, np.int32)
            for i, (c, k) in enumerate(checked):
                coords[i, : len(c)] = to_input(c)
                labels[i, : len(k)] = k
        if boxes is not None:
            corners = check_boxes(boxes, "boxes").reshape(count, 2, 2)
            boxes = to_input(corners).reshape(count, 4)
        masks = None
        if mask_input is not None:
            side = self.config.mask_size
            masks = to_numbers(mask_input, "mask_input").astype(np.float32)
            if masks.shape[1:] != (1, side, side):
                raise ValueError(
                    f"mask_input has shape {masks.shape[1:]}, expected (1, {side}, {side}): "
                    "low-resolution logits of an earlier prediction, not a mask of the picture's "
                    "size"
                )
            masks = masks[:, 0]
            if not np.isfinite(masks).all():
                raise ValueError("mask_input holds logits that are not finite")
        if coords is None and boxes is None:  # a mask alone, or no prompt at all
            coords = np.zeros((count, 1, 2), np.float32)
            return coords, np.full((count, 1), PADDING, np.int32), masks
        return *join_prompts(coords, labels, boxes), masks

    def _check_image(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("no picture is set; call set_image (or set_image_embedding) first")
