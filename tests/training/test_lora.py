import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import SHALLOW, meta_sam, normal, ours

from sam_jax.checkpoints import save_pretrained
from sam_jax.checkpoints.params import flat_params
from sam_jax.checkpoints.safetensors import write_safetensors
from sam_jax.training.lora import add_lora, load_lora, merge_lora, save_lora, unmerge_lora
from sam_jax.training.rules import LORA_ONLY, adamw, combine, partition
from sam_jax.training.step import TrainConfig, compile_step, init_state

# Attention of the encoder, and of the decoder, which regroups its projections.
PATTERN = r"(image_encoder|mask_decoder)\..*\.(qkv|proj|q_proj|k_proj|v_proj|out_proj|lin1)"


@pytest.fixture(scope="module")
def plain():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture(scope="module")
def adapted(plain):
    """A model whose adapters are not zero."""
    model = add_lora(plain, PATTERN, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if hasattr(module, "lora_b"):
            module.lora_b[...] = normal(module.lora_b.shape, seed=i, scale=0.1)
    return model


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state):
    pixels = normal((1, SHALLOW.image_size, SHALLOW.image_size, 3))
    points = jnp.array([[[[30.0, 40], [0, 0]], [[10, 20], [50, 60]]]])
    labels = jnp.array([[[1, -1], [2, 3]]])
    sam = nnx.merge(graphdef, state)
    return sam.decode(sam.encode_image(pixels), points, labels)


def predict(model):
    """Masks and scores of a point and a box, through encoder and decoder."""
    return run(*nnx.split(model))


def assert_same(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(e)).max() <= tolerance * np.abs(e).max()


@pytest.mark.slow
def test_new_adapters_change_nothing(plain):
    model = add_lora(plain, PATTERN, rank=2, rngs=nnx.Rngs(0))
    assert_same(predict(model), predict(plain), 1e-6)
    assert not any("lora" in name for name in flat_params(plain))


@pytest.mark.slow
def test_merging_changes_no_output(plain, adapted):
    expected = predict(adapted)
    assert np.abs(np.asarray(expected[0]) - np.asarray(predict(plain)[0])).max() > 0.05
    merged = merge_lora(adapted)
    assert flat_params(merged).keys() == flat_params(plain).keys()
    assert_same(predict(merged), expected, 1e-6)


def test_a_merged_layer_matches_the_adapted_one(adapted):
    merged = merge_lora(adapted)
    x = normal((50, 48))
    applied, plain = (m.image_encoder.blocks[0].attn.qkv for m in (adapted, merged))
    assert_same([plain(x)], [applied(x)], 1e-6)
    # alpha / rank is 2.
    kernel, a, b = (v[...] for v in (applied.kernel, applied.lora_a, applied.lora_b))
    assert_same([plain.kernel[...]], [kernel + 2 * a @ b], 1e-6)


def test_unmerge_undoes_merge(plain, adapted):
    back = unmerge_lora(merge_lora(adapted), adapted)
    expected = flat_params(adapted)
    for name, value in flat_params(back).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)
    with pytest.raises(ValueError, match="no adapters to remove"):
        unmerge_lora(plain, plain)
    with pytest.raises(ValueError, match="which is not a plain linear layer of this model"):
        unmerge_lora(adapted, adapted)


@pytest.mark.slow
def test_only_adapters_are_written(plain, adapted, tmp_path):
    save_lora(adapted, tmp_path / "lora.safetensors")
    loaded = load_lora(plain, tmp_path / "lora.safetensors")
    expected = flat_params(adapted)
    for name, value in flat_params(loaded).items():
        np.testing.assert_array_equal(value, expected[name])
    assert_same(predict(loaded), predict(adapted), 0)
    size = (tmp_path / "lora.safetensors").stat().st_size
    assert size < sum(v.nbytes for v in flat_params(plain).values()) / 2
    with pytest.raises(FileExistsError, match="exists already"):
        save_lora(adapted, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_lora(plain, tmp_path / "other.safetensors")


@pytest.mark.slow
def test_only_adapters_train(plain):
    model = add_lora(plain, r"image_encoder\..*\.qkv", rank=2, rngs=nnx.Rngs(0))
    trained, rest = partition(model, LORA_ONLY)
    names = {path[-1] for path, _ in nnx.to_flat_state(trained)}
    assert names == {"lora_a", "lora_b"}
    tx = adamw(1e-2, LORA_ONLY)
    state = init_state(trained, tx)
    step = compile_step(state, tx, config=TrainConfig())
    size, side = SHALLOW.image_size, SHALLOW.mask_size
    batch = {
        "pixel_values": np.asarray(normal((1, size, size, 3))),
        "masks": np.arange(side * side).reshape(1, 1, side, side) % 7 == 0,
        "boxes": np.array([[[10, 10, 60, 60]]], np.float32),
        "valid": np.ones((1, 1), np.float32),
    }
    losses = []
    for _ in range(10):
        state = state._replace(step=jnp.int32(0))  # so that every step draws the same clicks
        state, metrics = step(state, rest, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    merged = merge_lora(combine(state.params, rest))
    before = flat_params(plain)
    for name, value in flat_params(merged).items():
        assert np.array_equal(value, before[name]) != name.endswith("qkv.kernel")


def test_a_checkpoint_has_no_adapters(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"has adapters of LoRA, .*; save merge_lora\(model\)"):
        save_pretrained(adapted, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(plain, adapted, tmp_path):
    with pytest.raises(ValueError, match="matches no linear layer; some are image_encoder"):
        add_lora(plain, "qkv", rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank is 0, expected a whole number of at least 1"):
        add_lora(plain, PATTERN, rank=0, rngs=nnx.Rngs(0))
    for alpha in (0, float("nan"), float("inf"), "2"):
        with pytest.raises(ValueError, match=f"alpha is '?{alpha}'?, expected"):
            add_lora(plain, PATTERN, rank=2, alpha=alpha, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="the model is 'mobile_sam', expected a Sam"):
        merge_lora("mobile_sam")
    with pytest.raises(ValueError, match=r"'\*\.qkv' is not a regular expression: "):
        add_lora(plain, "*.qkv", rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="already has adapters; merge them first"):
        add_lora(adapted, PATTERN, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(FileNotFoundError):
        load_lora(plain, tmp_path / "missing.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a file of save_lora"):
        load_lora(plain, bad)
    for scales in ("[" * 100_000, "[1]", '{"a": null}', '{"a": NaN}', '{"a": 1e999}'):
        write_safetensors(bad, {"a.lora_a": np.zeros(2)}, {"lora_scales": scales})
        with pytest.raises(ValueError, match="is not a file of save_lora"):
            load_lora(plain, bad)
    bad.unlink()
    os.mkfifo(bad)
    with pytest.raises(ValueError, match=r"is not a file of save_lora: .*it is not a file"):
        load_lora(plain, bad)
