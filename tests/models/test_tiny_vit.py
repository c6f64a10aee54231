import numpy as np
import pytest
from reference import (
    SMALL_TINY,
    assert_close,
    from_torch_image,
    meta_sam,
    normal,
    ours,
    run,
    tensor,
    to_torch,
    torch_encode,
)

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(SMALL_TINY)
    return torch_sam, ours(torch_sam, SMALL_TINY).image_encoder


@pytest.fixture(scope="module")
def intermediates(pair):
    """The reference's input and output of every stage, and of the whole."""
    reference, values = pair[0].image_encoder, {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: values.update({name: (inputs[0], output)})
        )
        for name, module in [
            ("patch_embed", reference.patch_embed),
            *((f"layer{i}", layer) for i, layer in enumerate(reference.layers)),
            ("neck", reference.neck),
        ]
    ]
    pixels = to_torch(normal((1, 256, 256, 3)))
    values["encoder"] = pixels, torch_encode(pair[0], pixels)
    for hook in hooks:
        hook.remove()
    return values


def grid_last(x):
    """[b, c, h, w] or [b, h * w, c] of a square grid -> [b, h, w, c]."""
    if x.ndim == 4:
        return from_torch_image(x)
    side = int(x.shape[1] ** 0.5)
    return x.detach().numpy().reshape(1, side, side, -1)


@pytest.mark.parametrize(
    "name", ["patch_embed", "layer0", "layer1", "layer2", "layer3", "neck", "encoder"]
)
def test_stage(pair, intermediates, name):
    _, encoder = pair
    module = {"patch_embed": encoder.patch_embed, "neck": encoder.neck, "encoder": encoder}
    module |= {f"layer{i}": layer for i, layer in enumerate(encoder.layers)}
    given, expected = intermediates[name]
    actual = run(module[name], np.asarray(grid_last(given)))
    assert_close(actual, grid_last(expected))


def test_block_with_padded_window(pair, platform):
    """Grids of 32 and 16 are padded for windows of 7 and 14; the padding is attended to.

    Heads are computed in two groups on a CPU, in one elsewhere.
    """
    for stage in (1, 2):
        block = pair[0].image_encoder.layers[stage].blocks[0]
        side = block.input_resolution[0]
        assert side % block.window_size
        x = normal((1, side, side, block.dim), seed=stage)
        expected = block(tensor(x).reshape(1, side * side, -1))
        assert_close(run(pair[1].layers[stage].blocks[0], x), grid_last(expected))


def test_hidden_states_and_attention(pair, intermediates):
    """Compares the stages' outputs, and a block's attention weights.

    No module of the reference returns its weights, so averages of the same values are compared.
    """
    reference, encoder = pair
    pixels = from_torch_image(intermediates["encoder"][0])
    states = run(encoder, pixels, method="hidden_states")
    for i, state in enumerate(states[1:]):
        assert_close(state, grid_last(intermediates[f"layer{i}"][1]))

    x = normal((1, 14, 14, 48), seed=3)  # one window, so that nothing is padded
    block, torch_block = encoder.layers[2].blocks[0], reference.image_encoder.layers[2].blocks[0]
    weights = run(block, x, method="attention_weights")
    flat = tensor(x).reshape(1, 196, 48)
    attention = torch_block.attn
    values = attention.qkv(attention.norm(flat)).reshape(1, 196, 3, 48)[..., 32:].detach().numpy()
    averaged = np.einsum("whqk,wkhd->wqhd", weights, values).reshape(1, 196, 48)
    assert_close(tensor(attention.proj(tensor(averaged)).detach()), attention(flat))
