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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sam_jax.arrays import Device
from sam_jax.config import SamConfig, TinyViTConfig, ViTConfig, check_config
from sam_jax.errors import check_number, check_whole
from sam_jax.models.checks import (
    Prompts,
    check_dtype,
    check_embeddings,
    check_keys,
    check_multimask,
    check_pixels,
    check_prompts,
    check_rngs,
)
from sam_jax.models.compiled import fastest_chunk_size
from sam_jax.models.hf_api import HuggingFaceAPI
from sam_jax.models.image_encoder import ImageEncoder, call_encoder
from sam_jax.models.layers import Remat
from sam_jax.models.mask_decoder import MaskDecoder
from sam_jax.models.meshes import with_auto_axes
from sam_jax.models.prompt_encoder import PromptEncoder
from sam_jax.models.tiny_vit import TinyViT
from sam_jax.models.vit import ImageEncoderViT
from sam_jax.ops.attention import Implementation, check_implementation

ENCODERS = {ViTConfig: ImageEncoderViT, TinyViTConfig: TinyViT}


class Decoded(NamedTuple):
    """What `Sam.decode` returns, of every prompt of every image; both float32."""

    masks: Float[Array, "b p m 4*g 4*g"]
    """Mask logits, four times as fine as the grid of the image embeddings."""
    scores: Float[Array, "b p m"]
    """The predicted IoU of each mask."""


