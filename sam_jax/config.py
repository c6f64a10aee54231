"""The configuration of a SAM as frozen dataclasses, and the published sizes.

Field names are those of Meta's `segment_anything`; the defaults of each class are ViT-B's.
"""

import dataclasses
from collections.abc import Mapping
from reprlib import repr as short  # of values from a file, of any size and depth
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from sam_jax.idioms import WithAdvice

__all__ = [
    "MaskDecoderConfig",
    "PromptEncoderConfig",
    "SamConfig",
    "TinyViTConfig",
    "ViTConfig",
    "lite_medsam",
    "mobile_sam",
    "vit_b",
    "vit_h",
    "vit_l",
]

Preprocessing = Literal["medsam"]
# The largest number, and the largest number of layers or outputs, in a configuration: more than any
# model has, and few enough to compare a forged file's configuration with its tensors in seconds.
MAX_SIZE, _MOST_LAYERS = 65_536, 128
_LAYERS = ("depth", "depths", "transformer_depth", "iou_head_depth", "num_multimask_outputs")


def _check_types(config: Any) -> None:
    """Raises ValueError for the first field whose value has the wrong type or is too large.

    Integers must be positive. Configurations are read from files; without this check, a wrong value
    would cause an error far from there.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        most = _MOST_LAYERS if f.name in _LAYERS else MAX_SIZE
        if not fits(value, f.type, most=most):
            kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
            limit = f" up to {most}" if "int" in kind or "float" in kind else ""
            raise ValueError(
                f"{type(config).__name__}.{f.name} is {short(value)}, expected {kind}{limit}"
            )


def fits(value: Any, hint: Any, least: int = 1, most: int = MAX_SIZE) -> bool:
    """Whether a value has the type and is within the limits."""
    if hint is int:
        return type(value) is int and least <= value <= most
    if hint is float:
        return type(value) in (int, float) and abs(value) <= most  # False for NaN
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return isinstance(value, tuple) and all(fits(v, kind, 0, most) for v in value)
    if get_origin(hint) is UnionType:
        return any(fits(value, kind, least, most) for kind in get_args(hint))
    return isinstance(value, hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The ViT image encoder (`ImageEncoderViT`; paper, appendix A)."""

    embed_dim: int = 768
    """Channels of the tokens."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads per block."""
    mlp_dim: int = 3072
    """Hidden channels of each block's MLP."""
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    """The blocks that attend globally; the others attend within windows."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    window_size: int = 14
    """Side of an attention window in patches."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    use_abs_pos: bool = True
    """Whether position embeddings are added to the patches."""
    use_rel_pos: bool = True
    """Whether attention has decomposed relative positions."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the blocks' norms."""

    def __post_init__(self):
        _check_types(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if max(self.global_attn_indexes, default=0) >= self.depth:
            raise ValueError(
                f"global_attn_indexes is {short(self.global_attn_indexes)}, expected indices of "
                f"blocks, from 0 to {self.depth - 1}"
            )

    @property
    def early_dim(self) -> int:
        """Channels of the layer that SAM-HQ also uses, the first block with global attention."""
        return self.embed_dim

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyViTConfig:
    """MobileSAM's image encoder (`TinyViT`): one stage of MBConv blocks, three of attention.

    Each tuple has one number per stage.
    """

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    """Channels of each stage."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Number of blocks of each stage."""
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    """Attention heads of each stage; the first stage has no attention and ignores its number."""
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    """Side of each stage's attention windows; the first stage ignores its number."""
    mlp_ratio: float = 4.0
    """Hidden channels of an MLP, as a multiple of its stage's channels."""
    mbconv_expand_ratio: float = 4.0
    """Hidden channels of an MBConv block, as a multiple of its stage's channels."""
    stem_stride: int = 2
    """Stride of each of the stem's two convolutions: 2 (3 x 3 pixels), or 1 (1 x 1) for LiteMedSAM,
    whose images have a quarter of the side."""
    num_classes: int | None = 1000
    """Outputs of the classifier; None if the checkpoint does not have one."""

    def __post_init__(self):
        _check_types(self)
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is {self.stem_stride}, expected 1 or 2")
        # The first stage has no attention, so its heads and window are ignored. The stem's first
        # convolution has half as many channels as the first stage.
        for name, first, least in (
            ("embed_dims", 0, 2),
            ("depths", 0, 1),
            ("num_heads", 1, 1),
            ("window_sizes", 1, 1),
        ):
            values = getattr(self, name)
            if len(values) != 4 or min(values[first:]) < least:
                raise ValueError(
                    f"{name} is {short(values)}, expected an integer of at least {least} for each "
                    "of the four stages"
                )
        for dim, heads in zip(self.embed_dims[1:], self.num_heads[1:], strict=True):
            if dim % heads:
                raise ValueError(
                    f"embed_dims is {self.embed_dims} and num_heads is {self.num_heads}, expected "
                    f"multiples of the heads, but {dim} is not a multiple of {heads}"
                )
        ratios = self.mlp_ratio, self.mbconv_expand_ratio
        if min(ratios) * min(self.embed_dims) < 1 or max(ratios) * max(self.embed_dims) > MAX_SIZE:
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio} and mbconv_expand_ratio is "
                f"{self.mbconv_expand_ratio}, expected ratios that leave a channel of "
                f"{min(self.embed_dims)} and make at most {MAX_SIZE} of {max(self.embed_dims)}"
            )

    @property
    def early_dim(self) -> int:
        """Channels of the layer that SAM-HQ also uses, the output of the second stage."""
        return self.embed_dims[2]

    @property
    def patch_size(self) -> int:
        """Pixels per embedding position: the first two stages also halve the grid, once each."""
        return 4 * self.stem_stride**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig:
    """The prompt encoder (`PromptEncoder`)."""

    mask_in_chans: int = 16
    """Channels of a mask prompt before the last convolution."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the norms of a mask prompt."""

    def __post_init__(self):
        _check_types(self)
        if self.mask_in_chans < 4:  # the first convolution has a quarter of them
            raise ValueError(f"mask_in_chans is {self.mask_in_chans}, expected at least 4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskDecoderConfig:
    """The two-way transformer and its heads (`MaskDecoder`)."""

    transformer_depth: int = 2
    """Number of two-way blocks."""
    num_heads: int = 8
    """Heads of each attention."""
    mlp_dim: int = 2048
    """Hidden channels of the blocks' MLPs."""
    attention_downsample_rate: int = 2
    """Factor by which attention between tokens and image reduces the channels."""
    num_multimask_outputs: int = 3
    """Masks for an ambiguous prompt; one more is for unambiguous prompts."""
    iou_head_depth: int = 3
    """Layers of the head that predicts IoUs."""
    iou_head_hidden_dim: int = 256
    """Hidden channels of that head."""
    layer_norm_eps: float = 1e-5
    """Epsilon of `norm1` to `norm4` of the two-way blocks: 1e-5 in Meta's code, 1e-6 in Hugging
    Face's. The final norm uses 1e-5 in both."""

    def __post_init__(self):
        _check_types(self)


@dataclasses.dataclass(frozen=True)
class SamConfig(WithAdvice):
    """A whole SAM."""

    image_encoder: ViTConfig | TinyViTConfig = ViTConfig()
    """The image encoder: a ViT, or MobileSAM's TinyViT."""
    prompt_encoder: PromptEncoderConfig = PromptEncoderConfig()
    """The prompt encoder."""
    _: dataclasses.KW_ONLY
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    """The mask decoder."""
    image_size: int = 1024
    """Side of the square, padded image in pixels."""
    prompt_embed_dim: int = 256
    """Channels of image embeddings and prompt tokens."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of red, green and blue, for values from 0 to 255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of red, green and blue."""
    mask_threshold: float = 0.0
    """A pixel is in a mask if its logit is above this."""
    resize: str = "longest_side"
    """How images are resized: "longest_side", then padded to the square, or "square", which changes
    their aspect ratio."""
    normalization: str = "statistics"
    """How pixels are normalized: "statistics", by `pixel_mean` and `pixel_std`, or "min_max", for
    medical images: each image's smallest value becomes 0 and its largest 1."""
    hq: bool = False
    """Whether it is a SAM-HQ (Ke et al. 2023), whose decoder has one more token and also uses an
    early layer of the image encoder; its channels are appended to the image embedding."""

    def __post_init__(self):
        _check_types(self)
        if self.hq and not getattr(self.image_encoder, "global_attn_indexes", True):
            raise ValueError("hq is True, but no block of the image encoder attends globally")
        for name, known in (
            ("resize", ("longest_side", "square")),
            ("normalization", ("statistics", "min_max")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {short(getattr(self, name))}, expected {' or '.join(known)}"
                )
        # Half of the channels are sines, and the decoder's masks have an eighth of the channels.
        if self.prompt_embed_dim % 2 or self.prompt_embed_dim < 8:
            raise ValueError(
                f"prompt_embed_dim is {self.prompt_embed_dim}, expected an even number of at least "
                "8"
            )
        heads, rate = self.mask_decoder.num_heads, self.mask_decoder.attention_downsample_rate
        inner = self.prompt_embed_dim // rate
        if not inner or inner % heads or self.prompt_embed_dim % heads:
            raise ValueError(
                f"prompt_embed_dim is {self.prompt_embed_dim} and the mask decoder's "
                f"attention_downsample_rate is {rate}, expected both the first and their quotient "
                f"to be multiples of its num_heads {heads}"
            )
        if self.image_size % self.image_encoder.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the patch size "
                f"{self.image_encoder.patch_size}"
            )
        mean, std = self.pixel_mean, self.pixel_std
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"pixel_mean is {short(mean)} and pixel_std is {short(std)}, expected three "
                "numbers each, for red, green and blue, with positive deviations"
            )

    @property
    def image_embedding_size(self) -> int:
        """Side of the image embedding's grid (64 for 1024 pixels)."""
        return self.image_size // self.image_encoder.patch_size

    @property
    def image_embedding_channels(self) -> int:
        """Channels of an image embedding: 256, plus those of an early layer for SAM-HQ."""
        return self.prompt_embed_dim + (self.image_encoder.early_dim if self.hq else 0)

    @property
    def mask_size(self) -> int:
        """Side of mask prompts and of low-resolution masks (256 for 1024 pixels)."""
        return 4 * self.image_embedding_size

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; `from_dict` is the inverse."""
        kind = next(k for k, part in _ENCODERS.items() if isinstance(self.image_encoder, part))
        return {"model_type": "sam_jax", "image_encoder_type": kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> "SamConfig":
        """Builds the configuration from the values of `to_dict`, also after a round trip by JSON.

        Raises:
            ValueError: for an unknown key or an invalid value.
        """
        check_mapping(values, "config")
        values = {k: v for k, v in values.items() if k != "model_type"}
        kind = values.pop("image_encoder_type", None)
        if not isinstance(kind, str) or kind not in _ENCODERS:
            raise ValueError(
                f"image_encoder_type is {short(kind)}, expected one of {sorted(_ENCODERS)}; is "
                "this a config.json written by sam_jax?"
            )
        parts = {
            "image_encoder": _ENCODERS[kind],
            "prompt_encoder": PromptEncoderConfig,
            "mask_decoder": MaskDecoderConfig,
        }
        for name, part in parts.items():
            values[name] = _build(part, values.get(name, {}), name)
        return _build(cls, values, "config")


_ENCODERS = {"vit": ViTConfig, "tiny_vit": TinyViTConfig}


def check_config(config: Any) -> None:
    """Raises TypeError for anything but a SamConfig."""
    if not isinstance(config, SamConfig):
        raise TypeError(
            f"config is a {type(config).__name__}, expected a SamConfig: that of a model is "
            "model.config, and sam_jax.config.vit_b() makes a new one"
        )


def check_mapping(values: Any, where: str) -> None:
    """Raises ValueError for anything but a mapping."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {short(values)}, expected names and values")


