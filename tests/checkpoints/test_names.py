import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from reference import SMALL, SMALL_TINY, hf_sam, meta_sam

from sam_jax.checkpoints import CheckpointError
from sam_jax.checkpoints.hf_config import from_hf, to_hf
from sam_jax.checkpoints.infer_config import infer_config, strip_prefix
from sam_jax.checkpoints.names import detect_format, from_torch, to_torch, torch_name
from sam_jax.checkpoints.params import param_shapes
from sam_jax.config import lite_medsam, mobile_sam, vit_b, vit_h, vit_l


def state_dict(module):
    return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def shapes_only(module):
    """The state dict of a module on PyTorch's "meta" device, as arrays without memory."""
    return {
        k: np.broadcast_to(np.zeros((), np.float32), v.shape)
        for k, v in module.state_dict().items()
    }


@pytest.mark.parametrize(
    "make", [vit_b, vit_l, vit_h, mobile_sam], ids=["vit_b", "vit_l", "vit_h", "mobile_sam"]
)
def test_published_sizes_are_recognised_and_complete(make):
    expected = make()
    # TinyViT looks at numbers while it is made, which "meta" tensors do not have.
    with torch.device("cpu" if make is mobile_sam else "meta"):
        tensors = shapes_only(torch_reference.meta_sam(expected))
    assert infer_config(tensors) == expected
    params = from_torch(tensors, expected, param_shapes(expected))
    assert params.keys() == param_shapes(expected).keys()


def test_lite_medsam_is_told_by_its_stem():
    config = lite_medsam()
    shapes = param_shapes(config)
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    tensors = to_torch(params, config, "meta")
    assert not any("head" in name and "image_encoder" in name for name in tensors)
    assert infer_config(tensors) == config
    assert from_torch(tensors, config, shapes).keys() == shapes.keys()


@pytest.mark.parametrize("make", [vit_b, vit_h], ids=["vit_b", "vit_h"])
def test_hugging_faces_sizes_are_recognised_and_complete(make):
    expected = from_hf({**to_hf(make()), "mask_decoder_config": {}})
    with torch.device("meta"):
        tensors = shapes_only(torch_reference.hf_sam(expected))
    assert infer_config(tensors) == expected
    assert (
        from_torch(tensors, expected, param_shapes(expected)).keys()
        == param_shapes(expected).keys()
    )


@pytest.mark.parametrize("small", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_round_trip_through_meta_names(small):
    """By way of JAX arrays, as a model holds them: PyTorch's int64 comes back, too."""
    tensors = state_dict(meta_sam(small))
    params = jax.tree.map(jnp.asarray, from_torch(tensors, small, param_shapes(small)))
    back = to_torch(params, small, "meta")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_round_trip_through_hugging_faces_names():
    tensors = state_dict(hf_sam(SMALL))
    back = to_torch(from_torch(tensors, SMALL, param_shapes(SMALL)), SMALL, "hf")
    alias = "prompt_encoder.shared_embedding.positional_embedding"
    assert back.keys() == tensors.keys() - {alias}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def test_every_name_is_there_once():
    for fmt in ("meta", "hf"):
        names = [torch_name(path, SMALL, fmt)[0] for path in param_shapes(SMALL)]
        assert len(set(names)) == len(names)


def test_either_name_of_the_tied_tensor():
    tensors = state_dict(hf_sam(SMALL))
    alias = "prompt_encoder.shared_embedding.positional_embedding"
    name = "shared_image_embedding.positional_embedding"
    ours = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    for drop in (alias, name, None):
        kept = {k: v for k, v in tensors.items() if k != drop}
        params = from_torch(kept, SMALL, param_shapes(SMALL))
        np.testing.assert_array_equal(params[ours], tensors[name])
    with pytest.raises(CheckpointError, match=f"{alias} and {name}"):
        from_torch({**tensors, alias: tensors[alias] + 1}, SMALL, param_shapes(SMALL))


def test_everything_that_does_not_fit_is_listed():
    tensors = state_dict(meta_sam(SMALL))
    del tensors["image_encoder.neck.0.weight"], tensors["mask_decoder.iou_token.weight"]
    tensors["image_encoder.pos_embed"] = np.zeros((1, 11, 12, 48), np.float32)
    tensors["mask_decoder.hq_token.weight"] = np.zeros((1, 32), np.float32)
    with pytest.raises(CheckpointError) as caught:
        from_torch(tensors, SMALL, param_shapes(SMALL))
    message = str(caught.value)
    assert "missing: image_encoder.neck.0.weight (32, 48, 1, 1)" in message
    assert "missing: mask_decoder.iou_token.weight (1, 32)" in message
    assert "image_encoder.pos_embed is (1, 11, 12, 48), expected (1, 12, 12, 48)" in message
    assert "left over: mask_decoder.hq_token.weight (1, 32)" in message


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
            r"one name but for module\., so there are several models",
        ),
    ],
)
def test_prefixes_that_are_not_common(names, message):
    with pytest.raises(CheckpointError, match=message):
        strip_prefix(dict.fromkeys(names, np.zeros(3)))


