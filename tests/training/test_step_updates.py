"""What a training step changes, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from batches import CONFIG, KEYS, SIDE, batch_of, first_prompts
from flax import nnx
from reference import (
    SHALLOW,
    TINIEST,
    meta_sam,
    normal,
    ours,
    random_sam,
    tensor,
    to_torch,
)
from torch_losses import torch_loss

from sam_jax.checkpoints.names import from_torch
from sam_jax.checkpoints.params import flat_params, param_shapes
from sam_jax.models.layers import split_keys
from sam_jax.training import sharding
from sam_jax.training.interactive import interactive_losses
from sam_jax.training.lora import add_lora
from sam_jax.training.losses import LossWeights
from sam_jax.training.rules import (
    DECODER_ONLY,
    EVERYTHING,
    TABLES,
    OptimizerConfig,
    adamw,
    combine,
    partition,
    updates_made,
)
from sam_jax.training.step import (
    TrainConfig,
    batch_losses,
    compile_step,
    init_state,
    mean_loss,
    train_step,
)

EMBEDDING = (SHALLOW.image_embedding_size,) * 2 + (SHALLOW.prompt_embed_dim,)


def torch_step(sam, batch, keys, learning_rate, weight_decay, eps):
    """Takes a step of PyTorch's AdamW on the paper's loss of the same prompts; returns the loss."""
    kinds = torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d
    kernels = [module.weight for module in sam.modules() if isinstance(module, kinds)]
    names = {id(kernel) for kernel in kernels}
    others = [p for p in sam.parameters() if id(p) not in names]
    optimizer = torch.optim.AdamW(
        [
            {"params": kernels, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        eps=eps,
    )
    embeddings = sam.image_encoder(to_torch(batch["pixel_values"]))
    prompt_keys, _ = split_keys(keys, 2)
    losses = []
    for i, key in enumerate(prompt_keys):
        for k, object_key in enumerate(jax.random.split(key, len(batch["valid"][i]))):
            if not batch["valid"][i, k]:
                continue
            target = batch["masks"][i, k]
            point, box, is_box = first_prompts(
                jax.random.split(object_key, 3)[0], target, batch["boxes"][i, k]
            )
            points = tensor(point[None, None]), torch.ones(1, 1)
            sparse, dense = sam.prompt_encoder(
                points=None if is_box else points,
                boxes=tensor(box[None]) if is_box else None,
                masks=None,
            )
            logits, scores = sam.mask_decoder.predict_masks(
                embeddings[i : i + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            first = torch.arange(4) == 0
            candidates = (first if is_box else ~first)[None]
            losses.append(torch_loss(logits, scores, tensor(target).float()[None], candidates))
    loss = torch.cat(losses).mean()
    optimizer.zero_grad()
    loss.backward()
    for parameter in sam.parameters():
        if parameter.grad is None:  # not in this loss; PyTorch would skip it
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return float(loss.detach())


def test_a_step_on_every_parameter_matches_pytorch():
    """A large epsilon makes the update proportional to the gradient, instead of its sign."""
    reference = meta_sam(SHALLOW)
    model = ours(reference, SHALLOW)
    batch, key = batch_of(2), jax.random.key(1)
    keys = jax.random.split(jax.random.fold_in(key, 0), 2)
    rate, decay, eps = 1e-3, 0.1, 1e-2
    config = dataclasses.replace(CONFIG, ema_decay=0.75)
    before = {name: np.asarray(value) for name, value in flat_params(model).items()}
    expected_loss = torch_step(reference, batch, keys, rate, decay, eps)

    tx = adamw(rate, EVERYTHING, weight_decay=decay, eps=eps)
    trained, rest = partition(model, EVERYTHING)
    state = jax.jit(functools.partial(init_state, tx=tx, ema=True))(trained)
    state, metrics = jax.jit(train_step, static_argnames=("tx", "config"))(
        state, rest, batch, key, tx=tx, config=config
    )
    assert float(metrics["loss"]) == pytest.approx(expected_loss, rel=1e-5)
    after = flat_params(combine(state.params, rest))
    tensors = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    expected = from_torch(tensors, SHALLOW, param_shapes(SHALLOW))
    moved = 0
    for name, value in after.items():
        difference = np.abs(np.asarray(value) - expected[name]).max()
        assert difference <= 1e-6, f"{name}: {difference:.1e}"
        moved += np.abs(np.asarray(value) - before[name]).max() > 1e-5
    assert moved > 0.8 * len(after)
    for name, value in flat_params(combine(state.ema, rest)).items():
        average = 0.75 * before[name] + 0.25 * np.asarray(after[name])
        np.testing.assert_allclose(value, average, atol=1e-6)


@pytest.mark.slow
def test_random_draws_freezing_and_the_moving_average(model):
    batch, key, decay = batch_of(2), jax.random.key(0), 0.75
    before = {name: np.asarray(value) for name, value in flat_params(model).items()}
    tx = adamw(1e-2, DECODER_ONLY)
    trained, rest = partition(model, DECODER_ONLY)
    state = init_state(trained, tx, ema=True)
    step = compile_step(state, tx, config=dataclasses.replace(CONFIG, ema_decay=decay))
    # Random draws depend on the step's number: the same state has another loss in another step.
    copies = [jax.tree.map(jnp.copy, state)._replace(step=jnp.int32(k)) for k in (0, 0, 1)]
    first, again, other = (step(s, rest, batch, key)[1]["loss"] for s in copies)
    assert first == again != other
    expected = jax.tree.map(np.asarray, trained)
    for _ in range(3):
        state, _ = step(state, rest, batch, key)
        expected = jax.tree.map(
            lambda e, p: decay * e + (1 - decay) * np.asarray(p), expected, state.params
        )
    for a, e in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)
    for name, value in flat_params(combine(state.params, rest)).items():
        same = np.array_equal(np.asarray(value), before[name])
        if not name.startswith("mask_decoder."):
            assert same, name
        elif name.endswith("kernel"):
            assert not same, name


@pytest.mark.slow
def test_invalid_objects_change_nothing(model):
    batch, keys = batch_of(2), jax.random.split(jax.random.key(0), 2)
    run = jax.jit(
        lambda batch: mean_loss(batch_losses(model, batch, keys, config=CONFIG), batch["valid"])
    )
    expected, _ = run(batch)
    other = {name: array.copy() for name, array in batch.items()}
    other["masks"][0, -1] = False
    other["boxes"][0, -1] = 0
    actual, metrics = run(other)
    assert float(actual) == float(expected)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_a_batch_without_objects_updates_nothing(model):
    """Momentum, weight decay, the schedule and the moving average stay as they are."""
    tx, _ = OptimizerConfig(warmup=0, weight_decay=0.1).build(DECODER_ONLY, 10)
    trained, rest = partition(model, DECODER_ONLY)
    state = init_state(trained, tx, ema=True)
    step = compile_step(state, tx, config=dataclasses.replace(CONFIG, ema_decay=0.5, accumulate=2))
    key, batch = jax.random.key(0), {**batch_of(2), "dropped": np.array([0, 3], np.int32)}
    nothing = {**batch, "valid": np.zeros((2, 3), np.float32)}
    state, metrics = step(state, rest, batch, key)
    assert (metrics["objects_used"], metrics["objects_dropped"]) == (5, 3)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, rest, nothing, key)
    assert (metrics["objects_used"], metrics["objects_dropped"]) == (0, 3)
    assert int(state.step) == 2
    after = jax.tree.map(np.array, state._replace(step=before.step))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert updates_made(state.opt_state) == 1
    state, _ = step(state, rest, batch, key)
    assert updates_made(state.opt_state) == 2
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True)
    assert any(not np.array_equal(a, b) for a, b in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["decoder", "lora", "everything"])
def test_training_under_jaxs_strict_switches(what):
    """The whole loop except creating the model. (On a CPU, JAX sees no transfers to the host.)"""
    model, mesh = ours(meta_sam(SHALLOW), SHALLOW), sharding.make_mesh()
    if what == "lora":
        model = add_lora(model, r"image_encoder\..*\.(qkv|proj)", rank=2, rngs=nnx.Rngs(0))
    encoder = {} if what == "decoder" else {"remat": True, "drop_path_rate": 0.1}
    config = TrainConfig(num_rounds=4, accumulate=2, ema_decay=0.9, **encoder)
    batch, key = {**batch_of(2), "dropped": np.zeros(2, np.int32)}, jax.random.key(0)
    if what == "decoder":
        del batch["pixel_values"]
        batch["image_embedding"] = np.asarray(normal((2, *EMBEDDING)))
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.transfer_guard("disallow"),
    ):
        tx, _ = OptimizerConfig().build(TABLES[what], 10)
        trained, rest = partition(model, TABLES[what])
        trained, rest = sharding.shard_tree((trained, rest), mesh, parallelism="data")
        make = functools.partial(init_state, tx=tx, ema=True)
        state = sharding.init_sharded(make, trained, mesh=mesh, parallelism="data")
        step = compile_step(state, tx, config=config)
        state, metrics = step(state, rest, sharding.put_batch(batch, mesh), key)
        assert np.isfinite(list(jax.device_get(metrics).values())).all()
        assert updates_made(state.opt_state) == 1
        tuned = sharding.merge_on_host(state.result, rest, mesh=mesh)
        assert len(jax.tree.leaves(tuned)) == len(jax.tree.leaves(model))


@pytest.mark.slow
def test_a_tiny_vit_step_promotes_no_dtype():
    """Only traces the step, which shows promotions: its gradients compile slowly."""
    size, side = TINIEST.image_size, TINIEST.mask_size
    batch = {
        "pixel_values": np.zeros((2, size, size, 3), np.float32),
        "masks": np.zeros((2, 1, side, side), bool),
        "boxes": np.zeros((2, 1, 4), np.float32),
        "valid": np.ones((2, 1), np.float32),
    }
    tx, _ = OptimizerConfig().build(EVERYTHING, 10)
    trained, rest = partition(random_sam(TINIEST), EVERYTHING)
    state = init_state(trained, tx)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        step = compile_step(state, tx, config=TrainConfig(num_rounds=2, remat=True))
        step.trace(state, rest, batch, jax.random.key(0))


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(compilations):
    model = ours(meta_sam(SHALLOW), SHALLOW, dtype=jnp.bfloat16)
    tx = adamw(1e-3, EVERYTHING)
    trained, rest = partition(model, EVERYTHING)
    # Even if the checkpoint was stored in bfloat16.
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
    state = init_state(trained, tx)
    step = compile_step(state, tx, config=CONFIG)
    losses = []
    for _ in range(8):
        compilations.clear()
        state, metrics = step(state, rest, batch_of(2), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert compilations == []
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_custom_training_loop(model):
    """Uses only sam_jax's loss."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adam(1e-3)
    opt_state = tx.init(params)
    batch = jax.tree.map(jnp.asarray, batch_of(2))

    @jax.jit
    def step(params, opt_state, key):
        def loss(params):
            sam = nnx.merge(graphdef, params, rest)
            losses = batch_losses(sam, batch, jax.random.split(key, 2), config=CONFIG)
            return mean_loss(losses, batch["valid"])[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    for _ in range(10):
        params, opt_state, value = step(params, opt_state, jax.random.key(0))
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "num_rounds is 0, expected a whole number of at least 1"),
        ({"num_rounds": 1.5}, "num_rounds is 1.5, expected a whole number of at least 1"),
        ({"box_probability": 1.5}, "box_probability is 1.5, expected 0 to 1"),
        ({"box_probability": None}, "box_probability is None, expected a number"),
        ({"objects_chunk_size": -1}, "objects_chunk_size is -1, expected a whole number"),
        ({"objects_chunk_size": 0}, "objects_chunk_size is 0, expected a whole number"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0, expected 0 or more"),
        ({"accumulate": 0}, "accumulate is 0, expected a whole number of at least 1"),
        ({"weights": LossWeights(focal=-1.0)}, "the weight focal is -1.0, expected 0 or more"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5, expected 0 or more"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masks": np.zeros((1, 3, SIDE, SIDE), np.uint8)}, TypeError, "are uint8, expected bool"),
        ({"masks": np.zeros((1, SIDE, SIDE), bool)}, ValueError, "masks have shape"),
        ({"boxes": np.zeros((1, 2, 4), np.float32)}, ValueError, r"expected \(1, 3, 4\)"),
        ({"boxes": np.zeros((1, 3, 4), int)}, TypeError, "boxes of the batch are int64, expected"),
        ({"valid": np.ones((1, 3), bool)}, TypeError, "valid of the batch are bool, expected flo"),
        ({"masks": None}, ValueError, "the batch lacks masks; sam_jax.training.ExampleTransform"),
        ({"pixel_values": None}, ValueError, "the batch lacks pixel_values"),
        ({"image_embedding": np.zeros((1, 1))}, ValueError, "image_embeddings have shape"),
        ({"image_embedding": np.zeros((2, 1))}, ValueError, "of 2 images, but masks of 1"),
    ],
    ids=str,
)
def test_bad_batches(model, changes, error, message):
    batch = {**batch_of(1), **changes}
    batch = {name: array for name, array in batch.items() if array is not None}
    with pytest.raises(error, match=message):
        batch_losses(model, batch, KEYS[:1])
    with pytest.raises(TypeError, match="the batch is a list, expected a dictionary"):
        batch_losses(model, list(batch), KEYS[:1])


