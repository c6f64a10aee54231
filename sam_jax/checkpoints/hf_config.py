"""Hugging Face's config.json and preprocessor_config.json as a `SamConfig`, and back."""

from reprlib import repr as short  # of values from a file, of any size and depth
from typing import Any

from sam_jax.config import (
    MAX_SIZE,
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamConfig,
    ViTConfig,
    check_mapping,
    fits,
)


def from_hf(values: Any, preprocessor: Any = None) -> SamConfig:
    """Converts a Hugging Face `SamConfig` (its `config.json`).

    Args:
        values: the content of `config.json`. Missing values are the defaults of `transformers`
            (SlimSAM's file has little more than `mlp_dim`).
        preprocessor: the content of `preprocessor_config.json`, or of "image_processor" in
            `processor_config.json`, for the mean and standard deviation of pixels.

    Raises:
        ValueError: if it describes another kind of model, or settings that sam_jax does not have.
    """
    check_mapping(values, "config.json")
    model_type = values.get("model_type", "sam")
    if model_type not in ("sam", "sam_hq"):
        raise ValueError(
            f"config.json describes a {short(model_type)} model, expected model_type 'sam' or "
            "'sam_hq'"
        )
    names = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    vision, prompt, decoder = parts = [values.get(name) or {} for name in names]
    for name, part in zip(names, parts, strict=True):
        check_mapping(part, f"{name} of config.json")

    embed_dim = vision.get("hidden_size", 768)
    depth = vision.get("num_hidden_layers", 12)
    image_size = vision.get("image_size", 1024)
    patch_size = vision.get("patch_size", 16)
    out_chans = vision.get("output_channels", 256)
    mlp_ratio = vision.get("mlp_ratio", 4.0)
    indexes = vision.get("global_attn_indexes", (2, 5, 8, 11))
    indexes = tuple(indexes) if isinstance(indexes, list) else indexes
    # These are used in computations below.
    for name, value, hint, kind in (
        ("hidden_size", embed_dim, int, "one positive integer"),
        ("num_hidden_layers", depth, int, "one positive integer"),
        ("image_size", image_size, int, "one positive integer"),
        ("patch_size", patch_size, int, "one positive integer"),
        ("output_channels", out_chans, int, "one positive integer"),
        ("mlp_ratio", mlp_ratio, float, "one number"),
        ("global_attn_indexes", indexes, tuple[int, ...], "a list of indices"),
    ):
        if not fits(value, hint):
            raise ValueError(
                f"vision_config.{name} is {short(value)}, expected {kind}, up to {MAX_SIZE}"
            )
    expected = {
        "vision_config.hidden_act": (vision.get("hidden_act", "gelu"), "gelu"),
        "vision_config.num_channels": (vision.get("num_channels", 3), 3),
        "vision_config.num_pos_feats": (vision.get("num_pos_feats", 128), out_chans // 2),
        "prompt_encoder_config.hidden_act": (prompt.get("hidden_act", "gelu"), "gelu"),
        "prompt_encoder_config.hidden_size": (prompt.get("hidden_size", 256), out_chans),
        "prompt_encoder_config.image_size": (prompt.get("image_size", 1024), image_size),
        "prompt_encoder_config.patch_size": (prompt.get("patch_size", 16), patch_size),
        "prompt_encoder_config.num_point_embeddings": (prompt.get("num_point_embeddings", 4), 4),
        "mask_decoder_config.hidden_act": (decoder.get("hidden_act", "relu"), "relu"),
        "mask_decoder_config.hidden_size": (decoder.get("hidden_size", 256), out_chans),
    }
    if model_type == "sam_hq":
        expected["mask_decoder_config.vit_dim"] = decoder.get("vit_dim", 768), embed_dim
    wrong = [
        f"{name} is {short(got)}, not {want!r}"
        for name, (got, want) in expected.items()
        if got != want
    ]
    if wrong:
        raise ValueError("this SamConfig cannot be represented: " + "; ".join(wrong))

    mlp_dim = vision.get("mlp_dim")
    mean, std = _pixel_statistics(preprocessor or {}, image_size)
    return SamConfig(
        image_encoder=ViTConfig(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=vision.get("num_attention_heads", 12),
            mlp_dim=int(embed_dim * mlp_ratio) if mlp_dim is None else mlp_dim,
            # transformers ignores indices beyond the last layer, which the default may have.
            global_attn_indexes=tuple(i for i in indexes if i < depth),
            patch_size=patch_size,
            window_size=vision.get("window_size", 14),
            qkv_bias=vision.get("qkv_bias", True),
            use_abs_pos=vision.get("use_abs_pos", True),
            use_rel_pos=vision.get("use_rel_pos", True),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        ),
        prompt_encoder=PromptEncoderConfig(
            mask_in_chans=prompt.get("mask_input_channels", 16),
            layer_norm_eps=prompt.get("layer_norm_eps", 1e-6),
        ),
        mask_decoder=MaskDecoderConfig(
            transformer_depth=decoder.get("num_hidden_layers", 2),
            num_heads=decoder.get("num_attention_heads", 8),
            mlp_dim=decoder.get("mlp_dim", 2048),
            attention_downsample_rate=decoder.get("attention_downsample_rate", 2),
            num_multimask_outputs=decoder.get("num_multimask_outputs", 3),
            iou_head_depth=decoder.get("iou_head_depth", 3),
            iou_head_hidden_dim=decoder.get("iou_head_hidden_dim", 256),
            layer_norm_eps=decoder.get("layer_norm_eps", 1e-6),
        ),
        image_size=image_size,
        prompt_embed_dim=out_chans,
        pixel_mean=mean,
        pixel_std=std,
        hq=model_type == "sam_hq",
    )


def _pixel_statistics(preprocessor: Any, image_size: int) -> tuple[tuple, tuple]:
    """Mean and standard deviation, for pixels from 0 to 255, of a `preprocessor_config.json`."""
    check_mapping(preprocessor, "the image processor's configuration")
    expected = {
        "size": {"longest_edge": image_size},
        "do_resize": True,
        "resample": 2,  # PIL's bilinear
        "do_pad": True,
    }
    for name, value in expected.items():
        if preprocessor.get(name, value) != value:
            raise ValueError(
                f"the image processor has {name} {short(preprocessor[name])}, expected {value!r}"
            )
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if preprocessor.get("do_normalize", True):
        mean = preprocessor.get("image_mean", (0.485, 0.456, 0.406))
        std = preprocessor.get("image_std", (0.229, 0.224, 0.225))
    scale = 1.0
    if preprocessor.get("do_rescale", True):
        scale = preprocessor.get("rescale_factor", 1 / 255)
    for name, values in (("image_mean", mean), ("image_std", std), ("rescale_factor", [scale])):
        numbers = tuple(values) if isinstance(values, list) else values
        if not fits(numbers, tuple[float, ...]):
            raise ValueError(f"the image processor has {name} {short(values)}, expected numbers")
    if scale <= 0:
        raise ValueError(f"the image processor has rescale_factor {scale}, expected more than 0")
    return tuple(round(m / scale, 6) for m in mean), tuple(round(s / scale, 6) for s in std)


def to_hf_preprocessor(config: SamConfig) -> dict[str, Any]:
    """The Hugging Face `preprocessor_config.json` of a model."""
    return {
        "image_processor_type": "SamImageProcessor",
        "image_mean": [m / 255 for m in config.pixel_mean],
        "image_std": [s / 255 for s in config.pixel_std],
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": config.image_size},
        "pad_size": {"height": config.image_size, "width": config.image_size},
        "mask_size": {"longest_edge": config.mask_size},
        "mask_pad_size": {"height": config.mask_size, "width": config.mask_size},
    }


def to_hf(config: SamConfig) -> dict[str, Any]:
    """The Hugging Face `config.json` of a SAM with a ViT encoder; `from_hf` is the inverse.

    Raises:
        ValueError: for a TinyViT, for which `transformers` does not have a class, and for a mask
            threshold other than 0 or other preprocessing than SAM's, which it cannot store.
    """
    if (config.resize, config.normalization) != ("longest_side", "statistics"):
        raise ValueError(
            f"resize is {config.resize!r} and normalization is {config.normalization!r}, but "
            "Hugging Face's configuration cannot store them: its models resize the longest side "
            "and normalize by mean and standard deviation"
        )
    if config.mask_threshold != 0:
        raise ValueError(
            f"mask_threshold is {config.mask_threshold}, but Hugging Face's configuration cannot "
            "store it: its models use 0"
        )
    encoder, prompt, decoder = config.image_encoder, config.prompt_encoder, config.mask_decoder
    if not isinstance(encoder, ViTConfig):
        raise ValueError(
            "Hugging Face's SamModel has no TinyViT encoder; write the Meta format instead"
        )
    sizes = {"image_size": config.image_size, "patch_size": encoder.patch_size}
    values = {
        "model_type": "sam_hq" if config.hq else "sam",
        "architectures": ["SamHQModel" if config.hq else "SamModel"],
        "vision_config": {
            **sizes,
            "hidden_size": encoder.embed_dim,
            "output_channels": config.prompt_embed_dim,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "mlp_dim": encoder.mlp_dim,
            "global_attn_indexes": list(encoder.global_attn_indexes),
            "window_size": encoder.window_size,
            "num_pos_feats": config.prompt_embed_dim // 2,
            "qkv_bias": encoder.qkv_bias,
            "use_abs_pos": encoder.use_abs_pos,
            "use_rel_pos": encoder.use_rel_pos,
            "layer_norm_eps": encoder.layer_norm_eps,
        },
        "prompt_encoder_config": {
            **sizes,
            "hidden_size": config.prompt_embed_dim,
            "mask_input_channels": prompt.mask_in_chans,
            "layer_norm_eps": prompt.layer_norm_eps,
        },
        "mask_decoder_config": {
            "hidden_size": config.prompt_embed_dim,
            "num_hidden_layers": decoder.transformer_depth,
            "num_attention_heads": decoder.num_heads,
            "mlp_dim": decoder.mlp_dim,
            "attention_downsample_rate": decoder.attention_downsample_rate,
            "num_multimask_outputs": decoder.num_multimask_outputs,
            "iou_head_depth": decoder.iou_head_depth,
            "iou_head_hidden_dim": decoder.iou_head_hidden_dim,
            "layer_norm_eps": decoder.layer_norm_eps,
        },
    }
    if config.hq:
        values["mask_decoder_config"]["vit_dim"] = encoder.embed_dim
    return values
