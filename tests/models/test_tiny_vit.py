import numpy as np
import pytest
from reference import (
    MOBILE,
    assert_close,
    from_torch_image,
    meta_sam,
    normal,
    ours,
    run,
    tensor,
    to_torch,
)


@pytest.fixture(scope="module")
def pair():
    torch_sam = meta_sam(MOBILE)
    return torch_sam.image_encoder, ours(torch_sam, MOBILE).image_encoder


@pytest.fixture(scope="module")
def intermediates(pair):
    """The reference's input and output of every stage, for one 1024-pixel picture."""
    reference, _ = pair
    values = {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: values.update({name: (inputs[0], output)})
        )
        for name, module in [
            ("patch_embed", reference.patch_embed),
            *((f"layer{i}", layer) for i, layer in enumerate(reference.layers)),
            ("neck", reference.neck),
            ("encoder", reference),
        ]
    ]
    reference(to_torch(normal((1, 1024, 1024, 3))))
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


def test_block_with_padded_window(pair):
    """A 64 x 64 grid in windows of 7 and 14 is padded; padded positions are attended."""
    reference, encoder = pair
    for stage in (1, 2):
        block = reference.layers[stage].blocks[0]
        side = block.input_resolution[0]
        assert side % block.window_size
        x = normal((1, side, side, block.dim), seed=stage)
        expected = block(tensor(x).reshape(1, side * side, -1))
        assert_close(run(encoder.layers[stage].blocks[0], x), grid_last(expected))
