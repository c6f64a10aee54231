import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from orbax.checkpoint import v1 as ocp
from reference import SMALL, SMALL_TINY

from sam_jax.checkpoints import native
from sam_jax.checkpoints.params import param_shapes
from sam_jax.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KERNEL = "image_encoder.blocks.0.attn.qkv.kernel"
BIAS = "image_encoder.blocks.0.attn.qkv.bias"
LOAD_ALL = """
import sys
from sam_jax.checkpoints import native
from sam_jax.errors import CheckpointError

for folder in sys.argv[1:]:
    try:
        native.load(folder)
    except CheckpointError as error:
        print(str(error).split(": ")[0])
"""


@pytest.fixture(scope="module")
def params():
    """Random bits, including NaNs, in three dtypes and in the layouts of views."""
    rng = np.random.default_rng(0)
    result = {}
    for i, (name, shape) in enumerate(param_shapes(SMALL).items()):
        dtype = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16))[i % 3]
        values = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype)
        result[name] = values.reshape(shape[::-1]).T
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
    """A saved model."""
    path = tmp_path_factory.mktemp("saved") / "model"
    native.save(path, params, SMALL)
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert type(actual[name]) is np.ndarray, name
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def open_store(model):
    place = f"file://{model / 'params/state'}/"
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": place}).result()


def files(folder):
    return {file for file in folder.rglob("*") if file.is_file()}


def test_load_is_bit_exact(saved, params):
    for path in (saved, saved / ".." / saved.name):
        loaded, config = native.load(path)
        assert_same(loaded, params)
        assert config == SMALL
    assert native.load_config(saved) == SMALL
    assert native.is_checkpoint(saved)


