import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import SMALL, assert_close, meta_sam, normal, ours, run, tensor, to_torch

from sam_jax.models.layers import gelu, join_pixels
from sam_jax.models.mask_decoder import output_slice

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL)
    return torch_sam.mask_decoder, ours(torch_sam, SMALL).mask_decoder


EMBEDDING, PE = normal((12, 12, 32)), normal((12, 12, 32), seed=1)
SPARSE, DENSE = normal((3, 32), seed=2), normal((12, 12, 32), seed=3)
REAL = jnp.ones(3, bool)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("dense", [DENSE, normal((32,), seed=4)], ids=["mask", "no_mask"])
def test_decoder(pair, multimask, dense):
    reference, decoder = pair
    masks, scores = reference(
        image_embeddings=to_torch(EMBEDDING)[None],
        image_pe=to_torch(PE)[None],
        sparse_prompt_embeddings=tensor(SPARSE)[None],
        dense_prompt_embeddings=to_torch(np.broadcast_to(dense, (12, 12, 32)))[None],
        multimask_output=multimask,
    )
    graphdef, state = nnx.split(decoder)
    actual = jax.jit(
        lambda state, *args: nnx.merge(graphdef, state)(*args, multimask_output=multimask)
    )(state, EMBEDDING, PE, SPARSE, REAL, dense)
    assert_close(actual[0], masks[0])
    assert_close(actual[1], scores[0])


def test_upscaling(pair):
    reference, decoder = pair
    x = normal((12, 12, 32), seed=5)
    expected = reference.output_upscaling(to_torch(x)[None])[0]
    actual = join_pixels(gelu(run(decoder.output_upscaling, x)))
    assert_close(actual, np.moveaxis(expected.detach().numpy(), 0, -1))


def test_heads(pair):
    reference, decoder = pair
    x = normal((32,), seed=6)
    assert_close(run(decoder, x, method="predict_iou"), reference.iou_prediction_head(tensor(x)))
    for ours_head, torch_head in zip(
        decoder.output_hypernetworks_mlps, reference.output_hypernetworks_mlps, strict=True
    ):
        assert_close(run(ours_head, x), torch_head(tensor(x)))


def test_scores_need_no_mask(pair):
    """The IoU head reads only one token, so everything mode can filter masks before upscaling."""
    _, decoder = pair
    outputs = output_slice(multimask_output=True)

    @jax.jit
    def both_scores(decoder, *inputs):
        iou_token, _, _ = decoder.run_transformer(*inputs, outputs)
        _, scores = decoder(*inputs, multimask_output=True)
        return decoder.predict_iou(iou_token)[outputs], scores

    assert_close(*both_scores(decoder, EMBEDDING, PE, SPARSE, REAL, DENSE))