def test_the_counter_of_an_average_is_left_out():
    names = ["module.image_encoder.patch_embed.x", "n_averaged"]
    plain, left_out = strip_prefix(dict.fromkeys(names, np.zeros(3)))
    assert (list(plain), left_out) == (["image_encoder.patch_embed.x"], ["module."])


def test_a_second_model_is_named_by_its_prefix():
    tensors = state_dict(meta_sam(SMALL))
    tensors |= {f"ema.{name}": tensor for name, tensor in tensors.items()}
    tensors["z" * 10**6] = np.zeros(3, np.float32)
    plain, _ = strip_prefix(tensors)
    with pytest.raises(CheckpointError, match=r"2 do not") as caught:
        from_torch(plain, SMALL, param_shapes(SMALL))
    assert re.search(r"left over: \d+ tensors whose names begin with 'ema\.'", str(caught.value))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("start", ["", "image_encoder.", "vision_encoder."])
def test_an_image_encoder_alone(start):
    with pytest.raises(CheckpointError, match="tensors of an image encoder, expected a whole SAM"):
        detect_format({f"{start}patch_embed.proj.weight": np.zeros(3)})


def test_tensors_of_another_model():
    with pytest.raises(CheckpointError, match=r"no tensors of a SAM: 1 tensors, such as fc.weight"):
        detect_format({"fc.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="none at all"):
        detect_format({})


def test_configuration_that_cannot_be_told():
    tensors = state_dict(meta_sam(SMALL))
    del tensors["image_encoder.blocks.0.attn.rel_pos_h"]
    with pytest.raises(CheckpointError, match=r"missing: .*rel_pos_h.*config.json"):
        infer_config(tensors)


def test_hugging_face_has_no_tiny_vit():
    params = from_torch(state_dict(meta_sam(SMALL_TINY)), SMALL_TINY, param_shapes(SMALL_TINY))
    with pytest.raises(ValueError, match="no TinyViT encoder"):
        to_torch(params, SMALL_TINY, "hf")


def test_small_configurations_are_inferred_but_for_heads():
    """The number of the decoder's heads stands in no shape: 8, as in every published model."""
    inferred = infer_config(state_dict(meta_sam(SMALL)))
    values, expected = (json.loads(json.dumps(c.to_dict())) for c in (inferred, SMALL))
    assert values["mask_decoder"].pop("num_heads") == 8
    expected["mask_decoder"].pop("num_heads")
    assert values == expected


@pytest.mark.slow
@pytest.mark.parametrize("small", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_any_one_tensor_missing_or_misshapen_is_a_checkpoint_error(small):
    tensors = state_dict(meta_sam(small))
    shapes = param_shapes(small)
    for name, tensor in tensors.items():
        missing = {k: v for k, v in tensors.items() if k != name}
        misshapen = {**tensors, name: tensor.reshape(-1)[:1].reshape(1, 1, 1, 1, 1)}
        for broken in (missing, misshapen):
            with pytest.raises(CheckpointError):
                from_torch(broken, infer_config(broken), shapes)
