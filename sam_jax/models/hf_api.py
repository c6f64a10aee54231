"""Hugging Face's API of the model: `model(**inputs)` with what `SamProcessor` returns."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from sam_jax.arrays import AnyArray, as_array, on_accelerator
from sam_jax.config import SamConfig
from sam_jax.idioms import WithAdvice, unknown_attribute, with_advice
from sam_jax.models.checks import (
    check_broadcast,
    check_multimask,
    check_pixels,
    check_shape,
    guidance_shape,
    to_device,
)
from sam_jax.models.compiled import (
    chunk_size_for,
    decode,
    encode_image,
    encode_positions,
    encode_prompts,
)
from sam_jax.ops.prompts import (
    MASK_HINT,
    PADDING,
    check_logits,
    check_values,
    concrete,
    is_numeric,
    join_prompts,
    pad_prompts,
    warn_outside,
)


class SamImageSegmentationOutput(NamedTuple):
    """What `Sam.__call__` returns; B images, P prompts each, m = 3 masks (or 1) each.

    `SamProcessor.post_process_masks` makes full-size masks of it.
    """

    iou_scores: Array
    """Predicted IoUs [B, P, m], float32."""
    pred_masks: Array
    """Low-resolution mask logits [B, P, m, 256, 256], float32."""

    def __getitem__(self, key):
        return self._asdict()[key] if isinstance(key, str) else tuple.__getitem__(self, key)

    def __contains__(self, key):
        return isinstance(key, str) and key in self._fields

    def keys(self):
        """The names, as of a dictionary."""
        return self._asdict().keys()

    def values(self):
        """The arrays, likewise."""
        return self._asdict().values()

    def items(self):
        """The names with their arrays, likewise."""
        return self._asdict().items()

    def get(self, key: str, default: Any = None):
        """The array of a name, likewise."""
        return self._asdict().get(key, default)

    def __getattr__(self, name: str):
        raise unknown_attribute(self, name)


class HuggingFaceAPI(WithAdvice):
    """The methods of `transformers.SamModel`, of a `Sam`; they are compiled.

    Prompts in numpy arrays are padded to a few sizes, so that they seldom compile again.
    """

    config: SamConfig

    @with_advice
    def __call__(
        self,
        pixel_values: AnyArray | None = None,
        input_points: AnyArray | None = None,
        input_labels: AnyArray | None = None,
        input_boxes: AnyArray | None = None,
        input_masks: AnyArray | None = None,
        image_embeddings: AnyArray | None = None,
        multimask_output: bool = True,
        attention_similarity: AnyArray | None = None,
        target_embedding: AnyArray | None = None,
        hq_token_only: bool = False,
        original_sizes: AnyArray | None = None,
        reshaped_input_sizes: AnyArray | None = None,
        labels: AnyArray | None = None,
    ) -> SamImageSegmentationOutput:
        """The masks that the prompts ask for: Hugging Face's `SamModel.forward`.

        Arguments and outputs are those of `transformers`, but `pixel_values` are channels last,
        masks may be given per prompt, and points labeled -10 are ignored exactly. Arrays may be of
        any library that has `__array__` or DLPack.

        Args:
            pixel_values: [b, size, size, 3], of `SamProcessor`, channels last. Give these or
                `image_embeddings`.
            input_points: [b, p, n, 2], (x, y) in pixels of the model's input, as `SamProcessor`
                scales them.
            input_labels: [b, p, n], 1 foreground, 0 background, -1 not a point, -10 padding;
                foreground if left out.
            input_boxes: [b, p, 4], (x0, y0, x1, y1), one per prompt.
            input_masks: [b, 1, 256, 256] or [b, p, 256, 256] low-resolution logits, one per image
                or one per prompt.
            image_embeddings: [b, c, g, g], of `get_image_embeddings`, channels first.
            multimask_output: three masks per prompt, or one.
            attention_similarity: broadcasts to [b * p, heads, tokens, g * g]; the tokens are the
                IoU token, the mask tokens, the points, and two for a box or one for none.
            target_embedding: broadcasts to [b, p, tokens, c].
            hq_token_only: for a SAM-HQ, its own mask instead of its sum with SAM's.
            original_sizes: not used, nor are the following: they let `model(**inputs)` pass on all
                that the processor returns, whose prompts it has checked. Without them, prompts
                outside the model's input are warned of.
            reshaped_input_sizes: not used.
            labels: not used.

        Prompts in numpy arrays are padded to a power of two in number and in length, and so compile
        once per such size; JAX arrays are taken as they are, and so are prompts with PerSAM's two.

        A call walks the module, which takes some 10 ms; in a loop use `SamPredictor`, or `jax.jit`
        a function of your own that calls `encode_image` and `decode`.

        Raises:
            TypeError: if an argument is not an array.
            ValueError: for shapes that do not fit; and, unless they are traced, for coordinates
                that are not finite, unknown labels, and boxes inside out. The message says which.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("give either pixel_values or image_embeddings, and not both")
        check_multimask(multimask_output)
        grid, channels = self.config.image_embedding_size, self.config.image_embedding_channels
        if pixel_values is not None:
            pixel_values = self._check_pixels(pixel_values)
        else:
            shape = None, channels, grid, grid
            image_embeddings = check_shape("image_embeddings", image_embeddings, shape)
        input_points, input_labels, input_boxes, input_masks = self._check_prompts(
            input_points, input_labels, input_boxes, input_masks
        )
        if reshaped_input_sizes is None:
            self._warn_outside(input_points, input_labels, input_boxes)
        graphdef, params = nnx.split(self)
        embeddings: Array
        if image_embeddings is None:
            embeddings = encode_image(graphdef, params, pixel_values)
        else:
            embeddings = jnp.moveaxis(to_device(image_embeddings), 1, -1)
        batch = embeddings.shape[0]
        if input_points is not None or input_boxes is not None:
            points, point_labels = join_prompts(input_points, input_labels, input_boxes)
        else:  # no prompt but perhaps a mask: one padding token
            count = 1 if input_masks is None else input_masks.shape[1]
            points = np.zeros((batch, count, 1, 2), np.float32)
            point_labels = np.full((batch, count, 1), PADDING, np.int32)
        for prompts in (points, input_masks):
            if prompts is not None and len(prompts) != batch:
                raise ValueError(f"there are {batch} images, but prompts for {len(prompts)}")

        count = points.shape[1]
        if attention_similarity is not None or target_embedding is not None:
            attention_similarity, target_embedding = self._broadcast_guidance(
                attention_similarity, target_embedding, point_labels.shape
            )
        elif not isinstance(points, jax.Array):
            points, point_labels, input_masks = pad_prompts(points, point_labels, input_masks)

        points, point_labels, input_masks = map(to_device, (points, point_labels, input_masks))
        masks, scores = decode(
            graphdef,
            params,
            embeddings,
            points,
            point_labels,
            input_masks,
            attention_similarity,
            target_embedding,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
            prompts_chunk_size=chunk_size_for(embeddings, point_labels.shape[1]),
        )
        if masks.shape[1] != count:
            masks, scores = first_prompts(masks, count), first_prompts(scores, count)
        return SamImageSegmentationOutput(iou_scores=scores, pred_masks=masks)

    def get_image_embeddings(self, pixel_values: AnyArray) -> Float[Array, "b c g g"]:
        """Image embeddings of [b, size, size, 3] pixels, channels first as in `transformers`.

        Raises:
            TypeError: if they are not an array of floats.
            ValueError: for pixels of another shape.
        """
        pixel_values = self._check_pixels(pixel_values)
        return jnp.moveaxis(encode_image(*nnx.split(self), pixel_values), -1, 1)

    def get_prompt_embeddings(
        self,
        input_points: AnyArray | None = None,
        input_labels: AnyArray | None = None,
        input_boxes: AnyArray | None = None,
        input_masks: AnyArray | None = None,
    ) -> tuple[Float[Array, "b p t c"] | None, Float[Array, "_ c g g"]]:
        """The prompt encoder's sparse and dense embeddings, shaped as in `transformers`.

        Takes prompts as `__call__` does, and compiles for each of their shapes. The sparse ones are
        None when there is neither point nor box. The dense ones are channels first: those of the
        masks [b * m, c, g, g], or without masks the same for every image.

        Raises:
            TypeError, ValueError: as `__call__` for prompts.
        """
        input_points, input_labels, input_boxes, input_masks = self._check_prompts(
            input_points, input_labels, input_boxes, input_masks
        )
        points = labels = None
        if input_points is not None or input_boxes is not None:
            points, labels = join_prompts(input_points, input_labels, input_boxes)
        arrays = map(to_device, (points, labels, input_masks))
        sparse, dense = encode_prompts(*nnx.split(self), *arrays)
        if input_masks is None and points is not None:
            dense = jnp.broadcast_to(dense, (len(points), *dense.shape[1:]))
        return sparse, dense

    def get_image_wide_positional_embeddings(self) -> Float[Array, "1 c g g"]:
        """The positional encoding of the image embedding's grid, channels first."""
        return encode_positions(*nnx.split(self))

    def _check_pixels(self, pixel_values):
        if isinstance(pixel_values, (list, tuple)) and any(
            isinstance(image, dict) for image in pixel_values
        ):
            raise TypeError(
                "pixel_values are a list of dictionaries, as of segment_anything's batched_input; "
                "call model(**processor(images, input_points=..., input_boxes=...)), then "
                "processor.post_process_masks"
            )
        return check_pixels(self.config.image_size, pixel_values)

    def _broadcast_guidance(self, similarity, target, prompts: tuple[int, ...]):
        """PerSAM's two arguments as `decode` takes them, for labels of the shape `prompts`."""
        batch, count, n = prompts
        heads, tokens, pixels = guidance_shape(self.config, n)
        if similarity is not None:
            full = (batch * count, heads, tokens, pixels)
            similarity = check_broadcast("attention_similarity", similarity, full)
            shape = (*full[:1], *similarity.shape[1:3], *full[3:])
            similarity = jnp.broadcast_to(similarity, shape).reshape(batch, count, *shape[1:])
        if target is not None:
            full = (batch, count, tokens, self.config.prompt_embed_dim)
            target = check_broadcast("target_embedding", target, full)
            target = jnp.broadcast_to(target, (*full[:2], target.shape[2], full[3]))
        return similarity, target

    def _check_prompts(self, points, labels, boxes, masks):
        """The prompts as arrays of numpy or JAX."""
        points, labels, boxes, masks = (
            None if array is None else as_array(array, name)
            for name, array in (
                ("input_points", points),
                ("input_labels", labels),
                ("input_boxes", boxes),
                ("input_masks", masks),
            )
        )
        for name, array in (("points", points), ("labels", labels), ("boxes", boxes)):
            if array is not None and not is_numeric(array.dtype):
                raise TypeError(f"input_{name} are {array.dtype}, expected numbers")
        if points is not None:
            check_shape("input_points", points, (None, None, None, 2))
        if boxes is not None:
            check_shape("input_boxes", boxes, (None, None, 4))
        if labels is not None:
            if points is None:
                raise ValueError("input_labels are given without input_points")
            check_shape("input_labels", labels, points.shape[:-1])
        prompts = points if boxes is None else boxes
        if points is not None and boxes is not None and points.shape[:2] != boxes.shape[:2]:
            raise ValueError(
                f"there must be one box per prompt: input_points have shape {points.shape}, "
                f"input_boxes {boxes.shape}"
            )
        if masks is not None:
            shape = None, None, self.config.mask_size, self.config.mask_size
            check_shape("input_masks", masks, shape, MASK_HINT)
            check_logits(masks, "input_masks")
            if prompts is not None and masks.shape[1] not in (1, prompts.shape[1]):
                raise ValueError(
                    f"input_masks have shape {masks.shape}: expected one mask per image, or one "
                    f"for each of its {prompts.shape[1]} prompts"
                )
        check_values(concrete(points), concrete(labels), concrete(boxes))
        return points, labels, boxes, masks

    def _warn_outside(self, points, labels, boxes):
        points, labels, boxes = (concrete(array) for array in (points, labels, boxes))
        side, frame = self.config.image_size, "model's input (SamProcessor scales them)"
        warn_outside(points, labels, None, (side, side), "input_points", frame)
        warn_outside(None, None, boxes, (side, side), "input_boxes", frame)


def first_prompts(array: Array, count: int) -> Array:
    """Without the padding prompts at the end; on the device, by a small program for each count."""
    if on_accelerator(array) or isinstance(array, Tracer):
        return _first_columns(array, count)
    # A CPU's memory is the host's, where no program is needed.
    return jax.device_put(jax.device_get(array)[:, :count], array.sharding)


@functools.partial(jax.jit, static_argnums=1)
def _first_columns(array, count):
    return array[:, :count]
