import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SMALL, SMALL_TINY, hf_sam, meta_sam
from state_dicts import state_dict

from sam_jax.checkpoints import CheckpointError
from sam_jax.checkpoints.infer_config import infer_config
from sam_jax.checkpoints.names import detect_format, from_torch, to_torch, torch_name
from sam_jax.checkpoints.params import param_shapes


@pytest.mark.parametrize("small", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_round_trip_through_meta_names(small):
    """The values become JAX arrays, as in a model; PyTorch's int64 is restored, too."""
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


def test_names_are_unique():
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


def test_all_mismatches_are_listed():
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
    assert "unexpected: mask_decoder.hq_token.weight (1, 32)" in message


@pytest.mark.parametrize("start", ["", "image_encoder.", "vision_encoder."])
def test_an_image_encoder_alone(start):
    with pytest.raises(
        CheckpointError, match="checkpoint of an image encoder, expected a whole SAM"
    ):
        detect_format({f"{start}patch_embed.proj.weight": np.zeros(3)})


def test_tensors_of_another_model():
    with pytest.raises(
        CheckpointError, match=r"not a SAM checkpoint: found 1 tensors, such as fc.weight"
    ):
        detect_format({"fc.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="found 0 tensors; expected"):
        detect_format({})


def test_hugging_face_has_no_tiny_vit():
    params = from_torch(state_dict(meta_sam(SMALL_TINY)), SMALL_TINY, param_shapes(SMALL_TINY))
    with pytest.raises(ValueError, match="no TinyViT encoder"):
        to_torch(params, SMALL_TINY, "hf")


@pytest.mark.slow
@pytest.mark.parametrize("small", [SMALL, SMALL_TINY], ids=["vit", "tiny_vit"])
def test_any_missing_or_misshapen_tensor_is_an_error(small):
    tensors = state_dict(meta_sam(small))
    shapes = param_shapes(small)
    for name, tensor in tensors.items():
        missing = {k: v for k, v in tensors.items() if k != name}
        misshapen = {**tensors, name: tensor.reshape(-1)[:1].reshape(1, 1, 1, 1, 1)}
        for broken in (missing, misshapen):
            with pytest.raises(CheckpointError):
                from_torch(broken, infer_config(broken), shapes)
