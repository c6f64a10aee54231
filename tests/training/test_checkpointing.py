import gc
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from sam_jax.training.checkpointing import (
    load_state,
    non_finite_error,
    open_checkpoints,
    save_state,
)
from sam_jax.training.rules import adamw
from sam_jax.training.step import init_state

TX = adamw(1e-3, [(".*", 1.0)])


def state_of(step, value=1.0, ema=True, shape=(3, 2)):
    params = {"layer": {"kernel": jnp.full(shape, value), "bias": jnp.arange(2.0)}}
    state = init_state(params, TX, ema=ema)
    return state._replace(step=jnp.array(step, jnp.int32))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def last(folder):
    with open_checkpoints(folder) as checkpoints:
        return load_state(checkpoints, state_of(0))


def test_the_last_checkpoint_is_restored(tmp_path):
    with open_checkpoints(tmp_path / "run") as checkpoints:
        assert load_state(checkpoints, state_of(0)) is None
        for step in (5, 10):
            save_state(checkpoints, state_of(step, step / 7))
    with open_checkpoints(tmp_path / "run") as checkpoints:
        assert_same(load_state(checkpoints, state_of(0)), state_of(10, 10 / 7))
        assert [c.step for c in checkpoints.checkpoints] == [5, 10]


def test_the_best_is_kept_along_with_the_last_two(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, miou in ((1, 0.2), (2, 0.9), (3, 0.5), (4, 0.6), (5, 0.7)):
            save_state(checkpoints, state_of(step, float(step)), miou=miou)
    with open_checkpoints(tmp_path) as checkpoints:
        assert [c.step for c in checkpoints.checkpoints] == [2, 4, 5]
        assert_same(load_state(checkpoints, state_of(0), best=True), state_of(2, 2.0))
        assert_same(load_state(checkpoints, state_of(0)), state_of(5, 5.0))


def test_a_state_of_another_run(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, state_of(1))
    with open_checkpoints(tmp_path) as checkpoints:
        for other in (state_of(0, ema=False), state_of(0, shape=(4, 2))):
            with pytest.raises(
                ValueError, match="does not match this run; was it made with different"
            ):
                load_state(checkpoints, other)


def damage(folder, pattern, how):
    (file,) = folder.glob(pattern)
    if file.is_dir():
        shutil.rmtree(file)
    elif how is None:
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if how == "half" else how)


