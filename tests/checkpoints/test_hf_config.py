import dataclasses
import json
import re

import pytest
import transformers
from reference import SMALL

from sam_jax.checkpoints.hf_config import from_hf, to_hf
from sam_jax.checkpoints.params import param_shapes
from sam_jax.config import (
    SamConfig,
    mobile_sam,
    vit_b,
    vit_h,
    vit_l,
    with_preprocessing,
)

PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


def with_hf_norm(config):
    """The configuration with the default epsilon of Hugging Face's mask decoder."""
    decoder = dataclasses.replace(config.mask_decoder, layer_norm_eps=1e-6)
    return dataclasses.replace(config, mask_decoder=decoder)


def test_hf_configs_cannot_hold_medsam_preprocessing():
    config = with_preprocessing(vit_b(), "medsam")
    assert with_preprocessing(vit_b(), None) == vit_b()
    assert SamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="resize is 'square' and normalization is 'min_max'"):
        to_hf(config)


# --- Hugging Face -------------------------------------------------------------------------------


def test_defaults_match_hf():
    expected = with_hf_norm(vit_b())
    assert from_hf(transformers.SamConfig().to_dict()) == expected
    assert from_hf({}) == expected
    assert from_hf({"model_type": "sam", "vision_config": None}) == expected


@pytest.mark.parametrize("make", [vit_b, vit_l, vit_h])
def test_hf_round_trip(make):
    config = with_hf_norm(make())
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert from_hf(to_hf(make())) == make()  # Meta's epsilon is kept too


def hf_values(config: SamConfig) -> dict:
    """The values after `transformers` has read and written sam_jax's."""
    values = {name: part for name, part in to_hf(config).items() if name in PARTS}
    return transformers.SamConfig(**values).to_dict()


@pytest.mark.parametrize("config", [vit_b(), vit_l(), vit_h(), SMALL], ids=["b", "l", "h", "small"])
def test_round_trip_through_transformers(config):
    theirs = hf_values(config)
    assert from_hf(json.loads(json.dumps(theirs))) == config
    for part in PARTS:
        for name, value in to_hf(config)[part].items():
            assert theirs[part][name] == value


def test_full_size_config_matches_the_reference():
    """`SamVisionConfig`'s fields of facebook/sam-vit-huge."""
    vision = transformers.models.sam.SamVisionConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
    )
    values = transformers.SamConfig(vision_config=vision.to_dict()).to_dict()
    assert from_hf(values) == with_hf_norm(vit_h())


def test_nearly_empty_config_of_slim_sam():
    values = {"model_type": "sam", "vision_config": {"hidden_size": 168, "mlp_dim": 696}}
    config = from_hf(values)
    encoder = dataclasses.replace(vit_b().image_encoder, embed_dim=168, mlp_dim=696)
    assert config == with_hf_norm(SamConfig(encoder))
    assert config.image_encoder.head_dim == 14
    theirs = transformers.SamConfig(vision_config=values["vision_config"]).to_dict()
    assert from_hf(theirs) == config
    sizes = param_shapes(config)
    assert sizes["image_encoder.blocks.0.mlp.lin1.kernel"] == (168, 696)


def test_global_blocks_beyond_the_last_layer():
    """The default has such blocks, and transformers ignores them."""
    theirs = transformers.models.sam.SamVisionConfig(num_hidden_layers=6)
    assert tuple(theirs.global_attn_indexes) == (2, 5, 8, 11)
    config = from_hf({"vision_config": theirs.to_dict()})
    assert config.image_encoder.global_attn_indexes == (2, 5)


def test_mlp_ratio_counts_where_mlp_dim_is_missing():
    for vision, mlp_dim in [
        ({"hidden_size": 384}, 1536),
        ({"hidden_size": 384, "mlp_ratio": 2.5}, 960),
        ({"hidden_size": 384, "mlp_ratio": 2.5, "mlp_dim": None}, 960),
        ({"hidden_size": 384, "mlp_ratio": 2.5, "mlp_dim": 7}, 7),
    ]:
        assert from_hf({"vision_config": vision}).image_encoder.mlp_dim == mlp_dim
        assert transformers.models.sam.SamVisionConfig(**vision).mlp_dim == mlp_dim


