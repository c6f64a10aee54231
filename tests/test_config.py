import dataclasses
import json
import math
import random
import re

import pytest
import transformers
from reference import SMALL, SMALL_TINY

from sam_jax.checkpoints.hf_config import from_hf, to_hf
from sam_jax.checkpoints.params import param_shapes
from sam_jax.config import (
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamConfig,
    TinyViTConfig,
    ViTConfig,
    lite_medsam,
    mobile_sam,
    vit_b,
    vit_h,
    vit_l,
    with_preprocessing,
)

PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


def with_hf_norm(config):
    """The same, with the epsilon that Hugging Face's mask decoder has by default."""
    decoder = dataclasses.replace(config.mask_decoder, layer_norm_eps=1e-6)
    return dataclasses.replace(config, mask_decoder=decoder)


@pytest.mark.parametrize(
    ("make", "count"),
    [(vit_b, 93_735_472), (vit_l, 312_342_832), (vit_h, 641_090_608)],
)
def test_parameter_counts(make, count):
    shapes = param_shapes(make())
    (buffer,) = (name for name in shapes if name.endswith("gaussian_matrix"))
    assert math.prod(shapes[buffer]) == 256
    assert sum(map(math.prod, shapes.values())) - 256 == count


def test_derived_sizes():
    assert vit_b().image_embedding_size == 64
    assert vit_b().mask_size == 256
    assert mobile_sam().image_embedding_size == 64
    assert [make().image_encoder.head_dim for make in (vit_b, vit_l, vit_h)] == [64, 64, 80]
    assert (SMALL.image_embedding_size, SMALL.mask_size) == (12, 48)


def test_configs_are_hashable_and_compare_by_value():
    assert hash(vit_b()) == hash(vit_b())
    assert len({vit_b(), vit_b(), vit_l(), vit_h(), mobile_sam()}) == 4


@pytest.mark.parametrize("config", [vit_b(), vit_l(), vit_h(), mobile_sam(), SMALL])
def test_json_round_trip(config):
    again = SamConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_parts_that_are_left_out_take_their_defaults():
    assert SamConfig.from_dict({"image_encoder_type": "vit"}) == vit_b()
    assert SamConfig.from_dict({"image_encoder_type": "tiny_vit"}) == mobile_sam()
    values = {"image_encoder_type": "vit", "mask_decoder": {"mlp_dim": 64}, "image_size": 512}
    expected = SamConfig(mask_decoder=MaskDecoderConfig(mlp_dim=64), image_size=512)
    assert SamConfig.from_dict(values) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": 512}, r"config has unknown keys ['image_sizes']; known: "),
        ({"image_encoder": {"width": 3}}, "image_encoder has unknown keys ['width']; known: "),
        ({"mask_decoder": {"a": 1, "b": 2}}, "mask_decoder has unknown keys ['a', 'b']"),
        ({"image_encoder_type": "resnet"}, "is 'resnet', expected one of ['tiny_vit', 'vit']"),
        ({"image_encoder_type": None}, "is None, expected one of"),
        ({"image_encoder_type": []}, "is [], expected one of"),
        ({"image_encoder": None}, "image_encoder is None, expected names and values"),
        ([1], "config is [1], expected names and values"),
    ],
    ids=str,
)
def test_from_dict_refuses_what_it_does_not_know(change, message):
    values = vit_b().to_dict() | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=re.escape(message)):
        SamConfig.from_dict(values)


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim 100 is not a multiple of num_heads 12"):
        ViTConfig(embed_dim=100)
    with pytest.raises(ValueError, match="image_size 1000 is not a multiple of the patch size 16"):
        SamConfig(image_size=1000)
    with pytest.raises(ValueError, match="image_size 1000 is not a multiple of the patch size 16"):
        SamConfig(TinyViTConfig(), image_size=1000)


def test_lite_medsam_has_a_grid_of_64_from_256_pixels():
    config = lite_medsam()
    assert (config.image_size, config.image_embedding_size, config.mask_size) == (256, 64, 256)
    with pytest.raises(ValueError, match="stem_stride is 3, expected 1 or 2"):
        TinyViTConfig(stem_stride=3)


