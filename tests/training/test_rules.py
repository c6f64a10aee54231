import jax
import numpy as np
import pytest
from flax import nnx
from reference import SMALL, SMALL_TINY, meta_sam, ours

from sam_jax import SamProcessor
from sam_jax.checkpoints.params import flat_params, param_shapes
from sam_jax.training.rules import (
    DECODER_ONLY,
    EVERYTHING,
    OptimizerConfig,
    adamw,
    combine,
    layer_decay,
    learning_rate_scale,
    partition,
)
from sam_jax.training.transform import ExampleTransform


@pytest.fixture(scope="module")
def model():
    return ours(meta_sam(SMALL), SMALL)


def names(state):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_split_and_merge(model):
    trained, rest = partition(model, DECODER_ONLY)
    every = set(param_shapes(SMALL))
    assert names(trained) == {n for n in every if n.startswith("mask_decoder.")}
    assert names(rest.state) == every - names(trained)
    merged = flat_params(combine(trained, rest))
    for name, value in flat_params(model).items():
        np.testing.assert_array_equal(merged[name], value)


def test_unmatched_parameters_are_frozen(model):
    trained, rest = partition(model, [(r"mask_decoder\.iou_token", 1.0)])
    assert names(trained) == {"mask_decoder.iou_token"}
    assert names(rest.state) == set(param_shapes(SMALL)) - names(trained)


class Deep(nnx.Module):
    """Twelve blocks, as in real models: sorted by name, the tenth comes before the second."""

    def __init__(self):
        self.blocks = nnx.List(nnx.Param(np.full(1, i, np.float32)) for i in range(12))


def test_blocks_keep_their_order():
    model = combine(*partition(Deep()))
    assert [float(block[...][0]) for block in model.blocks] == [*range(12)]


@pytest.mark.usefixtures("unchecked")
def test_mismatched_parts(model):
    params, rest = partition(model)
    with pytest.raises(TypeError, match="rest is State, expected the second result of partition"):
        combine(rest, params)
    for other in (partition(model, DECODER_ONLY)[0], {"a": 1}, None):
        with pytest.raises(ValueError, match="params do not belong to rest: Incorrect number of"):
            combine(other, rest)
    with pytest.raises(TypeError, match=r"model is {'a': 1}, expected a Sam or an"):
        partition({"a": 1})


def test_buffers_never_train(model):
    trained, rest = partition(model, EVERYTHING)
    assert any("gaussian" in n for n in names(rest.state))
    assert not any("gaussian" in n for n in names(trained))
    trained, rest = partition(ours(meta_sam(SMALL_TINY), SMALL_TINY), EVERYTHING)
    assert all(n.endswith((".mean", ".var")) or "gaussian" in n or "head" in n or "num_b" in n
               for n in names(rest.state))  # fmt: skip


def test_the_first_expression_counts():
    table = [(r"a\..*", None), (r".*\.bias", 0.5), (".*", 1.0)]
    assert learning_rate_scale("a.bias", table) is None
    assert learning_rate_scale("b.bias", table) == 0.5
    assert learning_rate_scale("b.kernel", table) == 1.0
    assert learning_rate_scale("b.kernel", table[:2]) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([("mask_decoder/.*", 1.0)], r"'mask_decoder/.\*' matches none of the model's parameters"),
        ([("(", 1.0)], r"'\(' is not a regular expression"),
        ([(".*", 0.0)], "has scale 0.0, expected above 0, or None to freeze"),
        ([(".*", None)], "nothing trains"),
    ],
)
def test_bad_tables(model, table, message):
    with pytest.raises(ValueError, match=message):
        partition(model, table)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "table", ["decoder", None, {".*": 1.0}, [".*"], [(".*", "1")], [(".*", True)]], ids=str
)
def test_a_table_has_pairs(model, table):
    with pytest.raises(TypeError, match=r"expected pairs of .*; or pass one of sam_jax"):
        partition(model, table)
    with pytest.raises(TypeError, match=r"expected pairs of .*; or pass one of sam_jax"):
        adamw(1e-3, table)