class Sam(HuggingFaceAPI, nnx.Module):
    """Segment Anything.

    Args:
        config: sizes of every part.
        dtype: of the computation, float32, bfloat16 or float16. New parameters are float32 in any
            case; norms, softmax, positional encodings and mask logits are computed in float32.
        attention: how the ViT's attention is computed (`sam_jax.ops.rel_pos_attention`). TinyViT
            has no choice.
        rngs: for the initial parameters.
    """

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: Implementation = "portable",
        rngs: nnx.Rngs,
    ):
        check_config(config)
        check_rngs(rngs)
        check_dtype(dtype)
        check_implementation(attention)
        self.image_encoder: ImageEncoder
        # Initializers give the widest floats that JAX is set to.
        with jax.enable_x64(False):
            # Configurations may be subclasses.
            encoder = next(m for c, m in ENCODERS.items() if isinstance(config.image_encoder, c))
            self.image_encoder = encoder(config, dtype=dtype, attention=attention, rngs=rngs)
            self.prompt_encoder = PromptEncoder(config, dtype=dtype, rngs=rngs)
            self.mask_decoder = MaskDecoder(config, dtype=dtype, rngs=rngs)
        self.config = config

    image_format = "RGB"

    @property
    def mask_threshold(self) -> float:
        """The logit above which a pixel belongs to a mask."""
        return self.config.mask_threshold

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the computation."""
        return jnp.dtype(self.mask_decoder.dtype)

    @property
    def device(self) -> Device | Sharding:
        """Where the parameters are: a device of JAX, or their sharding over several."""
        return self.mask_decoder.iou_token[...].device

    def encode_image(
        self,
        pixel_values: Float[Array, "b h w rgb"],
        *,
        remat: Remat = False,
        drop_path_rate: float = 0.0,
        keys: Array | None = None,
    ) -> Float[Array, "b grid grid c"]:
        """Image embeddings of normalized, padded pixels [b, size, size, 3], channels last.

        Args:
            pixel_values: as `SamProcessor` or `sam_jax.preprocess` makes them.
            remat: to train with less memory: True computes the activations within blocks again in
                the backward pass; a policy of `jax.checkpoint_policies` says which of them.
            drop_path_rate: stochastic depth, to train a ViT: the rate of the last block (0.4 in
                the paper, for ViT-H); earlier blocks have less, in proportion.
            keys: [b] keys of `jax.random` for stochastic depth, one for each image.

        Raises:
            TypeError: if `pixel_values` are not an array of floats, and if an image encoder of
                your own does not take these arguments (`sam_jax.ImageEncoder`).
            ValueError: for another shape, and for a `drop_path_rate` without a ViT or keys.
        """
        pixel_values = check_pixels(self.config.image_size, pixel_values)
        if not (isinstance(remat, bool) or callable(remat)):
            raise TypeError(f"remat is {remat!r}, expected a bool or a policy of jax.checkpoint")
        options: dict[str, Any] = {"remat": remat} if remat else {}
        if drop_path_rate:
            if isinstance(self.image_encoder, TinyViT) or keys is None:
                raise ValueError(
                    f"drop_path_rate is {drop_path_rate}, which needs a ViT encoder and keys"
                )
            check_number("drop_path_rate", drop_path_rate)
            if not 0 < drop_path_rate < 1:
                raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 to 1, without 1")
            check_keys(keys, pixel_values.shape[0])
            options["drop_path_rate"] = drop_path_rate

        def encode(pixel_values, model, keys):
            more = options if keys is None else {**options, "keys": keys}
            return call_encoder(model.image_encoder, self.config, pixel_values, **more)

        return with_auto_axes(encode, pixel_values, self, keys if drop_path_rate else None)

    def decode(
        self,
        image_embeddings: Float[Array, "b g g c"],
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        *,
        masks: Float[Array, "b #p 4*g 4*g"] | None = None,
        sparse_embeddings: Float[Array, "b p s c"] | None = None,
        dense_embeddings: Float[Array, "b #p g g c"] | None = None,
        multimask_output: bool | None = True,
        attention_similarity: Float[Array, "b p #heads #t g*g"] | None = None,
        target_embedding: Float[Array, "b p #t c"] | None = None,
        hq_token_only: bool = False,
        prompts_chunk_size: int | None = None,
    ) -> Decoded:
        """Mask logits and predicted IoUs of every prompt of every image, both float32.

        Prompt encoder and mask decoder are written for one prompt of one image; this maps them over
        prompts, then over images. What depends on the image alone is computed once per image.

        Args:
            image_embeddings: of `encode_image`.
            points: (x, y) in pixels of the model's padded input.
            labels: of the points, as `join_prompts` makes and explains them. Points labeled -10 are
                padding and change nothing.
            masks: low-resolution logits, one per image or one per prompt.
            sparse_embeddings: prompt tokens of your own, such as learned ones. They follow those
                of the points; without points they are the prompt. All are attended to, so leave
                padding out.
            dense_embeddings: added to the image embeddings, instead of what the prompt encoder
                makes of `masks`; one per image or one per prompt.
            multimask_output: three masks per prompt, or one; None for all four, the one first.
            attention_similarity: added to the token-to-image logits (PerSAM).
            target_embedding: added to the tokens before each block (PerSAM).
            hq_token_only: for a SAM-HQ, its own mask instead of its sum with SAM's.
            prompts_chunk_size: prompts of each image that are computed together; fewer take less
                memory, and with 1 images are computed one by one, too. None: 1 if the program is
                compiled for a CPU, and elsewhere about 64 prompts of all images together.

        Raises:
            TypeError: for anything but arrays, for arrays of another kind of numbers, and for a
                `multimask_output` that is not a bool.
            ValueError: for shapes that do not fit, for prompts without any token, for `masks` with
                `dense_embeddings`, for `hq_token_only` of another model than a SAM-HQ, and for a
                `prompts_chunk_size` below 1; and, unless traced, for values that `join_prompts`
                would not give, and masks that are not logits.
        """
        if hq_token_only and not self.config.hq:
            raise ValueError("hq_token_only is True, but the model is not a SAM-HQ")
        check_multimask(multimask_output)
        if prompts_chunk_size is not None:
            check_whole("prompts_chunk_size", prompts_chunk_size, 1)
        prompts = Prompts(
            points,
            labels,
            masks,
            sparse_embeddings,
            dense_embeddings,
            attention_similarity,
            target_embedding,
        )
        return self._run_decoder(
            image_embeddings,
            prompts,
            multimask_output=multimask_output,
            hq_token_only=hq_token_only,
            prompts_chunk_size=prompts_chunk_size,
        )

    def decoder_attention(
        self,
        image_embeddings: Float[Array, "b g g c"],
        points: Float[Array, "b p n 2"] | None = None,
        labels: Int[Array, "b p n"] | None = None,
        **prompts: Array | None,
    ) -> Float[Array, "b p blocks heads t g g"]:
        """How much each token attends to each place of the image, in each block of the decoder.

        The tokens are the IoU token, the four mask tokens (the single mask's first), SAM-HQ's, and
        the prompt's. Weights are float32 and sum to 1 over the grid. The last attention, after the
        blocks, is not among them.

        Args:
            image_embeddings: as of `decode`.
            points: as of `decode`.
            labels: as of `decode`.
            **prompts: the other prompts of `decode`: masks, sparse_embeddings, dense_embeddings,
                attention_similarity, target_embedding.

        Raises:
            TypeError, ValueError: as `decode`, and TypeError for other names.
        """
        if unknown := sorted(set(prompts) - set(Prompts._fields)):
            raise TypeError(
                f"decoder_attention does not take {', '.join(unknown)}; it takes "
                f"{', '.join(Prompts._fields)}"
            )
        weights = self._run_decoder(
            image_embeddings,
            Prompts(points, labels, **prompts),
            multimask_output=True,
            return_attention=True,
        )
        return weights.reshape(*weights.shape[:-1], *image_embeddings.shape[1:3])

    def _run_decoder(self, image_embeddings, prompts, **options):
        image_embeddings = check_embeddings(self.config, image_embeddings)
        prompts = check_prompts(self.config, image_embeddings.shape[0], prompts)
        decode = functools.partial(_decode, **options)
        return with_auto_axes(decode, image_embeddings, self, prompts)

    def _decode_in_chunks(
        self,
        image_embeddings: Float[Array, "b g g c"],
        prompts: Prompts,
        *,
        prompts_chunk_size: int | None,
        **options: Any,
    ) -> Decoded | Float[Array, "b p blocks heads t n"]:
        count = prompts.count
        # One for all prompts of an image: without their axis, vmap embeds it once.
        shared = {
            name: array[:, 0]
            for name in ("masks", "dense_embeddings")
            if (array := getattr(prompts, name)) is not None and array.shape[1] != count
        }
        own = prompts._replace(**dict.fromkeys(shared))
        is_dense = own.masks is not None or own.dense_embeddings is not None
        decode_image = functools.partial(
            self._decode_image,
            image_pe=self.prompt_encoder.get_dense_pe(),
            # From three prompts on it is less work to share; in `jax.export` their number may be
            # open.
            image_is_shared=not is_dense and (not isinstance(count, int) or count > 2),
            prompts_chunk_size=prompts_chunk_size,
            **options,
        )
        images_chunk_size = 1 if prompts_chunk_size == 1 else None
        return _map(decode_image, (image_embeddings, shared, own), images_chunk_size)

    def _decode_image(self, arrays: Any, *, prompts_chunk_size: int | None, **options: Any):
        """All prompts of an image, from its embedding, the prompts' shared and their own arrays."""
        image_embedding, shared, prompts = arrays
        embedding, hq_features = self.mask_decoder.image_features(image_embedding)
        decode_prompt = functools.partial(
            self._decode_prompt,
            shared=shared,
            image_embedding=embedding,
            hq_features=hq_features,
            **options,
        )
        return _map(decode_prompt, prompts, prompts_chunk_size)

    def _decode_prompt(
        self,
        prompt: Prompts,
        *,
        shared: dict[str, Array],
        image_embedding: Any,
        image_pe: Any,
        return_attention: bool = False,
        **options: Any,
    ):
        prompt = prompt._replace(**shared)
        sparse, sparse_mask = self._sparse_embeddings(prompt)
        dense = prompt.dense_embeddings
        if dense is None:
            dense = self.prompt_encoder.embed_mask(prompt.masks)
        weights = [] if return_attention else None
        masks, scores = self.mask_decoder(
            image_embedding,
            image_pe,
            sparse,
            sparse_mask,
            dense,
            attention_similarity=prompt.attention_similarity,
            target_embedding=prompt.target_embedding,
            weights=weights,
            **options,
        )
        return Decoded(masks, scores) if weights is None else jnp.stack(weights)

    def _sparse_embeddings(self, prompt: Prompts):
        """One prompt's tokens, and which of them are real rather than padding."""
        given = prompt.sparse_embeddings
        if prompt.points is None or prompt.labels is None:
            assert given is not None  # as `check_prompts` made sure
            return given, jnp.ones(len(given), bool)
        tokens, is_real = self.prompt_encoder(prompt.points, prompt.labels)
        if given is None:
            return tokens, is_real
        tokens = jnp.concatenate([tokens, given.astype(tokens.dtype)])
        return tokens, jnp.concatenate([is_real, jnp.ones(len(given), bool)])


@functools.partial(
    jax.jit,
    static_argnames=("multimask_output", "hq_token_only", "prompts_chunk_size", "return_attention"),
)
def _decode(image_embeddings, model, prompts, *, prompts_chunk_size=None, **options):
    """`Sam.decode` of checked arrays; compiled, so that it suits their platform."""

    def in_chunks_of(size):
        return functools.partial(model._decode_in_chunks, prompts_chunk_size=size, **options)

    arrays = image_embeddings, prompts
    if prompts_chunk_size is not None:
        return in_chunks_of(prompts_chunk_size)(*arrays)
    sizes = image_embeddings.shape[0], prompts.count  # both may be open in `jax.export`
    cpu, other = (fastest_chunk_size(platform, *sizes) for platform in ("cpu", "gpu"))
    return jax.lax.platform_dependent(*arrays, cpu=in_chunks_of(cpu), default=in_chunks_of(other))


def _map(function: Callable, arrays: PyTree, chunk_size: int | None) -> PyTree:
    """`function` of each entry of the arrays, `chunk_size` at a time; None for all."""
    if chunk_size is None or (chunk_size > 1 and chunk_size >= jax.tree.leaves(arrays)[0].shape[0]):
        return jax.vmap(function)(arrays)
    # One at a time, without a batch axis, with which a CPU multiplies matrices more slowly.
    return jax.lax.map(function, arrays, batch_size=None if chunk_size == 1 else chunk_size)
