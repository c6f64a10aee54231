import dataclasses
import json
import math
import random
import re

import pytest
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


@pytest.mark.slow
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


def test_missing_parts_get_their_defaults():
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
def test_from_dict_refuses_unknown_values(change, message):
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
        (TinyViTConfig, {"num_heads": (2, 3, 5, 10)}, "multiples of the heads, but 128 is not"),
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
def test_bad_values(part, values, message):
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


@pytest.mark.slow
def test_a_configuration_is_built_or_refused(unchecked):
    """Random mutations raise only ValueError, and accepted configurations can be built."""
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
def test_unknown_preprocessing(field, unchecked):
    with pytest.raises(ValueError, match=f"{field} is 'other', expected "):
        SamConfig(**{field: "other"})
    with pytest.raises(ValueError, match="preprocessing is 'sam', expected 'medsam' or None"):
        with_preprocessing(SamConfig(), "sam")


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