def test_many_batches_load_as_one(tmp_path, monkeypatch, params):
    sizes = []
    save = ocp.partial.save

    def count(path, batch):
        sizes.append(sum(v.nbytes for v in batch.values()))
        save(path, batch)

    total = sum(v.nbytes for v in params.values())
    monkeypatch.setattr(native, "_BATCH_BYTES", total // 4)
    monkeypatch.setattr(ocp.partial, "save", count)
    native.save(tmp_path / "model", params, SMALL)
    largest = max(v.nbytes for v in params.values())
    assert len(sizes) > 2
    assert max(sizes) < total // 4 + largest
    assert_same(native.load(tmp_path / "model")[0], params)


def test_dtype_casts_all_but_counters_and_positions(tmp_path):
    values = {
        name: np.ones(shape, np.int32 if name.endswith("tracked") else np.float32)
        for name, shape in param_shapes(SMALL_TINY).items()
    }
    native.save(tmp_path / "model", values, SMALL_TINY, dtype="bfloat16")
    kept = [n for n in values if n.endswith(("tracked", "gaussian_matrix"))]
    assert len(kept) > 10
    expected = {k: v if k in kept else v.astype(BFLOAT16) for k, v in values.items()}
    assert_same(native.load(tmp_path / "model")[0], expected)


def test_refuses_a_path_that_exists(saved, params):
    before = {file: file.read_bytes() for file in files(saved)}
    with pytest.raises(FileExistsError, match="model exists already"):
        native.save(saved, params, SMALL)
    assert {file: file.read_bytes() for file in files(saved)} == before


@pytest.mark.parametrize("step", ["save", "finalize"])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, params, step):
    function = getattr(ocp.partial, step)

    def interrupted(*args):
        function(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.partial, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        native.save(tmp_path / "model", params, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_has_the_permissions_of_a_new_folder(saved):
    (other := saved.parent / "other").mkdir()
    assert saved.stat().st_mode == other.stat().st_mode


def test_the_folder_does_not_identify_this_machine(tmp_path, params):
    folder = tmp_path / "a-secret-place" / "model"
    native.save(folder, {**params, BIAS: jnp.asarray(params[BIAS])}, SMALL)
    for file in files(folder):
        assert b"a-secret-place" not in file.read_bytes(), file
        assert "sharding" not in file.name
    assert {child.name for child in folder.iterdir()} == {"config.json", "params"}


def test_all_mismatches_are_listed(tmp_path, params):
    values = dict(params)
    del values[BIAS]
    values[KERNEL] = values[KERNEL].T
    values["more"] = np.zeros(3, np.float32)
    native.save(tmp_path / "model", values, SMALL)
    with pytest.raises(CheckpointError) as error:
        native.load(tmp_path / "model")
    for problem in (
        f"missing: {BIAS} (144,)",
        f"wrong shape: {KERNEL} is (144, 48), expected (48, 144)",
        "unexpected: more (3,)",
    ):
        assert problem in str(error.value)


@pytest.mark.slow
def test_parameters_that_are_damaged_or_missing(tmp_path, saved):
    folders = []
    for part in ("data", "manifest.ocdbt", "_METADATA"):
        for keep in (0.9, 0, None):
            folders.append(folder := tmp_path / f"{part} {keep}")
            shutil.copytree(saved, folder)
            state = folder / "params" / "state"
            # Damages all data files, since the end of a single one may no longer be in use.
            data = [file for file in files(state) if file.parent.name == "d"]
            for file in data if part == "data" else [state / part]:
                content = file.read_bytes()
                file.unlink()
                if keep is not None:
                    file.write_bytes(content[: int(keep * len(content))])
    folders.append(tmp_path / "no chunks")
    shutil.copytree(saved, folders[-1])
    store = open_store(folders[-1])
    for key in store.list().result():
        if not key.endswith(b"/zarr.json"):
            del store[key]
    # Runs in its own process, to check all output that a user would see.
    process = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *folders], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines() == [f"{f / 'params'} cannot be read" for f in folders]
    assert process.stderr == ""


@pytest.mark.parametrize("config_agrees", [False, True])
def test_a_forged_shape_is_not_allocated(tmp_path, saved, config_agrees):
    """A megabyte declares gigabytes, which Orbax would allocate, or abort the process."""
    shutil.copytree(saved, tmp_path / "model")
    decoder = dataclasses.replace(SMALL.mask_decoder, iou_head_hidden_dim=65_536, iou_head_depth=3)
    forged = dataclasses.replace(SMALL, mask_decoder=decoder)
    if config_agrees:
        (tmp_path / "model/config.json").write_text(json.dumps(forged.to_dict()))
    store = open_store(tmp_path / "model")
    saved_shapes = param_shapes(SMALL)
    for name, shape in param_shapes(forged).items():
        if shape != saved_shapes[name]:
            key = f"{name}/zarr.json".encode()
            set_chunks(shape)(layout := {**json.loads(store[key]), "shape": shape})
            store[key] = json.dumps(layout).encode()
    message = r"wrong shape: .*\(65536, 65536\)"
    if config_agrees:
        message = r"has [\d,]+ bytes, which cannot be the declared 8,[\d,]+"
    with pytest.raises(CheckpointError, match=message):
        native.load(tmp_path / "model")


def set_chunks(shape):
    def change(layout):
        sharding = layout["codecs"][0]["configuration"]
        layout["chunk_grid"]["configuration"]["chunk_shape"] = sharding["chunk_shape"] = shape

    return change


def set_inner_chunks(layout):
    layout["codecs"][0]["configuration"]["chunk_shape"] = [1, 288]


def set_codec(layout):
    layout["codecs"][0]["configuration"]["codecs"][1] = {"name": "blosc", "configuration": {}}


def repeat_codec(count):
    def change(layout):
        layout["codecs"][0]["configuration"]["codecs"] += [{"name": "zstd"}] * count

    return change


def nest_shards(layout):
    (shard,) = layout["codecs"]
    inner = {**shard["configuration"], "codecs": [shard]}
    layout["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]


@pytest.mark.parametrize(
    "change",
    [
        *map(set_chunks, ([2**40, 144], [48, 288], [True, 1], [48])),
        set_inner_chunks,
        set_codec,
        repeat_codec(1),
        repeat_codec(20_000),
        nest_shards,
        lambda layout: layout.pop("codecs"),
    ],
)
def test_forged_chunks_are_not_allocated(tmp_path, saved, change):
    shutil.copytree(saved, tmp_path / "model")
    store = open_store(tmp_path / "model")
    key = f"{KERNEL}/zarr.json".encode()
    change(layout := json.loads(store[key]))
    store[key] = json.dumps(layout).encode()
    with pytest.raises(
        CheckpointError, match=r"chunks of .* do not match its shape|'codecs'|layout of .* has \d+,"
    ):
        native.load(tmp_path / "model")


def test_only_names_in_the_metadata_are_looked_up(tmp_path, saved, params):
    """Keys are never listed: nodes that share children could make billions of keys of 2 kB."""
    shutil.copytree(saved, tmp_path / "model")
    open_store(tmp_path / "model")[b"another/zarr.json"] = b"{"
    assert_same(native.load(tmp_path / "model")[0], params)


def test_a_name_in_the_metadata_that_is_not_text(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "model")
    open_store(tmp_path / "model")[b"3/zarr.json"] = open_store(saved)[f"{BIAS}/zarr.json".encode()]
    file = tmp_path / "model/params/state/_METADATA"
    metadata = json.loads(file.read_text())
    metadata["tree_metadata"]["(3,)"] = {"key_metadata": [{"key": 3, "key_type": 2}]}
    file.write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match="expected a flat dictionary of arrays"):
        native.load(tmp_path / "model")


def test_the_number_of_chunks_is_bounded(monkeypatch, saved, params):
    monkeypatch.setattr(native, "_MOST_CHUNKS", len(params) - 1)
    with pytest.raises(CheckpointError, match=f"params has {len(params)} chunks, expected at most"):
        native.load(saved)


def test_the_number_of_arrays_is_bounded(monkeypatch, saved):
    monkeypatch.setattr(native, "_MOST_ARRAYS", 10)
    with pytest.raises(CheckpointError, match=r"arrays, expected at most 10"):
        native.load(saved)


@pytest.mark.parametrize("key", ["use_ocdbt", "use_zarr3"])
def test_other_storage_formats_are_refused(tmp_path, saved, key):
    """Their chunks were not checked."""
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model/params/state/_METADATA"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: False}))
    with pytest.raises(CheckpointError, match="expected arrays in OCDBT and zarr 3"):
        native.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["params/state/d/pipe", "params/_CHECKPOINT_METADATA"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path, saved, name):
    shutil.copytree(saved, tmp_path / "model")
    pipe = tmp_path / "model" / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match=f"{pipe} is neither a regular file nor a folder"):
        native.load(tmp_path / "model")


