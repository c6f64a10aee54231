import numpy as np
import pycocotools.mask
import pytest
import torch
import torch_reference
from logits import blobs

from sam_jax.ops.rle import rle_area, rle_compress, rle_decode, rle_encode, rle_uncompress

amg = torch_reference.import_reference("segment_anything").utils.amg


# pycocotools' decoder makes numpy 2 warn.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("seed", range(3))
def test_run_lengths(seed):
    some = blobs((37, 53), seed, 2) > 0
    for mask in (some, ~some, some & False, some | True, some.T, some[:1], some[:, :1]):
        rle = rle_encode(mask)
        (expected,) = amg.mask_to_rle_pytorch(torch.tensor(np.ascontiguousarray(mask))[None])
        assert rle == expected
        assert all(type(n) is int for n in (*rle["counts"], *rle["size"]))
        np.testing.assert_array_equal(rle_decode(rle), mask)
        assert rle_area(rle) == mask.sum()
        assert rle_uncompress(rle_compress(rle)) == rle
        compressed = pycocotools.mask.frPyObjects(rle, *rle["size"])
        np.testing.assert_array_equal(pycocotools.mask.decode(compressed), mask)


@pytest.mark.usefixtures("unchecked")
def test_only_masks_are_encoded():
    for mask in (np.eye(3), np.zeros((2, 3, 4), bool), np.zeros((0, 3), bool)):
        with pytest.raises(ValueError, match=r"expected (bool \(h, w\)|one with pixels)"):
            rle_encode(mask)


def test_wrong_form_of_run_lengths():
    whole, text = rle_encode(np.eye(3) > 0), rle_compress(rle_encode(np.eye(3) > 0))
    for function in (rle_decode, rle_area, rle_compress):
        with pytest.raises(ValueError, match="are compressed; call rle_uncompress first"):
            function(text)
    with pytest.raises(ValueError, match="which is not compressed"):
        rle_uncompress(whole)
    with pytest.raises(ValueError, match="do not fill the mask"):
        rle_compress({"size": [3, 3], "counts": [4]})


@pytest.mark.parametrize("counts", ["\x00", "é", "o" * 40, b"\xff"])
def test_strings_that_are_not_run_lengths(counts):
    with pytest.raises(ValueError, match="is not a string of COCO's run lengths"):
        rle_uncompress({"size": [5, 7], "counts": counts})


@pytest.mark.parametrize("counts", ["o", "1o", b"0Po"])
def test_a_string_that_ends_within_a_number(counts):
    with pytest.raises(ValueError, match="o' ends within a number of COCO's run lengths"):
        rle_uncompress({"size": [5, 7], "counts": counts})


@pytest.mark.parametrize("counts", [[], [9], [30, 6], [40, -5]])
def test_run_lengths_that_do_not_fill_the_mask(counts):
    message = rf"their sum is {sum(counts)} and the smallest .*, expected 5 x 7 and none below 0"
    with pytest.raises(ValueError, match=message):
        rle_decode({"size": [5, 7], "counts": counts})