FOUR = "for each of the four stages"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (TinyViTConfig, {"depths": (2, 2)}, f"depths is (2, 2), expected an integer of .* {FOUR}"),
        (TinyViTConfig, {"num_heads": (2, 4)}, f"num_heads is (2, 4), expected .* {FOUR}"),
        (TinyViTConfig, {"embed_dims": (64, 128, 320)}, "embed_dims is (64, 128, 320), expected "),
        (TinyViTConfig, {"embed_dims": (0, 0, 0, 0)}, "is (0, 0, 0, 0), expected .* at least 2"),
        (TinyViTConfig, {"window_sizes": (7, 0, 14, 7)}, "window_sizes is (7, 0, 14, 7), expected"),
        (TinyViTConfig, {"num_heads": (2, 3, 5, 10)}, "multiples of the heads, which 128 is not"),
        (TinyViTConfig, {"mlp_ratio": -4.0}, "mlp_ratio is -4.0 and mbconv_expand_ratio is 4.0"),
        (TinyViTConfig, {"num_classes": 0}, "num_classes is 0, expected int | None"),
        (ViTConfig, {"global_attn_indexes": (50,)}, "is (50,), expected .* from 0 to 11"),
        (PromptEncoderConfig, {"mask_in_chans": 2}, "mask_in_chans is 2, expected at least 4"),
        (TinyViTConfig, {"mlp_ratio": 300.0}, "and make at most 65536 of 320"),
        (ViTConfig, {"depth": 129}, "ViTConfig.depth is 129, expected int up to 128"),
        (TinyViTConfig, {"depths": (2, 2, 129, 2)}, "is (2, 2, 129, 2), expected .* up to 128"),
        (MaskDecoderConfig, {"mlp_dim": 10**6}, "mlp_dim is 1000000, expected int up to 65536"),
        (
            SamConfig,
            {"mask_decoder": MaskDecoderConfig(attention_downsample_rate=512)},
            "attention_downsample_rate is 512, expected both",
        ),
        (SamConfig, {"prompt_embed_dim": 255}, "prompt_embed_dim is 255, expected an even number"),
        (SamConfig, {"prompt_embed_dim": 6}, "is 6, expected an even number of at least 8"),
    ],
    ids=str,
)
def test_what_cannot_be_built(part, values, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        part(**values)


@pytest.mark.parametrize(
    "config",
    [
        SamConfig(TinyViTConfig(embed_dims=(2, 2, 2, 2), num_heads=(0, 1, 1, 1))),
        dataclasses.replace(
            SMALL,
            prompt_encoder=PromptEncoderConfig(mask_in_chans=4),
            mask_decoder=MaskDecoderConfig(num_heads=1, iou_head_depth=1),
            prompt_embed_dim=8,
        ),
    ],
    ids=["tiny_vit", "others"],
)
def test_the_smallest_sizes_can_be_built(config):
    assert all(math.prod(shape) for shape in param_shapes(config).values())


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = [
    *(None, True, False, 0, -1, 1, 2, 3, 10**6, 10**400, 2.0, 0.5, 1e-320, 1e308, -1e308),
    *(math.nan, math.inf, "", "sam", "x" * 1000, [], [[]], [0], [1, 2, 3], [10**400] * 3),
    *([1e308] * 4, ["a", None], {}, {"a": 1}, {1: 2}, _nested(5000), [0] * 4, [1] * 4, [2] * 4),
]


def test_a_configuration_is_built_or_refused(unchecked):
    """Mutated at random: ValueError alone may come out, and what is taken can be built."""
    rng = random.Random(0)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    bases = [
        (SamConfig.from_dict, SMALL.to_dict()),
        (SamConfig.from_dict, SMALL_TINY.to_dict()),
        (from_hf, to_hf(SMALL)),
        (lambda values: from_hf(to_hf(SMALL), values), processor),
    ]
    taken, refused = set(), []
    for i in range(3000):
        function, base = bases[i % 4]
        values = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
        parts = [values, *(part for part in values.values() if isinstance(part, dict))]
        for _ in range(rng.randint(1, 2)):
            part = rng.choice(parts)
            name = rng.choice([*part, "more"])
            part[name] = rng.choice(HOSTILE)
        try:
            taken.add(function(values))
        except ValueError as error:
            refused.append(str(error))
    assert max(map(len, refused)) < 1000
    assert len(taken) > 50
    for config in rng.sample(sorted(taken, key=repr), 5):
        param_shapes(config)


@pytest.mark.parametrize("field", ["resize", "normalization"])
def test_unknown_ways_to_prepare_pictures(field, unchecked):
    with pytest.raises(ValueError, match=f"{field} is 'other', expected "):
        SamConfig(**{field: "other"})
    with pytest.raises(ValueError, match="preprocessing is 'sam', expected 'medsam' or None"):
        with_preprocessing(SamConfig(), "sam")


def test_hugging_face_has_no_place_for_medsams_preprocessing():
    config = with_preprocessing(vit_b(), "medsam")
    assert with_preprocessing(vit_b(), None) == vit_b()
    assert SamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="resize is 'square' and normalization is 'min_max'"):
        to_hf(config)


