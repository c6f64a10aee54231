import json
import re

import numpy as np
import pytest
import torch
import torch_reference
from reference import SMALL, meta_sam
from state_dicts import shapes_only, state_dict

from sam_jax.checkpoints import CheckpointError
from sam_jax.checkpoints.hf_config import from_hf, to_hf
from sam_jax.checkpoints.infer_config import infer_config, strip_prefix
from sam_jax.checkpoints.names import from_torch, to_torch
from sam_jax.checkpoints.params import param_shapes
from sam_jax.config import lite_medsam, mobile_sam, vit_b, vit_h, vit_l


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [vit_b, vit_l, vit_h, mobile_sam], ids=["vit_b", "vit_l", "vit_h", "mobile_sam"]
)
def test_published_sizes_are_recognized_and_complete(make):
    expected = make()
    # TinyViT's constructor reads numbers, which "meta" tensors do not have.
    with torch.device("cpu" if make is mobile_sam else "meta"):
        tensors = shapes_only(torch_reference.meta_sam(expected))
    assert infer_config(tensors) == expected
    params = from_torch(tensors, expected, param_shapes(expected))
    assert params.keys() == param_shapes(expected).keys()


def test_lite_medsam_is_recognized_by_its_stem():
    config = lite_medsam()
    shapes = param_shapes(config)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    tensors = to_torch(params, config, "meta")
    assert not any("head" in name and "image_encoder" in name for name in tensors)
    assert infer_config(tensors) == config
    assert from_torch(tensors, config, shapes).keys() == shapes.keys()


@pytest.mark.parametrize("make", [vit_b, vit_h], ids=["vit_b", "vit_h"])
def test_hf_sizes_are_recognized_and_complete(make):
    expected = from_hf({**to_hf(make()), "mask_decoder_config": {}})
    with torch.device("meta"):
        tensors = shapes_only(torch_reference.hf_sam(expected))
    assert infer_config(tensors) == expected
    assert (
        from_torch(tensors, expected, param_shapes(expected)).keys()
        == param_shapes(expected).keys()
    )


@pytest.mark.parametrize(
    ("name", "plain", "left_out"),
    [
        ("image_encoder.patch_embed.proj.bias", "image_encoder.patch_embed.proj.bias", []),
        ("image_encoder._orig_mod.patch_embed.x", "image_encoder.patch_embed.x", ["_orig_mod."]),
        (
            "_fsdp_wrapped_module.sam.image_encoder.module.patch_embed.x",
            "image_encoder.patch_embed.x",
            ["_fsdp_wrapped_module.", "module.", "sam."],
        ),
        ("my_module.vision_encoder.patch_embed.x", "vision_encoder.patch_embed.x", ["my_module."]),
        ("fc.weight", "fc.weight", []),
    ],
)
def test_prefixes(name, plain, left_out):
    tensor = np.zeros(3)
    assert strip_prefix({name: tensor}) == ({plain: tensor}, left_out)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["sam.image_encoder.patch_embed.x", "head.weight"],
            r"begin with 'sam\.', but 1 of the 2 .*'head\.weight'.*whole\.sam\.state_dict",
        ),
        (
            ["student.image_encoder.patch_embed.x", "teacher.image_encoder.patch_embed.x"],
            r"begin with 'student\.', 'teacher\.', but 1 of the 2",
        ),
        (
            ["image_encoder.patch_embed.x", "module.image_encoder.patch_embed.x"],
            r"differ only by module\., so the file has several models",
        ),
    ],
)
def test_prefixes_that_are_not_common(names, message):
    with pytest.raises(CheckpointError, match=message):
        strip_prefix(dict.fromkeys(names, np.zeros(3)))


def test_the_counter_of_an_average_is_ignored():
    names = ["module.image_encoder.patch_embed.x", "n_averaged"]
    plain, left_out = strip_prefix(dict.fromkeys(names, np.zeros(3)))
    assert (list(plain), left_out) == (["image_encoder.patch_embed.x"], ["module."])


def test_a_second_model_is_named_by_its_prefix():
    tensors = state_dict(meta_sam(SMALL))
    tensors |= {f"ema.{name}": tensor for name, tensor in tensors.items()}
    tensors["z" * 10**6] = np.zeros(3, np.float32)
    plain, _ = strip_prefix(tensors)
    with pytest.raises(CheckpointError, match=r"2 problems") as caught:
        from_torch(plain, SMALL, param_shapes(SMALL))
    assert re.search(r"unexpected: \d+ tensors whose names begin with 'ema\.'", str(caught.value))
    assert len(str(caught.value)) < 1000


def test_configuration_that_cannot_be_inferred():
    tensors = state_dict(meta_sam(SMALL))
    del tensors["image_encoder.blocks.0.attn.rel_pos_h"]
    with pytest.raises(CheckpointError, match=r"missing: .*rel_pos_h.*config.json"):
        infer_config(tensors)


def test_small_configurations_are_inferred_except_heads():
    """No shape shows the decoder's number of heads: it is 8, as in every published model."""
    inferred = infer_config(state_dict(meta_sam(SMALL)))
    values, expected = (json.loads(json.dumps(c.to_dict())) for c in (inferred, SMALL))
    assert values["mask_decoder"].pop("num_heads") == 8
    expected["mask_decoder"].pop("num_heads")
    assert values == expected
