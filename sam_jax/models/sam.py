"""The whole model: image encoder, prompt encoder and mask decoder joined.

Two ways in:

* **Functional**, for research. `graphdef, params, buffers = nnx.split(model, nnx.Param, ...)` gives
  the trained parameters as a tree, apart from the buffers, which have no gradient; inside your own
  `jax.jit`, `jax.grad` or `jax.vmap`, `nnx.merge(graphdef, params, buffers)` gives the model back,
  whose `encode_image` and `decode` are pure functions of arrays.
* **Hugging Face's surface**, `model(**inputs)` with what `SamProcessor` returns. It is compiled,
  and prompts in numpy arrays are padded to a few sizes, so that it seldom compiles again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sam_jax.arrays import as_array
from sam_jax.config import SamConfig, ViTConfig
from sam_jax.idioms import WithAdvice, unknown_attribute, with_advice
from sam_jax.models.mask_decoder import MaskDecoder
from sam_jax.models.prompt_encoder import PromptEncoder
from sam_jax.models.tiny_vit import TinyViT
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.attention import Implementation, check_implementation
from sam_jax.ops.prompts import (
    MASK_HINT,
    PADDING,
    check_joined,
    check_logits,
    check_values,
    concrete,
    count_bucket,
    join_prompts,
    pad_axis,
    warn_outside,
)

JOIN_HINT = "join_prompts(points, labels, boxes) of sam_jax.ops.prompts makes points and labels"


class SamImageSegmentationOutput(NamedTuple):
    """What `Sam.__call__` returns; B images, P prompts each, m = 3 masks (or 1) each.

    `iou_scores` [B, P, m] are predicted IoUs, `pred_masks` [B, P, m, 256, 256] low-resolution
    logits, both float32. `SamProcessor.post_process_masks` makes full-size masks of them.
    """

    iou_scores: Array
    pred_masks: Array

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


class Sam(WithAdvice, nnx.Module):
    """Segment Anything.

    Args:
        config: sizes of every part.
        dtype: of the computation, float32, bfloat16 or float16. New parameters are float32 in any
            case; norms, softmax, positional encodings and mask logits are computed in float32.
        attention: how the ViT's attention is computed; None chooses by platform
            (`sam_jax.ops.attention`). TinyViT has no choice.
        rngs: for the initial parameters.
    """

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"dtype is {jnp.dtype(dtype)}, expected float32, bfloat16 or float16")
        check_implementation(attention)
        # Initializers give the widest floats that JAX is set to.
        with jax.enable_x64(False):
            if isinstance(config.image_encoder, ViTConfig):
                self.image_encoder = ImageEncoderViT(
                    config, dtype=dtype, attention=attention, rngs=rngs
                )
            elif attention is not None:
                raise ValueError(
                    f"attention is {attention!r}, but TinyViT (MobileSAM) computes its attention "
                    "in one way only; leave it out"
                )
            else:
                self.image_encoder = TinyViT(config, dtype=dtype, rngs=rngs)
            self.prompt_encoder = PromptEncoder(config, dtype=dtype, rngs=rngs)
            self.mask_decoder = MaskDecoder(config, dtype=dtype, rngs=rngs)
        self.config = config

    image_format = "RGB"

    @property
    def mask_threshold(self) -> float:
        """The logit above which a pixel belongs to a mask."""
        return self.config.mask_threshold

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return jnp.dtype(self.mask_decoder.dtype)

    @property
    def device(self) -> Any:
        """Where the parameters are: a device of JAX, or their sharding over several."""
        return self.mask_decoder.iou_token[...].device

    def encode_image(
        self,
        pixel_values: Float[Array, "b h w rgb"],
        *,
        remat: bool = False,
        drop_path_rate: float = 0.0,
        keys: Array | None = None,
    ) -> Float[Array, "b grid grid c"]:
        """Image embeddings of normalised, padded pixels [b, size, size, 3], channels last.

        Args:
            pixel_values: channels last.
            remat: to train with less memory: activations within blocks are computed again in the
                backward pass.
            drop_path_rate: to train a ViT with stochastic depth, the last block's rate (the paper's
                is 0.4, for ViT-H); earlier blocks have less, in proportion.
            keys: for it, [b] of `jax.random`, one for each image.

        Raises:
            TypeError, ValueError: for what is no array of that shape, and for a `drop_path_rate`
                of no ViT or without keys.
        """
        size = self.config.image_size
        pixel_values = _check_shape("pixel_values", pixel_values, (None, size, size, 3))
        if drop_path_rate == 0:
            return self.image_encoder(pixel_values, remat=remat)
        if not isinstance(self.config.image_encoder, ViTConfig) or keys is None:
            raise ValueError(
                f"drop_path_rate is {drop_path_rate}, which needs a ViT encoder and keys"
            )
        return self.image_encoder(
            pixel_values, remat=remat, drop_path_rate=drop_path_rate, keys=keys
        )

    def decode(
        self,
        image_embeddings: Float[Array, "b g g c"],
        points: Float[Array, "b p n 2"],
        labels: Int[Array, "b p n"],
        masks: Float[Array, "b #p 4*g 4*g"] | None = None,
        multimask_output: bool | None = True,
        attention_similarity: Float[Array, "b p #heads #t g*g"] | None = None,
        target_embedding: Float[Array, "b p #t c"] | None = None,
        *,
        hq_token_only: bool = False,
        prompts_at_once: int | None = None,
        platform: str | None = None,
    ) -> tuple[Float[Array, "b p m 4*g 4*g"], Float[Array, "b p m"]]:
        """Mask logits and predicted IoUs of every prompt of every image, both float32.

        Prompt encoder and mask decoder are written for one prompt of one image; this maps them over
        prompts, then over images. What depends on the image alone is computed once per image.

        Args:
            image_embeddings: of `encode_image`.
            points: (x, y) in pixels of the model's padded input.
            labels: of the points; see `sam_jax.models.prompt_encoder`. Boxes are two points each,
                and a list without a box ends with a point labelled -1: `join_prompts` makes such
                lists. Points labelled -10 are padding and change nothing.
            masks: low-resolution logits, one per image or one per prompt.
            multimask_output: three masks per prompt, or one; None for all four, the one first.
            attention_similarity: added to the token-to-image logits (PerSAM).
            target_embedding: added to the tokens before each block (PerSAM).
            hq_token_only: of a SAM-HQ, its own mask alone instead of its sum with SAM's.
            prompts_at_once: how many prompts of each image are computed together, for less memory.
                None: one of one image on a CPU, whose cache it fits; else up to 64 (on an NVIDIA
                GPU 0.4 GB in bfloat16), fewer where those of all images would take more than a
                quarter of a device's memory.
            platform: where it will run ("cpu", "cuda", ...), if not on JAX's default backend.

        Raises:
            TypeError: for anything but arrays, and for dtypes of something else.
            ValueError: for shapes that do not fit, for `hq_token_only` of another model than a
                SAM-HQ, and for `prompts_at_once` below 1; and, unless they are traced, for values
                that `join_prompts` would not give, and masks that are no logits.
        """
        grid, channels = self.config.image_embedding_size, self.config.image_embedding_channels
        image_embeddings = _check_shape(
            "image_embeddings", image_embeddings, (None, grid, grid, channels)
        )
        points, labels, masks, attention_similarity, target_embedding = self._check_joined(
            image_embeddings.shape[0],
            points,
            labels,
            masks,
            attention_similarity,
            target_embedding,
        )
        image_pe = self.prompt_encoder.get_dense_pe()

        def one_prompt(image_features, points, labels, mask, similarity, target):
            image_embedding, hq_features = image_features
            sparse, sparse_mask = self.prompt_encoder(points, labels)
            dense = self.prompt_encoder.embed_mask(mask)
            return self.mask_decoder(
                image_embedding,
                image_pe,
                sparse,
                sparse_mask,
                dense,
                multimask_output,
                similarity,
                target,
                hq_features,
                hq_token_only,
                image_is_shared,
            )

        if hq_token_only and not self.config.hq:
            raise ValueError("hq_token_only is True, but the model is not a SAM-HQ")
        if prompts_at_once is not None and prompts_at_once < 1:
            raise ValueError(f"prompts_at_once is {prompts_at_once}, expected at least 1, or None")
        mask_per_prompt = masks is not None and masks.shape[1] == points.shape[1]
        if masks is not None and not mask_per_prompt:
            masks = masks[:, 0]
        # From three prompts on it is less work to share; in `jax.export` their number may be open.
        prompts = points.shape[1]
        image_is_shared = not mask_per_prompt and (not isinstance(prompts, int) or prompts > 2)
        images_at_once = None
        if prompts_at_once is None:
            if (platform or jax.default_backend()) == "cpu":
                prompts_at_once = images_at_once = 1  # what fits the cache
            elif all(isinstance(size, int) for size in points.shape[:2]):  # not in `jax.export`
                prompts_at_once = 64 if platform else self._fitting_prompts(points.shape[0])

        def one_image(x):
            image_embedding, shared_mask, prompts = x
            image_features = self.mask_decoder.image_features(image_embedding)

            def one(prompt):
                points, labels, mask, similarity, target = prompt
                mask = mask if mask_per_prompt else shared_mask
                return one_prompt(image_features, points, labels, mask, similarity, target)

            return _map(one, prompts, prompts_at_once)

        shared_masks = None if mask_per_prompt else masks
        own_masks = masks if mask_per_prompt else None
        prompts = points, labels, own_masks, attention_similarity, target_embedding
        images = image_embeddings, shared_masks, prompts
        return _map(one_image, images, images_at_once)

    @with_advice
    def __call__(
        self,
        pixel_values: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        image_embeddings: Any = None,
        multimask_output: bool = True,
        attention_similarity: Any = None,
        target_embedding: Any = None,
        hq_token_only: bool = False,
        original_sizes: Any = None,
        reshaped_input_sizes: Any = None,
        labels: Any = None,
    ) -> SamImageSegmentationOutput:
        """The masks that the prompts ask for: Hugging Face's `SamModel.forward`.

        Arguments and outputs are those of `transformers`, but `pixel_values` are channels last,
        masks may be given per prompt, and points labelled -10 are ignored exactly. Arrays may be of
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
            hq_token_only: of a SAM-HQ, its own mask alone instead of its sum with SAM's.
            original_sizes: not used, nor are the following: they let `model(**inputs)` pass on all
                that the processor returns, whose prompts it has checked. Without them, prompts
                outside the model's input are warned of.
            reshaped_input_sizes: not used.
            labels: not used.

        Prompts in numpy arrays are padded to a power of two in number and in length, and so compile
        once per such size; JAX arrays are taken as they are, and so are prompts with PerSAM's two.

        A call walks the module, which takes some 10 ms; in a loop call `encode_image` and `decode`
        of this file with the parts of one `nnx.split`, or use `SamPredictor`.

        Raises:
            TypeError: for what is no array.
            ValueError: for shapes that do not fit; and, unless they are traced, for coordinates
                that are not finite, unknown labels, and boxes inside out. The message says which.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("give either pixel_values or image_embeddings, and not both")
        grid, channels = self.config.image_embedding_size, self.config.image_embedding_channels
        if pixel_values is not None:
            pixel_values = self._check_pixels(pixel_values)
        else:
            shape = None, channels, grid, grid
            image_embeddings = _check_shape("image_embeddings", image_embeddings, shape)
        input_points, input_labels, input_boxes, input_masks = self._check_prompts(
            input_points, input_labels, input_boxes, input_masks
        )
        if reshaped_input_sizes is None:
            self._warn_outside(input_points, input_labels, input_boxes)
        graphdef, params = nnx.split(self)
        if image_embeddings is None:
            image_embeddings = encode_image(graphdef, params, _to_device(pixel_values))
        else:
            image_embeddings = jnp.moveaxis(_to_device(image_embeddings), 1, -1)
        batch = image_embeddings.shape[0]
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

        points, point_labels, input_masks = map(_to_device, (points, point_labels, input_masks))
        masks, scores = decode(
            graphdef,
            params,
            image_embeddings,
            points,
            point_labels,
            input_masks,
            attention_similarity,
            target_embedding,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
        )
        if masks.shape[1] != count:
            masks, scores = _first_prompts(masks, count), _first_prompts(scores, count)
        return SamImageSegmentationOutput(iou_scores=scores, pred_masks=masks)

    def get_image_embeddings(self, pixel_values: Any) -> Float[Array, "b c g g"]:
        """Image embeddings of [b, size, size, 3] pixels, channels first as in `transformers`.

        Raises:
            TypeError: for what is no array of floats.
            ValueError: for pixels of another shape.
        """
        pixel_values = _to_device(self._check_pixels(pixel_values))
        return jnp.moveaxis(encode_image(*nnx.split(self), pixel_values), -1, 1)

    def get_prompt_embeddings(
        self,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
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
        arrays = map(_to_device, (points, labels, input_masks))
        sparse, dense = encode_prompts(*nnx.split(self), *arrays)
        if input_masks is None and points is not None:
            dense = jnp.broadcast_to(dense, (len(points), *dense.shape[1:]))
        return sparse, dense

    def get_image_wide_positional_embeddings(self) -> Float[Array, "1 c g g"]:
        """The positional encoding of the image embedding's grid, channels first."""
        return encode_positions(*nnx.split(self))

    def _fitting_prompts(self, images: int) -> int:
        """How many prompts of each image are computed together on a GPU or TPU."""
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if not memory:
            return 64
        # XLA's program holds the image features of a prompt three times over, and then its masks.
        features = self.config.image_embedding_size**2 * self.config.prompt_embed_dim
        one = 4 * features * jnp.dtype(self.mask_decoder.dtype).itemsize
        return int(np.clip(memory // 4 // (one * max(images, 1)), 1, 64))

    def _check_pixels(self, pixel_values):
        size = self.config.image_size
        if isinstance(pixel_values, (list, tuple)) and all(
            isinstance(image, dict) for image in pixel_values
        ):
            raise TypeError(
                "pixel_values are a list of dictionaries, as of segment_anything's batched_input; "
                "call model(**processor(images, input_points=..., input_boxes=...)), then "
                "processor.post_process_masks"
            )
        pixel_values = _check_shape("pixel_values", pixel_values, (None, size, size, 3))
        if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
            raise TypeError(
                f"pixel_values are {pixel_values.dtype}, expected floats, normalised as by "
                "SamProcessor"
            )
        return pixel_values

    def _similarity_shape(self, points: int) -> tuple[int, int, int]:
        """Heads, tokens and pixels of a prompt with so many points, a box's corners included."""
        decoder, grid = self.config.mask_decoder, self.config.image_embedding_size
        tokens = 1 + (decoder.num_multimask_outputs + 1) + self.config.hq + points
        return decoder.num_heads, tokens, grid * grid

    def _broadcast_guidance(self, similarity, target, prompts: tuple[int, ...]):
        """PerSAM's two arguments as `decode` takes them, for labels of the shape `prompts`."""
        batch, count, n = prompts
        heads, tokens, pixels = self._similarity_shape(n)
        if similarity is not None:
            full = (batch * count, heads, tokens, pixels)
            similarity = _check_broadcast("attention_similarity", similarity, full)
            shape = (*full[:1], *similarity.shape[1:3], *full[3:])
            similarity = jnp.broadcast_to(similarity, shape).reshape(batch, count, *shape[1:])
        if target is not None:
            full = (batch, count, tokens, self.config.prompt_embed_dim)
            target = _check_broadcast("target_embedding", target, full)
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
        if points is not None:
            _check_shape("input_points", points, (None, None, None, 2))
        if boxes is not None:
            _check_shape("input_boxes", boxes, (None, None, 4))
        if labels is not None:
            if points is None:
                raise ValueError("input_labels are given without input_points")
            _check_shape("input_labels", labels, points.shape[:-1])
        prompts = points if boxes is None else boxes
        if points is not None and boxes is not None and points.shape[:2] != boxes.shape[:2]:
            raise ValueError(
                f"there must be one box per prompt: input_points have shape {points.shape}, "
                f"input_boxes {boxes.shape}"
            )
        if masks is not None:
            shape = None, None, self.config.mask_size, self.config.mask_size
            _check_shape("input_masks", masks, shape, MASK_HINT)
            check_logits(masks, "input_masks")
            if prompts is not None and masks.shape[1] not in (1, prompts.shape[1]):
                raise ValueError(
                    f"input_masks have shape {masks.shape}: expected one mask per image, or one "
                    f"for each of its {prompts.shape[1]} prompts"
                )
        check_values(*(concrete(array) for array in (points, labels, boxes)))
        return points, labels, boxes, masks

    def _check_joined(self, images, points, labels, masks, similarity, target):
        """The arguments of `decode` for so many images as arrays of numpy or JAX."""
        points = _check_shape("points", points, (images, None, None, 2), JOIN_HINT)
        labels = _check_shape("labels", labels, points.shape[:-1], JOIN_HINT)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"labels are {labels.dtype}, expected integers; {JOIN_HINT}")
        if not jnp.isdtype(points.dtype, ("real floating", "integral")):
            raise TypeError(f"points are {points.dtype}, expected floats; {JOIN_HINT}")
        check_joined(concrete(points), concrete(labels))
        prompts, side = points.shape[1], self.config.mask_size
        if masks is not None:
            masks = _check_shape("masks", masks, (images, None, side, side), MASK_HINT)
            check_logits(masks, "masks")
            if masks.shape[1] not in (1, prompts):
                raise ValueError(
                    f"masks have shape {masks.shape}: expected one per image, or one for each of "
                    f"its {prompts} prompts"
                )
        if similarity is not None:
            heads, tokens, pixels = self._similarity_shape(points.shape[2])
            shape = images, prompts, None, None, pixels
            similarity = _check_shape("attention_similarity", similarity, shape)
            shape = images, prompts, heads, tokens, pixels
            similarity = _check_broadcast("attention_similarity", similarity, shape)
        if target is not None:
            _, tokens, _ = self._similarity_shape(points.shape[2])
            shape = images, prompts, None, self.config.prompt_embed_dim
            target = _check_shape("target_embedding", target, shape)
            target = _check_broadcast("target_embedding", target, (*shape[:2], tokens, shape[3]))
        return points, labels, masks, similarity, target

    def _warn_outside(self, points, labels, boxes):
        points, labels, boxes = (concrete(array) for array in (points, labels, boxes))
        size, frame = (self.config.image_size,) * 2, "model's input (SamProcessor scales them)"
        warn_outside(points, labels, None, size, "input_points", frame)
        warn_outside(None, None, boxes, size, "input_boxes", frame)


def _map(function: Callable, arrays: PyTree, at_once: int | None) -> PyTree:
    """`function` of each entry of the arrays, so many at a time, or all."""
    if at_once is None or (at_once > 1 and at_once >= jax.tree.leaves(arrays)[0].shape[0]):
        return jax.vmap(function)(arrays)
    # One at a time there is no batch axis, with which a CPU multiplies matrices more slowly.
    return jax.lax.map(function, arrays, batch_size=None if at_once == 1 else at_once)


def _check_shape(
    name: str, array: Any, expected: tuple[Any, ...], hint: str = ""
) -> np.ndarray | Array:
    """The array as numpy's or JAX's, if it has the shape; None is any size."""
    array = as_array(array, name)

    def fits(shape):
        return len(shape) == len(expected) and all(
            e is None or e == a for a, e in zip(shape, expected, strict=True)
        )

    shape = tuple(array.shape)
    if not fits(shape):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        if len(shape) == 4 and fits((shape[0], *shape[2:], shape[1])):
            hint = "they are channels first: use np.moveaxis(array, 1, -1)"
        elif len(shape) == 4 and fits((shape[0], shape[3], *shape[1:3])):
            hint = "they are channels last: use np.moveaxis(array, -1, 1)"
        elif fits((1, *shape)):
            hint = "one alone is array[None]"
        raise ValueError(
            f"{name} have shape {shape}, expected ({wanted}){f'; {hint}' if hint else ''}"
        )
    return array


def _to_device(array: Any) -> Any:
    """numpy's arrays on JAX's default device: explicitly, as `jax.transfer_guard` asks for."""
    return jax.device_put(array) if isinstance(array, np.ndarray) else array


def _check_broadcast(name: str, array: Any, shape: tuple[int, ...]) -> Array:
    """The array with leading axes of one up to the number of `shape`, which it broadcasts to."""
    array = _to_device(as_array(array, name))
    full = (1,) * (len(shape) - array.ndim) + array.shape
    if len(full) != len(shape) or any(a not in (1, n) for a, n in zip(full, shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, expected one that broadcasts to {shape}")
    return array.reshape(full)


def _first_prompts(array: Array, count: int) -> Array:
    """Without the padding prompts at the end."""
    if isinstance(array, jax.core.Tracer):
        return array[:, :count]
    # By way of the host: a slice on the device would be a new program for each count.
    return jax.device_put(jax.device_get(array)[:, :count], array.sharding)


def pad_prompts(
    points: Float[Any, "b p n 2"],
    labels: Int[Any, "b p n"],
    masks: Float[Any, "b m side side"] | None,
) -> tuple[Any, Any, Any]:
    """Prompts padded to the next power of two in number (axis 1) and in length (axis 2).

    Padding points have label -10 and so change nothing; padding prompts are to be dropped from the
    result.
    """
    length = count_bucket(points.shape[2])
    count = count_bucket(points.shape[1])
    points = pad_axis(pad_axis(points, length, 2, 0), count, 1, 0)
    labels = pad_axis(pad_axis(labels, length, 2, PADDING), count, 1, PADDING)
    if masks is not None and masks.shape[1] > 1:
        masks = pad_axis(masks, count, 1, 0)
    return points, labels, masks


@jax.jit
def encode_image(
    graphdef: nnx.GraphDef, params: PyTree, pixel_values: Float[Array, "b h w rgb"]
) -> Float[Array, "b g g c"]:
    """`Sam.encode_image` of `nnx.merge(graphdef, params)`, compiled."""
    return nnx.merge(graphdef, params).encode_image(pixel_values)


@jax.jit
def encode_prompts(
    graphdef: nnx.GraphDef,
    params: PyTree,
    points: Float[Array, "b p n 2"] | None,
    labels: Int[Array, "b p n"] | None,
    masks: Float[Array, "b m side side"] | None,
) -> tuple[Float[Array, "b p n c"] | None, Float[Array, "_ c g g"]]:
    """The prompt encoder of `nnx.merge(graphdef, params)` over all prompts, compiled.

    Takes what `join_prompts` gives. The sparse embeddings are None without points; the dense ones
    are channels first, one for each mask [b * m, c, g, g], or without masks [1, c, g, g].
    """
    encoder = nnx.merge(graphdef, params).prompt_encoder
    sparse = None
    if points is not None:
        sparse, _ = jax.vmap(jax.vmap(encoder))(points, labels)
    if masks is None:
        dense = encoder.embed_mask(None)[:, None, None]
        return sparse, jnp.broadcast_to(dense, (1, len(dense), encoder.grid, encoder.grid))
    dense = jax.vmap(encoder.embed_mask)(masks.reshape(-1, *masks.shape[2:]))
    return sparse, jnp.moveaxis(dense, -1, 1)


@jax.jit
def encode_positions(graphdef: nnx.GraphDef, params: PyTree) -> Float[Array, "1 c g g"]:
    """The positional encoding of the image embedding's grid, channels first, compiled."""
    positions = nnx.merge(graphdef, params).prompt_encoder.get_dense_pe()
    return jnp.moveaxis(positions, -1, 0)[None]


@functools.partial(jax.jit, static_argnames=("multimask_output", "hq_token_only"))
def decode(
    graphdef: nnx.GraphDef,
    params: PyTree,
    image_embeddings: Float[Array, "b g g c"],
    points: Float[Array, "b p n 2"],
    labels: Int[Array, "b p n"],
    masks: Float[Array, "b #p 4*g 4*g"] | None,
    attention_similarity: Float[Array, "b p #heads #t g*g"] | None = None,
    target_embedding: Float[Array, "b p #t c"] | None = None,
    *,
    multimask_output: bool,
    hq_token_only: bool = False,
) -> tuple[Float[Array, "b p m 4*g 4*g"], Float[Array, "b p m"]]:
    """`Sam.decode` of `nnx.merge(graphdef, params)`, compiled."""
    return nnx.merge(graphdef, params).decode(
        image_embeddings,
        points,
        labels,
        masks,
        multimask_output,
        attention_similarity,
        target_embedding,
        hq_token_only=hq_token_only,
    )