def test_links_to_data_folders_are_refused(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "model")
    data = tmp_path / "model/params/state/d"
    os.mkfifo(data / "pipe")
    data.rename(tmp_path / "hidden")
    data.symlink_to(tmp_path / "hidden")
    with pytest.raises(CheckpointError, match=f"{data} is neither a regular file nor a folder"):
        native.load(tmp_path / "model")


def test_linked_files_and_model_folders_load(tmp_path, saved, params):
    """The hub's cache has such links."""
    shutil.copytree(saved, tmp_path / "blobs", copy_function=os.symlink)
    (tmp_path / "model").mkdir()
    for part in ("config.json", "params"):
        (tmp_path / "model" / part).symlink_to(tmp_path / "blobs" / part)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert_same(native.load(tmp_path / "link")[0], params)


def test_a_sparse_file_is_refused(tmp_path, saved):
    """A terabyte that takes no disk space would be read into memory."""
    shutil.copytree(saved, tmp_path / "model")
    for file in files(tmp_path / "model/params/state"):
        os.truncate(file, 1 << 40)
    with pytest.raises(CheckpointError, match="is a sparse file: not all of its 1,099,511,627,776"):
        native.load(tmp_path / "model")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, params):
    def full(*_):
        raise ValueError(
            'OUT_OF_RANGE: Error writing "a/c/0" in OCDBT database at local file "/x/": Failed '
            'writing: "/x/d/0": Failed to write 9 bytes to file 28: No space left on device'
        )

    with monkeypatch.context() as patch:
        patch.setattr(ocp.partial, "save", full)
        with pytest.raises(OSError, match=r"^cannot write \S+model: Failed to .* left on device$"):
            native.save(tmp_path / "model", params, SMALL)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = (
        r"^cannot write \S+model: it needs about [\d,]{7} bytes, but the disk has only 1,000 left$"
    )
    with pytest.raises(OSError, match=message):
        native.save(tmp_path / "model", params, SMALL)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
import numpy as np
from orbax.checkpoint import v1 as ocp
from sam_jax.checkpoints import native
from sam_jax.config import SamConfig

def kill(*_):
    os.kill(os.getpid(), 9)

ocp.partial.save = kill
native.save(sys.argv[1], {"x": np.zeros(3)}, SamConfig())
"""


@pytest.mark.slow
def test_leftovers_of_a_killed_save_are_removed(tmp_path, params):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    native.save(tmp_path / "model", params, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parameters_that_are_not_a_flat_dictionary(tmp_path):
    ocp.save(tmp_path / "params", {"encoder": {"kernel": np.zeros(3)}})
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    with pytest.raises(CheckpointError, match="params cannot be read: expected a flat dict"):
        native.load(tmp_path)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", "[" * 100_000, '{"image_size": 96, "more": 1}']
)
def test_a_config_that_is_damaged_or_missing(tmp_path, content):
    (tmp_path / "params").mkdir()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    for function in (native.load, native.load_config):
        with pytest.raises(
            CheckpointError, match=r"config\.json is not a configuration of sam_jax"
        ):
            function(tmp_path)