@pytest.mark.parametrize(
    ("ema", "decay", "message"),
    [
        (False, 0.9, "has no moving average, but ema_decay is 0.9"),
        (True, None, "has a moving average, but ema_decay is None"),
    ],
)
def test_state_and_config_agree_on_the_moving_average(model, ema, decay, message):
    tx = adamw(1e-3, DECODER_ONLY)
    trained, rest = partition(model, DECODER_ONLY)
    state = init_state(trained, tx, ema=ema)
    step = compile_step(state, tx, config=TrainConfig(ema_decay=decay))
    with pytest.raises(ValueError, match=message):
        step(state, rest, batch_of(1), KEYS[0])


@pytest.mark.parametrize(
    ("options", "given"),
    [({"drop_path_rate": 0.1}, "drop_path_rate is 0.1"), ({"remat": True}, "remat is True")],
)
def test_options_that_need_encoder_training(model, options, given):
    batch = {**batch_of(1), "image_embedding": np.zeros((1, 1))}
    with pytest.raises(ValueError, match=f"{given}, .* so the image encoder does not"):
        batch_losses(model, batch, KEYS[:1], config=TrainConfig(**options))


def test_losses_use_the_config(model, monkeypatch):
    """Even options that hardly affect a step of one round are passed on."""
    given = {}

    def spy(*args, **options):
        given.update(options)
        return interactive_losses(*args, **options)

    monkeypatch.setattr("sam_jax.training.step.interactive_losses", spy)
    batch = {**batch_of(1), "image_embedding": normal((1, *EMBEDDING))}
    expected = {"num_rounds": 3, "box_probability": 0.25, "weights": LossWeights(2.0, 3.0, 4.0)}
    losses = jax.eval_shape(
        lambda b: batch_losses(model, b, KEYS[:1], config=TrainConfig(**expected)), batch
    )
    assert losses.total.shape == (1, 3, 3)
    assert given == expected