@pytest.fixture
def quiet_orbax(monkeypatch):
    """Hides Orbax's messages: after an error, its other reads and writes find a closed loop."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_orbax")
@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("state", None),
        ("state/_METADATA", b"{}"),
        ("state/_METADATA", b'{"tree_metadata": [1'),
        ("state/manifest.ocdbt", None),
        ("state/d/*", "half"),
        ("state/array_metadatas/process_0", b""),
    ],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, pattern, how):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (4, 8):
            save_state(checkpoints, state_of(step, step / 7), miou=step / 10)
    damage(tmp_path / "8", pattern, how)
    with open_checkpoints(tmp_path) as checkpoints:
        for best in (False, True):
            with pytest.warns(UserWarning, match=f"{tmp_path / '8'} is damaged: .* step 4 inst"):
                assert_same(load_state(checkpoints, state_of(0), best=best), state_of(4, 4 / 7))
        # The resumed run reaches this step again.
        save_state(checkpoints, state_of(8, 8 / 7), miou=0.9)
    with open_checkpoints(tmp_path) as checkpoints:
        assert_same(load_state(checkpoints, state_of(0)), state_of(8, 8 / 7))
        shutil.rmtree(tmp_path / "4" / "state")
        damage(tmp_path / "8", "state/manifest.ocdbt", b"")
        with pytest.raises(ValueError, match="remove this folder to restart") as error:
            load_state(checkpoints, state_of(0))
        assert all(f"{tmp_path / step} is damaged: " in str(error.value) for step in ("4", "8"))


def test_a_forged_chunk_is_not_allocated(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (4, 8):
            save_state(checkpoints, state_of(step, step / 7))
    base = {"driver": "file", "path": f"{tmp_path}/8/state/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    (key,) = (k for k in store.list().result() if k.endswith(b".params['layer']['bias']/zarr.json"))
    layout = json.loads(store[key])
    chunk = [1 << 45]
    layout["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    layout["codecs"][0]["configuration"]["chunk_shape"] = chunk
    store[key] = json.dumps(layout).encode()
    with pytest.warns(UserWarning, match=r"the chunks of .* do not match its shape.* step 4 inst"):
        assert_same(last(tmp_path), state_of(4, 4 / 7))


def test_the_saved_sharding_does_not_matter(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, state_of(4, 4 / 7))
    damage(tmp_path / "4", "state/_sharding", b"[1]")
    assert_same(last(tmp_path), state_of(4, 4 / 7))


@pytest.mark.parametrize("pattern", ["_METADATA", "manifest.ocdbt", "d/*"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (os.mkfifo, "is neither a regular file nor a folder"),
        (lambda file: file.touch() or os.truncate(file, 1 << 40), "is a sparse file"),
    ],
)
def test_endless_files_are_skipped(tmp_path, pattern, put, message):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (4, 8):
            save_state(checkpoints, state_of(step, step / 7))
    (file,) = (tmp_path / "8" / "state").glob(pattern)
    file.unlink()
    put(file)
    with pytest.warns(UserWarning, match=f"{file} {message}.* step 4 instead"):
        assert_same(last(tmp_path), state_of(4, 4 / 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("_CHECKPOINT_METADATA", b"[1]"),
        ("metrics/metrics", b""),
        ("metrics/metrics", b"{}"),
        ("metrics/metrics", b'{"miou": "x"}'),
        ("metrics/metrics", b'{"miou": 1%s}' % (b"0" * 400)),
        ("metrics/metrics", None),
        ("_CHECKPOINT_METADATA", b'{"item_handlers": 3, "init_timestamp_nsecs": "x"}'),
        ("_CHECKPOINT_METADATA", b'{"metrics": [1]}'),
        ("_CHECKPOINT_METADATA", b'{"performance_metrics": {"x": 1.0}}'),
        ("_CHECKPOINT_METADATA", b'{"commit_timestamp_nsecs": 1%s}' % (b"0" * 30)),
        ("_CHECKPOINT_METADATA", b'{"commit_timestamp_nsecs": 1%s}' % (b"0" * 400)),
        ("_CHECKPOINT_METADATA", Path("nowhere")),
        ("metrics/metrics", Path("../state")),
    ],
)
def test_damaged_metadata_does_not_lose_the_state(tmp_path, name, content):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (4, 8):
            save_state(checkpoints, state_of(step, step / 7), miou=step / 10)
    if content is None:
        (tmp_path / "8" / name).unlink()
        (tmp_path / "8" / name).mkdir()
    elif isinstance(content, Path):
        (tmp_path / "8" / name).unlink()
        (tmp_path / "8" / name).symlink_to(content)
    else:
        (tmp_path / "8" / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{tmp_path / '8' / name} was damaged"):
        assert_same(last(tmp_path), state_of(8, 8 / 7))
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, state_of(9, 1.0), miou=0.1)
    assert_same(last(tmp_path), state_of(9, 1.0))


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_orbax")
def test_a_full_disk(tmp_path):
    """A limit on file sizes simulates it; the earlier checkpoint is still there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = jax.random.normal(jax.random.key(0), (400, 400))  # cannot be compressed
    large = {"layer": {"kernel": noise, "bias": noise[0]}}

    def write_two():
        with open_checkpoints(tmp_path) as checkpoints:
            save_state(checkpoints, state_of(4))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            save_state(checkpoints, state_of(8)._replace(params=large))

    try:
        with pytest.raises(OSError, match=rf"^cannot write a checkpoint in {tmp_path}: \w.*; the"):
            write_two()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with open_checkpoints(tmp_path) as checkpoints:
        assert_same(load_state(checkpoints, state_of(0)), state_of(4))
    assert not list(tmp_path.glob("*tmp*"))


def test_non_finite_error(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        metrics = {"loss": float("nan"), "iou_loss": 0.5, "grad_norm": float("inf")}
        error = non_finite_error(7, metrics, image_ids=[3, "sa_1"], checkpoints=checkpoints)
        assert str(error).startswith(
            "at step 7 loss is nan, grad_norm is inf, for the images 3, sa_1; "
            "there is no good checkpoint yet."
        )
        for step in (5, 6):
            save_state(checkpoints, state_of(step))
    with open_checkpoints(tmp_path) as checkpoints:
        # The state saved after step 6 made the loss of step 7 NaN, so it is not good.
        error = non_finite_error(7, metrics, image_ids=[3], checkpoints=checkpoints)
        assert f"the last good checkpoint is {tmp_path / '5'}." in str(error)