def _build(cls, values: Any, where: str):
    check_mapping(values, where)
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known, key=short):
        raise ValueError(f"{where} has unknown keys {short(unknown)}; known: {sorted(known)}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def vit_b() -> SamConfig:
    """SAM with the ViT-B encoder: 93,735,472 parameters."""
    return SamConfig()


def vit_l() -> SamConfig:
    """SAM with the ViT-L encoder: 312,342,832 parameters."""
    return SamConfig(
        ViTConfig(
            embed_dim=1024,
            depth=24,
            num_heads=16,
            mlp_dim=4096,
            global_attn_indexes=(5, 11, 17, 23),
        )
    )


def vit_h() -> SamConfig:
    """SAM with the ViT-H encoder: 641,090,608 parameters."""
    return SamConfig(
        ViTConfig(
            embed_dim=1280,
            depth=32,
            num_heads=16,
            mlp_dim=5120,
            global_attn_indexes=(7, 15, 23, 31),
        )
    )


def mobile_sam() -> SamConfig:
    """MobileSAM: the TinyViT encoder with SAM's own prompt encoder and mask decoder."""
    return SamConfig(TinyViTConfig())


def lite_medsam() -> SamConfig:
    """LiteMedSAM, for medical images of 256 pixels: MobileSAM with stride 1 in the stem."""
    return dataclasses.replace(
        mobile_sam(),
        image_encoder=TinyViTConfig(stem_stride=1, num_classes=None),
        image_size=256,
        normalization="min_max",
    )


def with_preprocessing(config: SamConfig, name: Preprocessing | None) -> SamConfig:
    """The configuration with other preprocessing; None keeps it.

    "medsam" is the preprocessing of MedSAM (Ma et al. 2024), which MedSAM's checkpoints do not
    record: images are resized to a square, and their values are scaled to 0 to 1.

    Raises:
        ValueError: for an unknown name.
    """
    check_preprocessing(name)
    if name is None:
        return config
    return dataclasses.replace(config, resize="square", normalization="min_max")


def check_preprocessing(name: Any) -> None:
    """Raises ValueError for anything but a name of `Preprocessing`, or None."""
    if name is not None and name not in get_args(Preprocessing):
        raise ValueError(f"preprocessing is {name!r}, expected 'medsam' or None")