def test_statistics_of_pixels():
    assert from_hf({}).pixel_mean == (123.675, 116.28, 103.53)
    assert from_hf({}).pixel_std == (58.395, 57.12, 57.375)
    preprocessor = {"image_mean": [0, 0.5, 1], "image_std": [1, 0.1, 0.2], "do_pad": True}
    config = from_hf({}, preprocessor)
    assert config.pixel_mean == (0, 127.5, 255)
    assert config.pixel_std == (255, 25.5, 51)
    raw = from_hf({}, {"do_rescale": False, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]})
    assert (raw.pixel_mean, raw.pixel_std) == ((1, 2, 3), (4, 5, 6))
    plain = from_hf({}, {"do_normalize": False, "size": {"longest_edge": 1024}})
    assert (plain.pixel_mean, plain.pixel_std) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"image_mean": [0.5]}, "pixel_mean is (127.5,) and pixel_std is (58.395, 57.12, 57.375),"),
        ({"image_std": [0.1, 0, 0.1]}, "with positive deviations"),
        ({"image_mean": [float("nan")] * 3}, "has image_mean [nan, nan, nan], expected numbers"),
        ({"image_std": "0.5"}, "has image_std '0.5', expected numbers"),
        ({"rescale_factor": 0}, "has rescale_factor 0, expected more than 0"),
        ({"rescale_factor": 1e-320}, "pixel_mean is (inf, inf, inf), expected"),
        ([0.5], "the image processor's configuration is [0.5], expected names and values"),
        (
            {"size": {"longest_edge": 512}},
            "has size {'longest_edge': 512}, expected {'longest_edge': 1024}",
        ),
        ({"size": {"shortest_edge": 5}}, "has size {'shortest_edge': 5}"),
        ({"resample": 0}, "has resample 0, expected 2"),
        ({"do_resize": False}, "has do_resize False, expected True"),
    ],
    ids=str,
)
def test_bad_preprocessors(preprocessor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf({}, preprocessor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "sam2"}, "describes a 'sam2' model, expected model_type 'sam'"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is 'relu', not"),
        ({"vision_config": {"num_channels": 4}}, "vision_config.num_channels is 4, not 3"),
        ({"vision_config": {"image_size": 512}}, "prompt_encoder_config.image_size is 1024, not"),
        (
            {"mask_decoder_config": {"hidden_size": 128}},
            "mask_decoder_config.hidden_size is 128, not 256",
        ),
        ({"vision_config": {"hidden_size": 100}}, "embed_dim 100 is not a multiple of num_heads"),
        (
            {"vision_config": {"image_size": [1024, 512]}},
            "vision_config.image_size is [1024, 512], expected one positive integer",
        ),
        (
            {"vision_config": {"patch_size": [16, 16]}},
            "vision_config.patch_size is [16, 16], expected one positive integer",
        ),
        ({"vision_config": {"hidden_size": "768"}}, "hidden_size is '768', expected one positive"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0, expected one"),
        ({"vision_config": {"mlp_ratio": "4"}}, "mlp_ratio is '4', expected one number"),
        ({"vision_config": {"global_attn_indexes": 2}}, "indexes is 2, expected a list of indices"),
        ([{}], "config.json is [{}], expected names and values"),
        ({"vision_config": [1]}, "vision_config of config.json is [1], expected names and values"),
        ({"mask_decoder_config": "x"}, "mask_decoder_config of config.json is 'x', expected names"),
    ],
    ids=str,
)
def test_from_hf_refuses_unsupported_values(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(values)


def test_hf_configs_cannot_hold_a_mask_threshold():
    with pytest.raises(ValueError, match=r"mask_threshold is 0\.5"):
        to_hf(dataclasses.replace(vit_b(), mask_threshold=0.5))


def test_all_problems_are_listed():
    values = {"vision_config": {"hidden_act": "relu", "num_channels": 4}}
    with pytest.raises(ValueError, match=r"hidden_act is 'relu'.*; vision_config.num_channels"):
        from_hf(values)


def test_mobile_sam_has_no_hf_config():
    with pytest.raises(ValueError, match="no TinyViT encoder; write the Meta format instead"):
        to_hf(mobile_sam())
