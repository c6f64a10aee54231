"""The whole model: image encoder, prompt encoder and mask decoder joined.

Two ways in:

* **Functional**, for research. The model is a pytree: pass it to your own functions under `jax.jit`
  or `jax.vmap`, and call its `encode_image` and `decode` there, pure functions of arrays. For
  gradients `sam_jax.partition` separates the parameters from the rest.
* **Hugging Face's API**, `model(**inputs)` with what `SamProcessor` returns. It is compiled,
  and prompts in numpy arrays are padded to a few sizes, so that it seldom compiles again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sam_jax.config import SamConfig, ViTConfig
from sam_jax.models.checks import Prompts, check_prompts, check_shape, to_device
from sam_jax.models.compiled import fastest_chunk_size
from sam_jax.models.hf_api import HuggingFaceAPI
from sam_jax.models.mask_decoder import MaskDecoder
from sam_jax.models.prompt_encoder import PromptEncoder
from sam_jax.models.tiny_vit import TinyViT
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.attention import Implementation, check_implementation


class Sam(HuggingFaceAPI, nnx.Module):
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
        pixel_values = check_shape("pixel_values", pixel_values, (None, size, size, 3))
        if drop_path_rate == 0:
            return self.image_encoder(pixel_values, remat=remat)
        if not isinstance(self.image_encoder, ImageEncoderViT) or keys is None:
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
        prompts_chunk_size: int | None = None,
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
            prompts_chunk_size: prompts of each image that are computed together; fewer take less
                memory, and with 1 images are computed one by one, too. None: 1 if the program is
                compiled for a CPU, and elsewhere about 64 prompts of all images together.

        Raises:
            TypeError: for anything but arrays, and for dtypes of something else.
            ValueError: for shapes that do not fit, for `hq_token_only` of another model than a
                SAM-HQ, and for a `prompts_chunk_size` below 1; and, unless traced, for values that
                `join_prompts` would not give, and masks that are no logits.
        """
        if hq_token_only and not self.config.hq:
            raise ValueError("hq_token_only is True, but the model is not a SAM-HQ")
        if prompts_chunk_size is not None and prompts_chunk_size < 1:
            raise ValueError(
                f"prompts_chunk_size is {prompts_chunk_size}, expected at least 1, or None"
            )
        grid, channels = self.config.image_embedding_size, self.config.image_embedding_channels
        image_embeddings = check_shape(
            "image_embeddings", image_embeddings, (None, grid, grid, channels)
        )
        if not jnp.issubdtype(image_embeddings.dtype, jnp.floating):
            raise TypeError(f"image_embeddings are {image_embeddings.dtype}, expected floats")
        image_embeddings = to_device(image_embeddings)
        images = image_embeddings.shape[0]
        prompts = check_prompts(
            self.config, images, points, labels, masks, attention_similarity, target_embedding
        )
        return _decode(
            self,
            image_embeddings,
            prompts,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
            prompts_chunk_size=prompts_chunk_size,
        )

    def _decode_in_chunks(
        self,
        image_embeddings: Float[Array, "b g g c"],
        prompts: Prompts,
        *,
        multimask_output: bool | None,
        hq_token_only: bool,
        prompts_chunk_size: int | None,
    ) -> tuple[Float[Array, "b p m 4*g 4*g"], Float[Array, "b p m"]]:
        # A mask for all prompts of an image: without their axis, vmap embeds it once.
        shared_masks, (_, count) = None, prompts.labels.shape[:2]
        if prompts.masks is not None and prompts.masks.shape[1] != count:
            shared_masks, prompts = prompts.masks[:, 0], prompts._replace(masks=None)
        # From three prompts on it is less work to share; in `jax.export` their number may be open.
        is_shared = prompts.masks is None and (not isinstance(count, int) or count > 2)
        image_pe = self.prompt_encoder.get_dense_pe()

        def decode_image(arrays):
            image_embedding, shared_mask, prompts = arrays
            embedding, hq_features = self.mask_decoder.image_features(image_embedding)

            def decode_prompt(prompt: Prompts):
                mask = shared_mask if prompt.masks is None else prompt.masks
                sparse, sparse_mask = self.prompt_encoder(prompt.points, prompt.labels)
                return self.mask_decoder(
                    embedding,
                    image_pe,
                    sparse,
                    sparse_mask,
                    self.prompt_encoder.embed_mask(mask),
                    multimask_output=multimask_output,
                    attention_similarity=prompt.attention_similarity,
                    target_embedding=prompt.target_embedding,
                    hq_features=hq_features,
                    hq_token_only=hq_token_only,
                    image_is_shared=is_shared,
                )

            return _map(decode_prompt, prompts, prompts_chunk_size)

        images_chunk_size = 1 if prompts_chunk_size == 1 else None
        return _map(decode_image, (image_embeddings, shared_masks, prompts), images_chunk_size)


@functools.partial(
    jax.jit, static_argnames=("multimask_output", "hq_token_only", "prompts_chunk_size")
)
def _decode(model, image_embeddings, prompts, *, prompts_chunk_size, **options):
    """`Sam.decode` of checked arrays; compiled, so that their platform decides and not JAX's."""

    def in_chunks_of(size):
        return functools.partial(model._decode_in_chunks, prompts_chunk_size=size, **options)

    arrays = image_embeddings, prompts
    if prompts_chunk_size is not None:
        return in_chunks_of(prompts_chunk_size)(*arrays)
    cpu, other = (fastest_chunk_size(name, *prompts.labels.shape[:2]) for name in ("cpu", "gpu"))
    return jax.lax.platform_dependent(*arrays, cpu=in_chunks_of(cpu), default=in_chunks_of(other))


def _map(function: Callable, arrays: PyTree, at_once: int | None) -> PyTree:
    """`function` of each entry of the arrays, so many at a time, or all."""
    if at_once is None or (at_once > 1 and at_once >= jax.tree.leaves(arrays)[0].shape[0]):
        return jax.vmap(function)(arrays)
    # One at a time there is no batch axis, with which a CPU multiplies matrices more slowly.
    return jax.lax.map(function, arrays, batch_size=None if at_once == 1 else at_once)
