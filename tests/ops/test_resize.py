import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, normal, tensor

from sam_jax.ops.resize import linear_resize_matrix, mask_resize_matrix, resize_masks, size_bucket

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    ("in_size", "out_size"), [(256, 1024), (1024, 333), (5, 5), (7, 1), (1, 4), (683, 1999), (3, 2)]
)
def test_linear_resize(in_size, out_size):
    signal = normal((in_size,), seed=out_size)
    expected = F.interpolate(
        tensor(signal)[None, None], size=out_size, mode="linear", align_corners=False
    )
    assert_close(linear_resize_matrix(in_size, out_size) @ np.asarray(signal), expected[0, 0])


@pytest.mark.parametrize(
    ("input_size", "original_size"),
    [
        ((1024, 683), (1500, 1001)),
        ((683, 1024), (333, 500)),
        ((1024, 1024), (1024, 1024)),
        ((768, 1024), (75, 100)),
        ((1, 1024), (1, 2000)),
    ],
)
def test_masks_match_two_interpolations(input_size, original_size):
    masks = 10 * normal((3, 256, 256))
    full = F.interpolate(tensor(masks)[None], (1024, 1024), mode="bilinear", align_corners=False)
    full = full[..., : input_size[0], : input_size[1]]
    expected = F.interpolate(full, original_size, mode="bilinear", align_corners=False)[0]
    rows, columns = (
        jnp.asarray(
            mask_resize_matrix(256, 1024, input_size=i, original_size=o, padded_size=size_bucket(o))
        )
        for i, o in zip(input_size, original_size, strict=True)
    )
    actual = np.asarray(resize_masks(masks, rows, columns))
    height, width = original_size
    assert actual.shape == (3, size_bucket(height), size_bucket(width))
    assert not actual[:, height:].any()
    assert not actual[:, :, width:].any()
    assert torch.allclose(tensor(actual[:, :height, :width]), expected, atol=1e-4)


def test_buckets():
    assert [size_bucket(n) for n in (1, 256, 257, 384, 385, 513, 769, 3000, 4001)] == [
        256, 256, 384, 384, 512, 768, 1024, 3072, 4096,
    ]  # fmt: skip
    for n in range(1, 5000, 7):
        assert n <= size_bucket(n) <= max(256, 1.5 * n)