def test_layer_decay_matches_detectron2():
    table = layer_decay(SMALL, 0.5)
    expected = {
        "image_encoder.pos_embed": 0.125,
        "image_encoder.patch_embed.kernel": 0.125,
        "image_encoder.blocks.0.attn.qkv.kernel": 0.25,
        "image_encoder.blocks.1.norm1.scale": 0.5,
        "image_encoder.neck.conv1.kernel": 1.0,
        "mask_decoder.iou_token": 1.0,
    }
    for name, scale in expected.items():
        assert name in param_shapes(SMALL)
        assert learning_rate_scale(name, table) == scale
    with pytest.raises(ValueError, match="for ViT encoders, and this one is a TinyViT"):
        layer_decay(SMALL_TINY, 0.5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call",
    [
        lambda model: layer_decay(model, 0.5),
        lambda model: ExampleTransform(model, 3, target_size=24),
        SamProcessor,
    ],
)
def test_a_model_is_not_a_configuration(model, call):
    with pytest.raises(TypeError, match=r"config is a Sam, expected a SamConfig: .* model\.config"):
        call(model)


@pytest.mark.usefixtures("unchecked")
def test_bad_numbers_for_adamw():
    for options, message in (
        ({"learning_rate": "a"}, "learning_rate is 'a', expected a number"),
        ({"weight_decay": -1}, "weight_decay is -1, expected 0 or more"),
        ({"table": [(".*", -1)]}, r"the scale of '\.\*' is -1, expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw(**{"learning_rate": 1e-3, "table": EVERYTHING, **options})
    with pytest.raises(ValueError, match="decay is -3, expected above 0"):
        layer_decay(SMALL, -3)


def test_scales_decay_and_clipping(model):
    table = [(r"mask_decoder\.iou_.*", 0.1), (r"prompt_encoder\..*", 1.0), (".*", None)]
    trained, _ = partition(model, table)
    grads = jax.tree.map(np.ones_like, trained)

    def moves(**options):
        tx = adamw(1e-2, table, **options)
        updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, trained)
        return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(updates)}

    plain = moves(weight_decay=0.0)
    np.testing.assert_allclose(plain["mask_decoder.iou_token"], -1e-3, rtol=1e-5)
    np.testing.assert_allclose(plain["prompt_encoder.no_mask_embed"], -1e-2, rtol=1e-5)
    decayed, parameters = moves(weight_decay=0.5), flat_params(model)
    for name, value in decayed.items():
        scale = 1e-3 if name.startswith("mask_decoder") else 1e-2
        decay = 0.5 * np.asarray(parameters[name]) if name.endswith("kernel") else 0
        np.testing.assert_allclose(value, plain[name] - scale * decay, rtol=1e-4, atol=1e-8)
    # With a large epsilon, updates show how large the gradients were.
    clipped = moves(weight_decay=0.0, clip_norm=1e-3, eps=1.0)
    count = sum(x.size for x in jax.tree.leaves(grads))
    expected = -1e-2 * 1e-3 / count**0.5
    np.testing.assert_allclose(clipped["prompt_encoder.no_mask_embed"], expected, rtol=1e-4)


def test_kernels_and_adapters_decay():
    names = "kernel", "lora_a", "lora_b", "bias", "scale", "pos_embed"
    params = {name: np.ones(2, np.float32) for name in names}
    tx = adamw(1.0, EVERYTHING, weight_decay=0.5)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    assert [float(updates[name][0]) for name in names] == [-0.5, -0.5, -0.5, 0, 0, 0]


@pytest.mark.parametrize(("steps", "warmup"), [(100, 20), (10, 5)])
def test_the_rate_rises_then_falls(steps, warmup):
    """In a short run, a warm-up of 20 steps is shortened to half of the steps."""
    constant = OptimizerConfig(learning_rate=0.5, warmup=20, schedule="constant")
    rates = [constant.build(EVERYTHING, n)[1](np.arange(30)) for n in (steps, 1000)]
    np.testing.assert_allclose(rates, [np.minimum(np.arange(30) / 40, 0.5)] * 2, rtol=1e-6)
    _, rate = OptimizerConfig(learning_rate=0.5, warmup=20).build(EVERYTHING, steps)
    middle = warmup + (steps - warmup) / 2
    found = [float(rate(step)) for step in (0, warmup / 2, warmup, middle, steps)]
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.25, 0], atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate is -0.001, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a number"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', expected a number"),
        ({"schedule": "linear"}, "schedule is linear, expected cosine or constant"),
        ({"warmup": -5}, "warmup is -5, expected a whole number of at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected 0 or more"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, expected above 0"),
    ],
)
def test_bad_optimizers(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)
    with pytest.raises(ValueError, match="steps is 0, expected a whole number of at least 1"):
        OptimizerConfig().build(EVERYTHING, 0)