# --- Hugging Face -------------------------------------------------------------------------------


def test_defaults_are_hfs():
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
    """As `transformers` understands our `config.json`, and writes it again."""
    values = {name: part for name, part in to_hf(config).items() if name in PARTS}
    return transformers.SamConfig(**values).to_dict()


@pytest.mark.parametrize("config", [vit_b(), vit_l(), vit_h(), SMALL], ids=["b", "l", "h", "small"])
def test_round_trip_by_way_of_transformers(config):
    theirs = hf_values(config)
    assert from_hf(json.loads(json.dumps(theirs))) == config
    for part in PARTS:
        for name, value in to_hf(config)[part].items():
            assert theirs[part][name] == value


def test_config_of_a_real_size_is_the_references():
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
    """The default has some; transformers takes no notice of them."""
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
def test_preprocessors_that_cannot_be(preprocessor, message):
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
def test_from_hf_refuses_what_sam_does_not_have(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_hf(values)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (ViTConfig, {"depth": "2"}, "ViTConfig.depth is '2', expected int"),
        (ViTConfig, {"num_heads": 12.0}, "ViTConfig.num_heads is 12.0, expected int"),
        (ViTConfig, {"depth": 0}, "ViTConfig.depth is 0"),
        (MaskDecoderConfig, {"attention_downsample_rate": 0}, "downsample_rate is 0, expected int"),
        (ViTConfig, {"qkv_bias": "yes"}, "ViTConfig.qkv_bias is 'yes', expected bool"),
        (ViTConfig, {"global_attn_indexes": (1, "2")}, "global_attn_indexes is (1, '2')"),
        (TinyViTConfig, {"depths": 2}, "TinyViTConfig.depths is 2"),
        (PromptEncoderConfig, {"layer_norm_eps": "x"}, "layer_norm_eps is 'x', expected float"),
        (MaskDecoderConfig, {"mlp_dim": None}, "MaskDecoderConfig.mlp_dim is None, expected int"),
        (SamConfig, {"image_size": 96.0}, "SamConfig.image_size is 96.0, expected int"),
        (SamConfig, {"mask_threshold": None}, "SamConfig.mask_threshold is None, expected float"),
    ],
)
def test_wrong_types(part, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        part(**values)


def test_a_threshold_of_masks_has_no_place_in_hf():
    with pytest.raises(ValueError, match=r"mask_threshold is 0\.5"):
        to_hf(dataclasses.replace(vit_b(), mask_threshold=0.5))


def test_all_that_is_wrong_is_listed():
    values = {"vision_config": {"hidden_act": "relu", "num_channels": 4}}
    with pytest.raises(ValueError, match=r"hidden_act is 'relu'.*; vision_config.num_channels"):
        from_hf(values)


def test_mobile_sam_has_no_hf_config():
    with pytest.raises(ValueError, match="no TinyViT encoder; write the Meta format instead"):
        to_hf(mobile_sam())
