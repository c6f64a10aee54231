import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from reference import SMALL, assert_close, meta_sam, ours, tensor

from sam_jax.checkpoints import CheckpointError
from sam_jax.checkpoints.params import (
    build_model,
    check_tensors,
    flat_params,
    param_shapes,
    params_sha256,
    resize_positions,
)


def test_flat_params_and_back():
    model = ours(meta_sam(SMALL), SMALL)
    flat = flat_params(model)
    assert {k: v.shape for k, v in flat.items()} == param_shapes(SMALL)
    again = flat_params(build_model(dict(flat), SMALL))
    for name, value in flat.items():
        np.testing.assert_array_equal(again[name], value)


def test_the_model_does_not_alias_its_parameters():
    params = {k: np.array(v) for k, v in flat_params(ours(meta_sam(SMALL), SMALL)).items()}
    name = "image_encoder.neck.conv2.kernel"
    array = params[name]
    model = build_model(params, SMALL)
    before = np.array(flat_params(model)[name])
    array[...] = 0
    np.testing.assert_array_equal(flat_params(model)[name], before)


def test_positions_are_resized():
    params = {k: np.asarray(v) for k, v in flat_params(ours(meta_sam(SMALL), SMALL)).items()}
    resized, config = resize_positions(params, SMALL, 160)
    assert config == dataclasses.replace(SMALL, image_size=160)
    assert {k: v.shape for k, v in resized.items()} == param_shapes(config)
    interpolate = torch.nn.functional.interpolate
    name = "image_encoder.pos_embed"
    expected = interpolate(tensor(params[name]).permute(0, 3, 1, 2), (20, 20), mode="bilinear")
    assert_close(resized[name], expected.permute(0, 2, 3, 1))
    name = "image_encoder.blocks.1.attn.rel_pos_w"  # of a global block
    expected = interpolate(tensor(params[name]).T[None], 39, mode="linear")[0].T
    assert_close(resized[name], expected)
    for name, value in resized.items():
        if value.shape == params[name].shape:  # window layers keep their tables
            np.testing.assert_array_equal(value, params[name])


def test_image_size_must_fit_the_patches():
    with pytest.raises(ValueError, match="100 is not a multiple of the patch size 8"):
        resize_positions({}, SMALL, 100)


def test_check_tensors_lists_all_problems():
    found = {
        "a": np.zeros(1, ml_dtypes.bfloat16),
        "b": np.zeros(2),
        "d": np.zeros(()),
        "e": np.zeros(3, np.int8),
        "bn.num_batches_tracked": np.zeros((), np.int64),
    }
    expected = {"a": (1,), "b": (3,), "c": (4, 5), "e": (3,), "bn.num_batches_tracked": ()}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, expected)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: c (4, 5)",
        "  wrong shape: b is (2,), expected (3,)",
        "  unexpected: d ()",
        "  wrong dtype: e is int8, expected floats",
    ]


def test_digests_tell_parameters_apart():
    params = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, ml_dtypes.bfloat16)}
    assert params_sha256(params) == params_sha256(dict(reversed(params.items())))
    others = [
        {**params, "a": np.zeros((3, 2), np.float32)},
        {**params, "a": np.zeros((2, 3), np.int32)},
        {**params, "a": params["a"] - 0.0},
        {"a": params["a"], "c": params["b"]},
    ]
    others[2]["a"][0, 0] = -0.0
    assert len({params_sha256(p) for p in (params, *others)}) == 5
